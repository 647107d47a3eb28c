"""evaluate.py: tags of audio files against their own log-mel and windows, and figures of scores."""

import csv
import itertools
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import AST, HYBRID, drawn, inside
from torchaudio.compliance import kaldi

import dataset
import evaluate
import models

CNN = "timm:mobilenetv3_small_050"
CLASSES = ["Bark, dog", 'a "quoted" $x_1$', "two\nlines $"]
MEAN, STD = -6.0, 4.0
pytestmark = pytest.mark.usefixtures("toy", "undrawn")
torch.set_num_threads(1)


def checkpoint(path, name, n_frames=100, task="multi-label", seed=0, classes=CLASSES, **more):
    """An untrained checkpoint whose probabilities differ from clip to clip -> its model in eval mode, and its path."""
    torch.manual_seed(seed)
    model = models.build_model(name, len(classes), n_frames)
    x = torch.stack([log_mel(sound(n_frames / 100 + 0.015, seed=i)[:, 0]) for i in range(4)])
    x = torch.cat([(x - MEAN) / (2 * STD), torch.randn(x.shape) / 2])
    for norm in model.eval().modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.train().momentum = 1.0  # one forward sets its statistics
    with torch.no_grad():
        model(x)
        spread = model.eval()(x).std()
        for key, p in model.named_parameters():
            if p.ndim == 2 and key in ("head.weight", "mlp_head.1.weight", "head.cla.weight"):
                p.mul_(2 / spread)
    meta = {"classes": classes, "mean": MEAN, "std": STD, "n_frames": n_frames, "sample_rate": 16000, "task": task}
    meta |= {"data": None, "epoch": 1, "args": {"seed": 0, "fold": None}} | more
    models.save_checkpoint(path, model, **meta)
    return model


def sound(seconds, rate=16000, channels=1, seed=0):
    """A tone that rises and falls in noise: every window differs"""
    rng, t = np.random.default_rng(seed), np.arange(round(seconds * rate)) / rate
    x = 0.3 * np.sin(2 * np.pi * (400 + 300 * np.sin(2 * t)) * t)[:, None] + 0.05 * rng.standard_normal(
        (len(t), channels)
    )
    return (x * np.linspace(0.2, 1, channels)).astype(np.float32)


def log_mel(samples):
    """(samples,) at 16 kHz -> (frames, 128), by torchaudio alone, rounded as a prepared folder holds it"""
    wave = torch.as_tensor(samples, dtype=torch.float32)[None]
    return kaldi.fbank(wave, htk_compat=True, window_type="hanning", num_mel_bins=128, dither=0.0).half().float()


@torch.no_grad()
def expected(model, samples, n_frames, task="multi-label"):
    x = log_mel(samples)
    x = torch.nn.functional.pad(x, (0, 0, 0, n_frames - len(x)))
    z = model((x[None] - MEAN) / (2 * STD))[0]
    return (z.sigmoid() if task == "multi-label" else z.softmax(0)).numpy()


def by_class(tags):
    return [next(t["probability"] for t in tags if t["class"] == name) for name in CLASSES]


def test_windows_of_a_stereo_file_at_another_rate(tmp_path):
    model = checkpoint(tmp_path / "a.pt", CNN)
    x = sound(2.3, 44100, 2)
    soundfile.write(tmp_path / "x.flac", x, 44100, subtype="PCM_24")
    mono = torchaudio.functional.resample(torch.from_numpy(x.mean(1)), 44100, 16000).numpy()
    flags = ["--ckpt", tmp_path / "a.pt", "--audio", tmp_path / "x.flac", "--json", tmp_path / "out.json"]
    said = inside("evaluate.py", *flags, "--window", 1, "--hop", 0.5)
    (one,) = json.loads((tmp_path / "out.json").read_text())
    assert one["file"] == str(tmp_path / "x.flac") and one["seconds"] == 2.3
    assert [(w["start"], w["end"]) for w in one["windows"]] == [(0, 1), (0.5, 1.5), (1, 2), (1.5, 2.3)]
    want = [expected(model, mono[at : at + 16000], n) for at, n in ((0, 100), (8000, 100), (16000, 100), (24000, 80))]
    np.testing.assert_allclose([by_class(w["tags"]) for w in one["windows"]], want, atol=1e-3)
    assert np.ptp(want, 0).max() > 0.01
    np.testing.assert_allclose(by_class(one["tags"]), np.mean(want, 0), atol=1e-3)
    shown = [t["probability"] for t in one["tags"]]
    assert shown == sorted(shown, reverse=True)
    assert f"{shown[0]:.3f}" in said and "1.5 - 2.3 s: " in said and "two lines $" in said


