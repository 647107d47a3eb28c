"""evaluate.py --export: ONNX against onnxruntime, an AST's folder against transformers; and folders as checkpoints."""

import json
import shutil
import types

import numpy as np
import pytest
import soundfile
import torch
from conftest import AST, HYBRID, inside, write_prepared
from test_tags import CLASSES, CNN, MEAN, STD, by_class, checkpoint, sound

import dataset
import distill
import evaluate
import models

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("toy", "undrawn")


def spectrograms(B, T):
    return torch.randn(B, T, 128, generator=torch.Generator().manual_seed(0)) / 2


# ---------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("name", [CNN, HYBRID, AST])
def test_onnx_gives_our_logits_for_any_batch(tmp_path, name):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = checkpoint(tmp_path / "a.pt", name, 60)
    assert "60 frames" in inside("evaluate.py", "--ckpt", tmp_path / "a.pt", "--export", tmp_path / "out" / "m.onnx")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "m.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert (
        json.loads(facts["classes"]) == CLASSES and facts["task"] == "multi-label" and facts["sample_rate"] == "16000"
    )
    assert float(facts["mean"]) == MEAN and float(facts["std"]) == STD and "(x - mean) / (2 std)" in facts["input"]
    assert "sigmoid" in facts["output"]
    for B in (1, 5):
        x = spectrograms(B, 60)
        (logits,) = session.run(["logits"], {"log_mel": x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(x), atol=1e-4)
    assert logits.std(0).max() > 0.01


def test_onnx_of_two_heads_is_their_mean(tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = models.build_model(AST, 3, 30, kd_head=True).eval()
    model.kd_head[1].bias.data += 4
    meta = {"classes": CLASSES, "mean": 0.0, "std": 1.0, "n_frames": 30, "sample_rate": 16000, "task": "single-label"}
    models.save_checkpoint(tmp_path / "a.pt", model, **meta, args={})
    inside("evaluate.py", "--ckpt", tmp_path / "a.pt", "--export", tmp_path / "m.onnx")
    x = spectrograms(2, 30)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        want = torch.stack(model(x, both=True)).mean(0)
    np.testing.assert_allclose(session.run(None, {"log_mel": x.numpy()})[0], want, atol=1e-4)
    assert "softmax" in session.get_modelmeta().custom_metadata_map["output"]
    assert "has no place for an AST with a distillation head" in inside(
        "evaluate.py", "--ckpt", tmp_path / "a.pt", "--export", tmp_path
    )


def test_onnx_that_differs_or_cannot_be_checked_is_not_written(tmp_path, monkeypatch):
    checkpoint(tmp_path / "a.pt", CNN, 30)
    flags = ["--ckpt", tmp_path / "a.pt", "--export", tmp_path / "m.onnx"]
    with monkeypatch.context() as m:
        m.setitem(evaluate.sys.modules, "onnxruntime", None)
        assert "pip install onnx onnxruntime" in inside("evaluate.py", *flags)
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    session = types.SimpleNamespace(run=lambda outputs, inputs: [np.full((3, 3), 9, np.float32)])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: session)
    assert "onnxruntime's logits differ from PyTorch's" in inside("evaluate.py", *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


# -------------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("task", ["multi-label", "single-label"])
def test_pipeline_gives_our_probabilities_from_a_wav_file(tmp_path, task):
    transformers = pytest.importorskip("transformers")
    checkpoint(tmp_path / "a.pt", "ast-tiny", 100, task)
    inside("evaluate.py", "--ckpt", tmp_path / "a.pt", "--export", tmp_path / "hf")
    pipeline = transformers.pipeline("audio-classification", model=str(tmp_path / "hf"))
    for seconds in (0.4, 1.0):
        soundfile.write(tmp_path / "x.wav", sound(seconds), 16000)
        inside(*f"evaluate.py --ckpt {tmp_path / 'a.pt'} --audio {tmp_path / 'x.wav'} --json {tmp_path / 'o'}".split())
        ours = by_class(json.loads((tmp_path / "o").read_text())[0]["tags"])
        samples, rate = soundfile.read(tmp_path / "x.wav", dtype="float32")  # from a path it wants FFmpeg
        theirs = {t["label"]: t["score"] for t in pipeline({"raw": samples, "sampling_rate": rate})}
        np.testing.assert_allclose(ours, [theirs[c] for c in CLASSES], atol=1e-3)
        assert (abs(sum(ours) - 1) < 1e-4) == (task == "single-label")


def test_an_exported_folder_is_the_checkpoint(tmp_path):
    model = checkpoint(tmp_path / "a.pt", "ast-tiny", 60, args={"fold": 2, "seed": 0})
    inside("evaluate.py", "--ckpt", tmp_path / "a.pt", "--export", tmp_path / "hf")
    got, meta = models.load_checkpoint(tmp_path / "hf")
    assert all(torch.equal(v, got.state_dict()[k]) for k, v in model.state_dict().items())
    _, own = models.load_checkpoint(tmp_path / "a.pt")
    keys = "model", "classes", "mean", "std", "n_frames", "sample_rate", "task"
    assert [meta[k] for k in keys] == [own[k] for k in keys] and meta["args"]["fold"] == 2
    longer, _ = models.load_checkpoint(tmp_path / "hf", 90)
    also, _ = models.load_checkpoint(tmp_path / "a.pt", 90)
    assert torch.equal(longer.v.pos_embed, also.v.pos_embed)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A random AST of AST-Tiny's shape as transformers saves it, with its feature extractor: 100 frames, three classes."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "max_length": 100}
    labels = dict(enumerate(("high", "low", "noise")))
    torch.manual_seed(0)
    config = transformers.ASTConfig(**shape, id2label=labels, problem_type="multi_label_classification")
    model = transformers.ASTForAudioClassification(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    folder = tmp_path_factory.mktemp("foreign") / "ast"
    model.save_pretrained(folder)
    transformers.ASTFeatureExtractor(max_length=100, mean=-5.0, std=3.0).save_pretrained(folder)
    return model, folder


def test_a_foreign_folder_is_scored_tags_and_teaches(foreign, tmp_path):
    theirs, folder = foreign
    root = write_prepared(tmp_path / "data", {"train": 4, "eval": 9}, True, n_frames=100)
    data = dataset.FbankDataset(root, "eval")
    inside("evaluate.py", "--ckpt", folder, "--data", root)
    found = json.loads((folder / "metrics-model-eval.json").read_text())
    with torch.no_grad():
        p = theirs((data.batch(range(9))[0].float() + 5) / 6).logits.sigmoid().numpy()
    y = dataset.targets(torch.from_numpy(data.labels), 3, "multi-label").numpy()
    assert found["mAP"] == pytest.approx(evaluate.scores(p, y, "multi-label")["mAP"], abs=1e-3)
    assert found["clips"] == len(data) and found["model"] == "ast-tiny"
    assert "give --data" in inside("evaluate.py", "--ckpt", folder)
    two = [shutil.copytree(folder, tmp_path / "exp" / name) for name in "ab"]
    inside("evaluate.py", "--ckpt", *two, "--data", root)
    assert (tmp_path / "exp" / "ensemble-a+b" / "metrics-model-eval.json").exists()
    soundfile.write(tmp_path / "x.wav", sound(1), 16000)
    assert "noise" in inside("evaluate.py", "--ckpt", folder, "--audio", tmp_path / "x.wav")
    args = types.SimpleNamespace(teacher=[str(folder)], fold=None, compile=False)
    ((teacher, scale, offset),), (meta,) = distill.load_teachers(args, data, torch.device("cpu"))
    assert meta["model"]["name"] == "ast-tiny" and scale == pytest.approx(data.std / 3)
    x = (torch.randn(2, data.n_frames, 128) - data.mean) / (2 * data.std)
    with torch.no_grad():
        again = (x * 2 * data.std + data.mean + 5) / 6
        torch.testing.assert_close(teacher(scale * x + offset), teacher(again), atol=1e-4, rtol=0)


def test_the_original_release_needs_its_labels_and_normalisation(foreign, tmp_path):
    theirs, folder = foreign
    model, _ = models.load_checkpoint(folder)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    state |= {"module.v.head.weight": torch.zeros(9, 192), "module.v.head.bias": torch.zeros(9)}  # DeiT's, unused
    release = tmp_path / "release"
    release.mkdir()
    torch.save(state, release / "audioset.pth")
    with pytest.raises(ValueError, match=r"audioset.pth is no checkpoint.*config.json and preprocessor_config.json"):
        models.load_checkpoint(release / "audioset.pth")
    with pytest.raises(FileNotFoundError, match="has no best.pt, and no config.json"):
        models.load_checkpoint(release)
    config = {"id2label": {"0": "high", "1": "low", "2": "noise"}, "max_length": 100}
    (release / "config.json").write_text(json.dumps(config))
    (release / "preprocessor_config.json").write_text('{"mean": -5.0, "std": 3.0}')
    got, meta = models.load_checkpoint(release)
    assert meta["classes"] == ["high", "low", "noise"] and (meta["mean"], meta["std"]) == (-5, 3)
    assert meta["task"] == "single-label"  # what transformers takes a config without problem_type for
    x = spectrograms(2, 100)
    with torch.no_grad():
        torch.testing.assert_close(got(x), theirs(x).logits, atol=1e-4, rtol=0)


def test_folders_that_cannot_be_used(foreign, tmp_path):
    _, folder = foreign
    config, audio = (json.loads((folder / n).read_text()) for n in ("config.json", "preprocessor_config.json"))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    for file, changes, message in (
        ("config.json", {"time_stride": 16}, "time_stride 16, and ours has 10"),
        ("config.json", {"num_attention_heads": 6}, "num_attention_heads 6, and ours has 3"),
        ("config.json", {"max_length": [1]}, "max_length, id2label of config.json"),
        ("config.json", {"max_length": 1024}, "for max_length 1024"),
        ("config.json", {"id2label": {"0": "a", "1": "b"}}, "not those of ast-tiny, 2 classes"),
        ("config.json", {"id2label": {"1": "a"}}, "id2label of config.json"),
        ("preprocessor_config.json", {"mean": None}, "mean, std of preprocessor_config.json"),
        ("preprocessor_config.json", {"sampling_rate": 8000}, "sampling_rate 8000, and ours has 16000"),
    ):
        for name, content in (("config.json", config), ("preprocessor_config.json", audio)):
            (tmp_path / name).write_text(json.dumps(content | (changes if name == file else {})))
        with pytest.raises(ValueError, match=message):
            models.load_checkpoint(tmp_path)
        if "ours has" in message and "sampling" not in message:  # as --pretrained too
            with pytest.raises(ValueError, match=message):
                models.read_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "num_attention_heads"}))
    with pytest.raises(
        ValueError, match="num_attention_heads 12, and ours has 3"
    ):  # Hugging Face's default is not written
        models.load_checkpoint(tmp_path)
    checkpoint(tmp_path / "cnn.pt", CNN, 30)
    assert "Hugging Face's format has no place for" in inside(
        "evaluate.py", "--ckpt", tmp_path / "cnn.pt", "--export", tmp_path
    )
    two = [tmp_path / "cnn.pt"] * 2
    assert "give one --ckpt" in inside("evaluate.py", "--ckpt", *two, "--export", tmp_path / "m.onnx")
    assert "name a .onnx file" in inside("evaluate.py", "--ckpt", two[0], "--export", tmp_path / "m.pt")