def test_a_short_clip_has_its_own_length_in_a_cnn_and_is_padded_in_an_ast(tmp_path):
    x = sound(0.53)[:, 0]
    soundfile.write(tmp_path / "x.wav", x, 16000, subtype="FLOAT")
    for name, n_frames in ((CNN, 53), (HYBRID, 53), (AST, 100)):
        model = checkpoint(tmp_path / "a.pt", name, task="single-label")
        flags = ["--audio", tmp_path / "x.wav", "--json", tmp_path / "out.json", "--top", 9]
        said = inside("evaluate.py", "--ckpt", tmp_path / "a.pt", *flags)
        (one,) = json.loads((tmp_path / "out.json").read_text())
        assert [(w["start"], w["end"]) for w in one["windows"]] == [(0, 0.53)] and len(one["tags"]) == 3
        want = expected(model, x, n_frames, "single-label")
        np.testing.assert_allclose(by_class(one["tags"]), want, atol=1e-3)
        assert 0.01 < np.ptp(want) < 0.999
        assert said.count("padded with 0.0 log-mel") == (name == AST)
    assert "longer than the 1 s" in inside("evaluate.py", "--ckpt", tmp_path / "a.pt", *flags, "--window", 2)


def test_a_prepared_clip_and_its_file_agree(tmp_path):
    lengths = [1, 1, 0.61, 1, 1.7]  # s; the last three are scored
    for i, seconds in enumerate(lengths):
        soundfile.write(tmp_path / f"{i}.wav", sound(seconds, 22050, seed=i), 22050)
    lines = [f"{i}.wav,{'ab'[i % 2]},{'train' if i < 2 else 'eval'}" for i in range(5)]
    (tmp_path / "t.csv").write_text("path,labels,split\n" + "\n".join(lines) + "\n")
    flags = ["--out", tmp_path / "p", "--clip-seconds", 1, "--workers", 1]
    assert "error" not in inside("prep_data.py", "csv", "--root", tmp_path / "t.csv", *flags)
    data = dataset.FbankDataset(tmp_path / "p", "eval")
    for name, agree in ((AST, [0, 1, 2]), (CNN, [1, 2])):  # a CNN sees no silence after the short clip
        model = checkpoint(tmp_path / "a.pt", name, data.n_frames, data.task, classes=data.classes)
        p, _ = evaluate.predict(model, data, torch.device("cpu"), MEAN, STD)
        files = [tmp_path / f"{i}.wav" for i in (2, 3, 4)]
        flags = ["--window", 1, "--hop", 1, "--json", tmp_path / "out.json"]
        inside("evaluate.py", "--ckpt", tmp_path / "a.pt", "--audio", *files, *flags)
        found = [one["windows"][0]["tags"] for one in json.loads((tmp_path / "out.json").read_text())]
        got = np.array(
            [[next(t["probability"] for t in tags if t["class"] == c) for c in data.classes] for tags in found]
        )
        np.testing.assert_allclose(got[agree], p[agree], atol=1e-3)
        assert np.ptp(p, 0).max() > 0.01


def test_a_bad_file_is_named_and_the_others_are_tagged(tmp_path, capfd):
    checkpoint(tmp_path / "a.pt", CNN)
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a text.wav").write_text("no sound\n" * 99)
    soundfile.write(folder / "b short.wav", sound(0.01), 16000)
    soundfile.write(folder / "deep" / "good.ogg", sound(0.8), 16000)
    (folder / "notes.txt").write_text("not audio, not looked at")
    flags = ["--ckpt", tmp_path / "a.pt", "--json", tmp_path / "out.json", "--embed", tmp_path / "z.npy"]
    error = inside("evaluate.py", *flags, "--audio", folder, tmp_path / "none.wav")
    assert error.startswith("error: 3 of 4 files could not be tagged, the first is ") and "a text.wav" in error
    said = capfd.readouterr().err
    assert all(
        f"skipped {path}: " in said for path in (folder / "a text.wav", folder / "b short.wav", tmp_path / "none.wav")
    )
    assert [one["file"] for one in json.loads((tmp_path / "out.json").read_text())] == [
        str(folder / "deep" / "good.ogg")
    ]
    assert np.load(tmp_path / "z.npy").shape == (1, 1024)
    shutil.rmtree(folder / "deep")
    (tmp_path / "empty").mkdir()
    assert "empty: this folder holds no audio" in inside("evaluate.py", *flags, "--audio", tmp_path / "empty")


@drawn()
def test_frames_average_to_the_clip_and_follow_each_other(tmp_path):
    model = checkpoint(tmp_path / "a.pt", CNN)
    soundfile.write(tmp_path / "1.wav", sound(1.6), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "2.wav", sound(2.5, seed=1), 16000, subtype="FLOAT")
    files = [tmp_path / "1.wav", tmp_path / "2.wav"]
    flags = ["--frames", tmp_path / "f.csv", "--plot", tmp_path / "p.png", "--window", 1.6, "--hop", 0.8]
    inside("evaluate.py", "--ckpt", tmp_path / "a.pt", "--audio", *files, *flags)
    with open(tmp_path / "f.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["file", "start", "end", *CLASSES]
    first, second = ([r for r in rows if r["file"] == str(file)] for file in files)
    assert [(r["start"], r["end"]) for r in first] == [
        (f"{t / 100:.2f}", f"{t / 100 + 0.32:.2f}") for t in range(0, 160, 32)
    ]
    p = np.array([[float(r[c]) for c in CLASSES] for r in first])
    logit = lambda p: np.log(p / (1 - p))
    np.testing.assert_allclose(logit(p).mean(0), logit(expected(model, sound(1.6)[:, 0], 160)), atol=5e-3)
    assert p.std(0).max() > 0.01
    assert second[0]["start"] == "0.00" and second[-1]["end"] == "2.50"
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(second))
    checkpoint(tmp_path / "d.pt", "densenet-121")  # its map leaves out what does not fill a column
    inside("evaluate.py", "--ckpt", tmp_path / "d.pt", "--audio", files[1], "--frames", tmp_path / "d.csv")
    with open(tmp_path / "d.csv", newline="", encoding="utf-8") as f:
        third = list(csv.DictReader(f))
    assert third[0]["start"] == "0.00" and third[-1]["end"] == "2.50"
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(third))
    assert (tmp_path / "p-1.png").stat().st_size > 9999 and (tmp_path / "p-2.png").exists()
    checkpoint(tmp_path / "a.pt", HYBRID)
    assert "--frames works with one CNN" in inside(
        "evaluate.py", "--ckpt", tmp_path / "a.pt", "--audio", *files, *flags
    )


def test_features_of_files_and_an_ensemble(tmp_path):
    one = checkpoint(tmp_path / "a.pt", AST, 60)
    two = checkpoint(tmp_path / "b.pt", CNN, 60, seed=1)
    files = [tmp_path / "a\nname.wav", tmp_path / "0.wav"]
    for i, path in zip((1, 0), files):
        soundfile.write(path, sound(0.9, seed=i), 16000, subtype="FLOAT")
    flags = ["--window", 0.6, "--hop", 0.3]
    inside("evaluate.py", "--ckpt", tmp_path / "a.pt", "--audio", *files, *flags, "--embed", tmp_path / "z.npy")
    assert (tmp_path / "z.txt").read_text() == f"{tmp_path / 'a name.wav'}\n{files[1]}\n"
    cut = lambda i, at: sound(0.9, seed=i)[at : at + 9600, 0]
    for z, i in zip(np.load(tmp_path / "z.npy"), (1, 0)):
        x = torch.stack([torch.nn.functional.pad(log_mel(cut(i, at)), (0, 0, 0, 2)) for at in (0, 4800)])
        with torch.no_grad():
            np.testing.assert_allclose(z, one.features((x - MEAN) / (2 * STD)).mean(0), atol=5e-3)
    both = ["--ckpt", tmp_path / "a.pt", tmp_path / "b.pt"]
    inside("evaluate.py", *both, "--audio", *files, *flags, "--json", tmp_path / "o")
    want = [np.mean([expected(m, cut(1, at), 60) for m in (one, two)], 0) for at in (0, 4800)]
    found = json.loads((tmp_path / "o").read_text())[0]
    np.testing.assert_allclose([by_class(w["tags"]) for w in found["windows"]], want, atol=1e-3)


def test_flags_that_do_not_fit(tmp_path):
    checkpoint(tmp_path / "a.pt", CNN)
    soundfile.write(tmp_path / "x.wav", sound(0.5), 16000)
    tags = ["--ckpt", tmp_path / "a.pt", "--audio", tmp_path / "x.wav"]
    for flags, message in (
        ((*tags, "--window", "nan"), "--window nan"),
        ((*tags, "--window", 1, "--hop", 2), "--hop 2"),
        ((*tags, "--top", 0), "--top 0"),
        ((*tags, "--plot", tmp_path / "out"), "must end in .png"),
        ((*tags, "--json", tmp_path / "x.wav"), "would overwrite a file of --audio"),
        ((*tags[:3], tmp_path, "--json", tmp_path / "x.wav"), "would overwrite a file of --audio"),
        ((*tags, "--frames", tmp_path / "o", "--json", tmp_path / "." / "o"), "or another output"),
        ((*tags, "--embed", tmp_path / "o.npy", "--json", tmp_path / "o.txt"), "or another output"),
        ((*tags, "--json", tmp_path), "is a folder: name a file"),
        ((*tags, "--embed", tmp_path / "x.wav" / "z.npy"), f"'{tmp_path / 'x.wav'}'"),  # before the work
        (
            (*tags[:2], "--export", tmp_path / "x.wav" / "x.onnx"),
            "x.onnx could not be written (File exists): free some",
        ),
        (("--ckpt", tmp_path / "a.pt", "--json", tmp_path / "o"), "--json: give --ckpt and --audio too"),
        (("--summary", tmp_path, "--audio", tmp_path), "give --ckpt too"),
        (("--ckpt", tmp_path / "a.pt"), "give --data"),
    ):
        assert message in inside("evaluate.py", *flags)


def test_odd_names(tmp_path, capfd):
    checkpoint(tmp_path / "a.pt", CNN)
    (tmp_path / "in").mkdir()
    for name in ("x\ry.wav", os.fsdecode(b"z\xff.wav")):
        soundfile.write(tmp_path / "x.wav", sound(0.5), 16000)
        (tmp_path / "x.wav").rename(tmp_path / "in" / name)
    error = inside(
        "evaluate.py", "--ckpt", tmp_path / "a.pt", "--audio", tmp_path / "in", "--frames", tmp_path / "o.csv"
    )
    assert "1 of 2 files" in error and "its name is not UTF-8: rename it" in error
    with open(tmp_path / "o.csv", newline="") as f:
        assert {row[0] for row in csv.reader(f)} == {"file", str(tmp_path / "in" / "x y.wav")}


def test_a_long_file_needs_the_memory_of_a_window(tmp_path):
    """Twelve minutes of 44.1 kHz stereo are 254 MB as float32, 127 MB as mono."""
    clear = pathlib.Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("the peak of a process's memory can only be reset on Linux")
    checkpoint(tmp_path / "a.pt", CNN)
    noise = np.random.default_rng(0).integers(-9000, 9000, (44100 * 20, 2), np.int16)
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 44100, 2, "PCM_16") as f:
        for _ in range(36):
            f.write(noise)
    soundfile.write(tmp_path / "short.wav", noise, 44100)
    status = pathlib.Path("/proc/self/status")  # in kB
    memory = lambda key: int(re.search(key + r":\s+(\d+)", status.read_text())[1]) / 1024
    flags = ["--ckpt", tmp_path / "a.pt", "--window", 10, "--hop", 10, "--json", tmp_path / "out.json", "--audio"]
    inside("evaluate.py", *flags, tmp_path / "short.wav")
    clear.write_text("5")
    before = memory("VmRSS")
    inside("evaluate.py", *flags, tmp_path / "long.wav")
    assert memory("VmHWM") - before < 150
    (one,) = json.loads((tmp_path / "out.json").read_text())
    assert one["seconds"] == 720 and len(one["windows"]) == 72


# -------------------------------------------------------------------------------------------------------------- scores


@drawn()
def test_scoring_prints_a_table_and_draws_it(folds, tmp_path):
    data = dataset.FbankDataset(folds, "eval", 1)
    meta = {"data": str(folds), "mean": data.mean, "std": data.std, "args": {"seed": 0, "fold": 1}}
    checkpoint(tmp_path / "a.pt", CNN, data.n_frames, "single-label", classes=data.classes, **meta)
    said = inside("evaluate.py", "--ckpt", tmp_path / "a.pt")
    found = json.loads((tmp_path / "metrics-a-eval.json").read_text())
    head, row = said.splitlines()[:2]
    assert head.split() == ["mAP", "mAUC", "accuracy", "d'"]
    assert row.split() == [f"{100 * found[k]:.2f}" for k in ("mAP", "mAUC", "accuracy")] + [f"{found['d_prime']:.3f}"]
    for figure in ("per_class-a-eval.png", "confusion-a-eval.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_best_and_worst_classes(capsys):
    classes, ap = [f"c{i}" for i in range(12)], np.array([0.5, np.nan, *np.linspace(0.1, 0.9, 10)])
    found = {"mAP": 0.5, "mAUC": 0.9, "accuracy": 0.25, "d_prime": 1.8}
    evaluate.print_scores(found, classes, ap, np.array([3, 0, *range(1, 11)]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[-3] for line in lines] == ["c11", "c10", "c9", "c8", "c7", "c6", "c5", "c4", "c3", "c2"]
    assert lines[0] == ["best", "90.00", "c11", "(10", "clips)"] and lines[5][0] == "worst" and lines[9][0] == "10.00"


@drawn()
def test_figures_of_many_classes_with_names_of_all_kinds(tmp_path):
    names = (CLASSES + ["Häuser & straße", r"\frac{", "a very long name of a class " * 4]) * 20
    ap = np.random.default_rng(0).random(120)
    ap[7] = np.nan
    evaluate.draw_classes(tmp_path / "ap.png", names, ap, np.where(np.isnan(ap), 0, 5))
    y = np.random.default_rng(0).integers(0, 60, (2, 400))
    evaluate.draw_confusion(tmp_path / "c.png", names[:60], *y)
    import matplotlib.image

    for figure, classes in (("ap.png", 60), ("c.png", 60)):
        assert matplotlib.image.imread(tmp_path / figure).shape[0] > 15 * classes  # pixels a line
