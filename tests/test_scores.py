"""evaluate.py: scores against scikit-learn and by hand, averaging against brute force, the table of results."""

import csv
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from conftest import AST, CNN, ROOT, TIMM_CNN, drawn, forked, in_ranks, inside, write_prepared
from scipy.stats import norm
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

import dataset
import evaluate
import models

pytestmark = pytest.mark.usefixtures("undrawn")
CPU = torch.device("cpu")
BASE = {"state", "format", "model"}

# ---------------------------------------------------------------------------------------------------------- scores


def test_multi_label_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.random((200, 9)) < rng.uniform(0.02, 0.5, 9)
    y[:, 3], y[:, 4] = False, True  # no positive, and no negative
    y[0, :3] = True
    p = (y * 0.3 + rng.random(y.shape)).round(2)  # with ties
    got = evaluate.scores(p, y, "multi-label")
    have = [c for c in range(9) if c != 3]
    assert got["mAP"] == pytest.approx(average_precision_score(y[:, have], p[:, have], average="macro"), abs=1e-12)
    both = [c for c in have if c != 4]
    auc = roc_auc_score(y[:, both], p[:, both], average="macro")
    assert got["mAUC"] == pytest.approx(auc, abs=1e-12)
    assert got["d_prime"] == pytest.approx(math.sqrt(2) * norm.ppf(auc), abs=1e-12)
    assert np.isnan(got["AP"][3]) and np.isnan(got["AUC"][[3, 4]]).all() and got["AP"][4] == 1
    assert got["accuracy"] == pytest.approx(np.mean([y[i, p[i].argmax()] for i in range(200)]))
    assert got["positives"].tolist() == y.sum(0).tolist()


def test_scores_by_hand():
    """Class 0: positives ranked 1 and 3 of 4: AP (1 + 2/3) / 2, 3 of 4 pairs in order. Class 1: AP 1/2 of rank 2, 2 of 3 pairs.
    Class 2 has no positive. The highest class is a label of clips 0 and 1."""
    p = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.6], [0.8, 0.9, 0.1], [0.85, 0.3, 0.95]])
    y = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    got = evaluate.scores(p, y, "multi-label")
    assert got["AP"][:2] == pytest.approx([5 / 6, 1 / 2]) and np.isnan(got["AP"][2])
    assert got["AUC"][:2] == pytest.approx([3 / 4, 2 / 3])
    assert got["mAP"] == pytest.approx(2 / 3) and got["mAUC"] == pytest.approx(17 / 24)
    assert got["d_prime"] == pytest.approx(0.775728, abs=1e-6)  # sqrt(2) times 0.548522, the normal quantile of 17/24
    assert got["accuracy"] == 2 / 4 and got["positives"].tolist() == [2, 1, 0]


def test_single_label_scores_from_indices_or_one_hot():
    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 5, 100), rng.dirichlet(np.ones(5), 100)
    got = evaluate.scores(p, y, "single-label")
    assert got["accuracy"] == accuracy_score(y, p.argmax(1))
    one_hot = evaluate.scores(p, np.eye(5)[y], "single-label")
    assert {k: got[k] for k in ("mAP", "mAUC", "accuracy")} == {k: one_hot[k] for k in ("mAP", "mAUC", "accuracy")}
    assert got["mAP"] == pytest.approx(average_precision_score(np.eye(5)[y], p, average="macro"))


def test_scores_of_what_cannot_be_scored():
    y = np.eye(4)
    for p, t, task in ((y * np.nan, y, "multi-label"), (y[:3], y, "multi-label"), (y, y, "regression")):
        with pytest.raises(ValueError):
            evaluate.scores(p, t, task)
    nothing = evaluate.scores(y, y * 0, "multi-label")
    assert math.isnan(nothing["mAP"]) and math.isnan(nothing["mAUC"]) and math.isnan(nothing["d_prime"])


# ----------------------------------------------------------------------------------------------- checkpoints' scores


def checkpoint(path, root, seed=0, name=CNN, mean=-8.0, std=2.5, fold=None, epoch=0, **meta):
    """A checkpoint for a prepared folder, with its own normalisation: random weights, batch norm statistics and counters, each
    epoch's a little away from those of epoch 0."""
    data = dataset.FbankDataset(root, "train", fold)
    torch.manual_seed(seed)
    model = models.build_model(name, len(data.classes), data.n_frames)
    state = model.state_dict()
    for key, value in state.items():
        if "running_var" in key:
            value.uniform_(0.5, 1.5)
        elif "running_mean" in key:
            value.normal_(std=0.1)
        elif key.endswith("num_batches_tracked"):
            value.fill_(10 * epoch)
    x = dataset.normalise(data.batch(range(len(data)))[0].float(), mean, std)
    head = model.mlp_head[1] if name == AST else model.head
    with torch.no_grad():  # logits of mean 0 and deviation 2: predictions that differ
        z = model.eval()(x)
        head.weight *= 2 / z.std(0)[:, None]
        head.bias.copy_(2 / z.std(0) * (head.bias - z.mean(0)))
    torch.manual_seed(1000 * seed + epoch)
    for value in state.values():
        if value.is_floating_point() and epoch:
            value *= 1 + 0.1 * torch.rand_like(value)
    meta = {"epoch": epoch, "val_score": None, "teachers": [], "sample_rate": 16000} | meta
    meta |= {"classes": data.classes, "task": data.task, "n_frames": data.n_frames, "mean": mean, "std": std}
    path.parent.mkdir(parents=True, exist_ok=True)
    models.save_checkpoint(path, model, data=str(root), args={"fold": fold, "seed": seed}, **meta)
    return path


def by_hand(path, root, split, fold=None, state=None):
    """Probabilities (N, C) and targets (N, C) of a checkpoint, one clip at a time, in numpy but for the network."""
    file = models.read_checkpoint(path)
    data = dataset.FbankDataset(root, split, fold)
    model = models.build_model(**file["model"])
    model.load_state_dict(state or file["state"])
    model.eval()
    found = []
    for i in range(len(data)):
        x = np.load(pathlib.Path(root) / "fbank-00000.npy")[data.rows[i]].astype(np.float32)
        x = (x - file["mean"]) / (2 * file["std"])
        with torch.no_grad():
            z = model(torch.from_numpy(x)[None].float())[0].double().numpy()
        found.append(1 / (1 + np.exp(-z)) if file["task"] == "multi-label" else np.exp(z) / np.exp(z).sum())
    y = np.array([[c in own for c in range(len(data.classes))] for own in data.labels.tolist()])
    return np.array(found), y


@pytest.mark.parametrize("task", ["multi-label", "single-label"])
def test_predictions_are_those_of_each_clip_alone(task, multi, folds, tmp_path):
    """The checkpoint's normalisation, in eval mode, sigmoid, or softmax over the classes, in the order of the table."""
    root, fold = (multi, None) if task == "multi-label" else (folds, 2)
    path = checkpoint(tmp_path / "best.pt", root, fold=fold)
    model, meta = models.load_checkpoint(path)
    model.train()
    data = dataset.FbankDataset(root, "eval", fold)
    p, y = evaluate.predict(model, data, CPU, meta["mean"], meta["std"], batch_size=5)
    expected, targets = by_hand(path, root, "eval", fold)
    np.testing.assert_allclose(p, expected, atol=1e-3)
    assert (y == targets).all() and p.shape == y.shape == (len(data), 3)
    assert np.ptp(expected, axis=0).min() > 0.2  # clips differ
    if task == "single-label":
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)


def written(folder, name="best", split="eval"):
    return json.loads((folder / f"metrics-{name}-{split}.json").read_text(), parse_constant=pytest.fail)


def test_scores_of_a_checkpoint_and_of_an_ensemble(multi, tmp_path):
    """Files against scikit-learn on predictions made by hand; an ensemble is the mean of probabilities; --split chooses."""
    paths = [checkpoint(tmp_path / f"cnn-s{s}" / "best.pt", multi, s, mean=-8.0 - s, val_score=0.25) for s in range(3)]
    output = inside("evaluate.py", "--ckpt", paths[0].parent)  # a run's folder is its best.pt
    inside("evaluate.py", "--ckpt", paths[0], "--split", "val")
    inside("evaluate.py", "--ckpt", *paths)
    single = {split: by_hand(paths[0], multi, split) for split in ("eval", "val")}
    for split, (p, y) in single.items():
        found = written(paths[0].parent, split=split)
        assert found["mAP"] == pytest.approx(average_precision_score(y, p, average="macro"), abs=1e-5)
        assert found["mAUC"] == pytest.approx(roc_auc_score(y, p, average="macro"), abs=1e-5)
        assert found["accuracy"] == pytest.approx(np.mean([y[i, p[i].argmax()] for i in range(len(y))]))
        assert found["clips"] == {"eval": 14, "val": 12}[split] and found["split"] == split
    found = written(paths[0].parent)
    assert (found["val_score"], found["seed"], found["fold"], found["model"]) == (0.25, 0, None, CNN)
    assert f"{100 * found['mAP']:.2f}" in output and f"14 clips of {multi} (eval)" in output
    p, y = np.mean([by_hand(path, multi, "eval")[0] for path in paths], axis=0), single["eval"][1]
    together = written(tmp_path / "ensemble-cnn")
    shutil.rmtree(tmp_path / "ensemble-cnn")
    with pytest.MonkeyPatch.context() as patch:  # from inside the run
        patch.chdir(tmp_path / "cnn-s0")
        assert "../ensemble-cnn/metrics" in inside("evaluate.py", "--ckpt", "best.pt", "../cnn-s1/best.pt", paths[2])
    assert written(tmp_path / "ensemble-cnn")["mAP"] == together["mAP"]
    assert together["mAP"] == pytest.approx(average_precision_score(y, p, average="macro"), abs=1e-5)
    assert together["checkpoints"] == [str(path) for path in paths] and together["mAP"] != pytest.approx(found["mAP"])
    rows = list(csv.reader((tmp_path / "ensemble-cnn" / "per_class-best-eval.csv").read_text().splitlines()))
    assert rows[0] == ["index", "class", "positives", "AP", "AUC"] and [r[1] for r in rows[1:]] == [
        "high",
        "low",
        "noise",
    ]
    ap = average_precision_score(y, p, average=None)
    assert [float(r[3]) for r in rows[1:]] == pytest.approx(list(ap), abs=1e-5)
    assert [int(r[2]) for r in rows[1:]] == y.sum(0).tolist()


@pytest.mark.parametrize("number", [0.125, np.float64(0.125), np.float32(0.125)])
def test_a_score_of_ones_own_is_printed_logged_and_saved_and_may_choose(multi, tmp_path, monkeypatch, number):
    scores = evaluate.scores
    monkeypatch.setattr(evaluate, "scores", lambda *a: scores(*a) | {"mine": number, "by_class": np.zeros(3)})
    monkeypatch.setitem(evaluate.MAIN_SCORE, "multi-label", "mine")
    run = tmp_path / "run-s0"
    line = ["--data", multi, "--model", CNN, "--pretrained", "no", "--epochs", 1, "--batch-size", 12, "--out", run]
    inside("train_teacher.py", *line)
    output = inside("evaluate.py", "--ckpt", run).split()
    assert output[output.index("mine") + 5] == "12.50" and written(run)["mine"] == 0.125
    assert json.loads((run / "log.jsonl").read_text())["val_mine"] == written(run)["val_score"] == 0.125
    assert "trained already" in inside("train_teacher.py", *line)
    inside("evaluate.py", "--average", run)
    assert models.read_checkpoint(run / "wa.pt")["val_score"] == 0.125


def test_a_checkpoint_is_scored_on_its_own_fold(folds, tmp_path):
    paths = [checkpoint(tmp_path / f"cnn-fold{k}-s0" / "best.pt", folds, fold=k) for k in (2, 3)]
    inside("evaluate.py", "--ckpt", paths[0])
    p, y = by_hand(paths[0], folds, "eval", 2)
    found = written(paths[0].parent)
    assert found["accuracy"] == accuracy_score(y.argmax(1), p.argmax(1)) and found["fold"] == 2 and found["clips"] == 16
    assert inside("evaluate.py", "--ckpt", *paths).startswith(
        f"error: {paths[1]} and {paths[0]} differ in classes or clips"
    )


def test_an_ensemble_is_of_the_same_clips_and_named_after_its_first(multi, toy, tmp_path):
    fewer = write_prepared(tmp_path / "fewer", {"train": 12, "eval": 9}, True)
    paths = [checkpoint(tmp_path / "exp" / "cnn-s0" / "best.pt", multi), tmp_path / "exp" / "ast-s0" / "best.pt"]
    checkpoint(paths[1], fewer, name=AST)
    assert "differ in classes or clips: they cannot be an ensemble" in inside("evaluate.py", "--ckpt", *paths)
    inside("evaluate.py", "--ckpt", *paths, "--data", multi)
    found = written(tmp_path / "exp" / "ensemble-cnn+ast")
    one = sum(p.numel() for p in models.load_checkpoint(paths[0])[0].parameters())
    assert (found["model"], found["params"]) == (CNN, one)


def test_other_data_and_other_lengths(multi, toy, tmp_path):
    """--data scores on another folder of the same classes; an AST's positions are resampled for longer clips."""
    longer = write_prepared(tmp_path / "longer", {"train": 4, "eval": 9}, True, n_frames=46)
    path = checkpoint(tmp_path / "ast-s0" / "best.pt", multi, name=AST)
    output = inside("evaluate.py", "--ckpt", path, "--data", longer)
    assert "30 frames" in output and "has 46: an AST's positions are resampled" in output
    model, meta = models.load_checkpoint(path, 46)
    p, y = evaluate.predict(model, dataset.FbankDataset(longer, "eval"), CPU, meta["mean"], meta["std"])
    assert written(path.parent)["mAP"] == pytest.approx(evaluate.scores(p, y, "multi-label")["mAP"])
    other = write_prepared(tmp_path / "other", {"train": 4, "eval": 4}, True, classes=("high", "cat", "noise"))
    error = inside("evaluate.py", "--ckpt", path, "--data", other)
    assert error.startswith("error: ") and "differ in classes (3 and 3), first: low and cat" in error


def test_a_perfect_score_and_a_class_without_positives(tmp_path, monkeypatch):
    """JSON has no infinity: d' of an AUC of 1 is null. What has no positive is named once and left out of the means."""
    root = write_prepared(tmp_path / "data", {"train": 6, "eval": 8}, True, labels=lambda rng: [int(rng.integers(2))])
    stats = dataset.read_json(root / "stats.json")
    dataset.write_json(root / "stats.json", stats | {"listed": {"eval": 20371}})
    path = checkpoint(tmp_path / "run" / "best.pt", root)
    y = dataset.FbankDataset(root, "eval").labels[:, 0]
    monkeypatch.setattr(evaluate, "predict", lambda *_, **__: (np.eye(3)[y] * 0.8, np.eye(3)[y]))
    output = inside("evaluate.py", "--ckpt", path)
    found = written(path.parent)
    assert (found["mAP"], found["mAUC"], found["d_prime"], found["classes_without_positives"]) == (1, 1, None, 1)
    assert output.count("without a positive in eval, neither learned nor scored there: 1 of 3 classes (noise)") == 1
    assert "8 of 20,371 listed clips" in output and found["listed"] == 20371  # copies of AudioSet lack clips


NAMES = ["Dog, barking", 'the "cat"', "two\nlines", "Träne – 犬", "plain"]


def test_class_names_of_every_kind_under_a_locale_that_is_not_utf8(tmp_path):
    root = write_prepared(tmp_path / "data", {"train": 9, "eval": 9}, True, classes=NAMES, labels=lambda rng: [3, 1])
    exp = tmp_path / os.fsdecode(b"exp\xe9")  # nor is it UTF-8
    path = checkpoint(exp / "run-s0" / "best.pt", root, name=TIMM_CNN)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import models, evaluate; ckpt, exp = sys.argv[2:]\n"
    code += "for a in (['--ckpt', ckpt], ['--summary', exp]): sys.argv = ['', *a]; models.command_line(evaluate.main)"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = {k: v for k, v in env.items() if k not in ("PYTHONIOENCODING", "LANG", "LC_CTYPE")}
    line = [sys.executable, "-c", code, str(ROOT), str(path), str(exp)]
    done = subprocess.run(line, check=False, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode()
    with open(path.with_name("per_class-best-eval.csv"), newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [r["class"] for r in rows] == NAMES and [r["positives"] for r in rows] == ["0", "9", "0", "9", "0"]
    assert written(path.parent)["clips"] == 9 and "run" in (exp / "summary.md").read_text(encoding="utf-8")


def test_data_that_nobody_may_write_to(multi):
    """A user who may read the data but not write there scores it; and is told where scores cannot be written."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        root = shutil.copytree(multi, folder / "data")
        path, other = (checkpoint(folder / name / "best.pt", root) for name in ("run", "locked"))
        for where, mode in ((folder, 0o755), (root, 0o555), (path.parent, 0o777), (other.parent, 0o555)):
            os.chmod(where, mode)

        def nobody():
            evaluate.draw_classes = lambda *_: None  # matplotlib and its fonts may lie where only root can read
            if os.getuid() == 0:  # who may write anywhere
                os.setuid(65534)

        code, output = forked("evaluate.py", "--ckpt", path, before=nobody)
        assert code == 0 and written(path.parent)["clips"] == 14, output
        code, output = forked("evaluate.py", "--ckpt", other, before=nobody)
        assert code == 1 and "error: " in output and f"{other.parent}, where the results go, is not writable" in output


# ------------------------------------------------------------------------------------------------ weight averaging


def trained(folder, root, epochs=4, average="val", keep=False, seed=0, fold=None):
    """A run's folder as training leaves it, with weights of other random numbers for each epoch."""
    for epoch in range(epochs + 1):
        checkpoint(folder / f"ep-{epoch:02d}.pt", root, seed, fold=fold, epoch=epoch)
    shutil.copy(folder / f"ep-{epochs:02d}.pt", folder / "last.pt")
    dataset.write_json(folder / "args.json", {"epochs": epochs, "average": average, "keep_epochs": keep})
    return folder


def mean_state(folder, epochs):
    states = [models.read_checkpoint(folder / f"ep-{e:02d}.pt")["state"] for e in epochs]
    last = states[-1]
    return {
        k: torch.stack([s[k].double() for s in states]).mean(0).float() if v.is_floating_point() else v
        for k, v in last.items()
    }


def left(folder):
    return sorted(p.name for p in folder.glob("*.pt"))


EPOCHS_OF_4 = [f"ep-{e:02d}.pt" for e in range(5)]


def test_average_weights_is_the_mean_with_counters_of_the_last(multi, tmp_path):
    folder = trained(tmp_path / "run", multi, 3)
    paths = [folder / f"ep-{e:02d}.pt" for e in (1, 2, 3)]
    got, expected = evaluate.average_weights(paths), mean_state(folder, (1, 2, 3))
    assert {v.dtype for v in got.values()} == {torch.float32, torch.int64} and any("running_var" in k for k in got)
    assert all(torch.allclose(got[k], v, atol=1e-7) for k, v in expected.items())
    assert {int(v) for k, v in got.items() if "tracked" in k} == {30}  # of the last file in the list
    same = evaluate.average_weights([paths[0]] * 3)
    assert all(torch.equal(same[k], v) for k, v in models.read_checkpoint(paths[0])["state"].items())


def test_the_average_is_the_best_suffix_on_validation(multi, tmp_path):
    """Against a search over all suffixes by hand; the best one on eval is another."""
    folder = trained(tmp_path / "run", multi, seed=6)
    found = {}
    for split in ("val", "eval"):
        for start in (1, 2, 3, 4):
            p, y = by_hand(folder / "ep-04.pt", multi, split, state=mean_state(folder, range(start, 5)))
            found[split, start] = average_precision_score(y, p, average="macro")
    best = {split: max((1, 2, 3, 4), key=lambda s: found[split, s]) for split in ("val", "eval")}
    assert 1 < best["val"] < 4 and best["val"] != best["eval"], found
    start, expected = best["val"], mean_state(folder, range(best["val"], 5))
    output = inside("evaluate.py", "--average", folder)
    assert f"epochs {start}-4 are best on val, mAP {100 * found['val', start]:.2f}" in output
    wa = models.read_checkpoint(folder / "wa.pt")
    assert wa["averaged"] == [start, 4] and wa["val_score"] == pytest.approx(found["val", start], abs=1e-6)
    assert all(torch.allclose(wa["state"][k].double(), v.double(), atol=1e-6) for k, v in expected.items())
    ours = models.read_checkpoint(folder / "last.pt")
    assert {k: wa[k] for k in ours.keys() - BASE - {"val_score"}} == {
        k: ours[k] for k in ours.keys() - BASE - {"val_score"}
    }
    assert left(folder) == ["last.pt", "wa.pt"]  # pruned


def test_a_fixed_start_needs_no_data_and_keeps_epochs_when_told(multi, tmp_path):
    """AudioSet's protocol: the table's epochs, and no choice."""
    root = shutil.copytree(multi, tmp_path / "data")
    folder = trained(tmp_path / "run", root, average=3)
    shutil.rmtree(root)
    expected = mean_state(folder, (3, 4))
    assert "epochs 3-4, as the recipe says" in inside("evaluate.py", "--average", folder, "--keep-epochs")
    wa = models.read_checkpoint(folder / "wa.pt")
    assert wa["averaged"] == [3, 4] and wa["val_score"] is None
    assert all(torch.allclose(wa["state"][k], v, atol=1e-7) for k, v in expected.items())
    assert left(folder) == [*EPOCHS_OF_4, "last.pt", "wa.pt"]
    settings = dataset.read_json(folder / "args.json")
    dataset.write_json(folder / "args.json", settings | {"keep_epochs": True})  # what training was told counts too
    inside("evaluate.py", "--average", folder)
    assert left(folder) == [*EPOCHS_OF_4, "last.pt", "wa.pt"]
    dataset.write_json(folder / "args.json", settings)
    inside("evaluate.py", "--average", folder)
    assert left(folder) == ["last.pt", "wa.pt"]


def test_a_recipe_without_averaging_prunes_only(folds, tmp_path):
    folder = trained(tmp_path / "run", folds, 2, average="off", fold=1)
    output = inside("evaluate.py", "--average", folder)
    assert "its recipe has no weight averaging" in output and f" ep-NN.pt of {folder}: --keep-epochs" in output
    assert left(folder) == ["last.pt"]


def test_an_average_that_was_killed_while_it_pruned_is_finished(multi, tmp_path):
    folder = trained(tmp_path / "run", multi, seed=6)
    inside("evaluate.py", "--average", folder, "--keep-epochs")
    whole = (folder / "wa.pt").read_bytes()
    for name in ("ep-00.pt", "ep-01.pt"):
        (folder / name).unlink()
    assert f"{folder} is averaged already" in inside("evaluate.py", "--average", folder)
    assert left(folder) == ["last.pt", "wa.pt"] and (folder / "wa.pt").read_bytes() == whole


def test_the_average_is_chosen_on_data_that_moved(multi, tmp_path):
    shutil.copytree(multi, tmp_path / "data")
    folder = trained(tmp_path / "run", tmp_path / "data", seed=6)
    (tmp_path / "data").rename(tmp_path / "moved")
    assert "is not a prepared folder" in inside("evaluate.py", "--average", folder)
    assert "are best on val" in inside("evaluate.py", "--average", folder, "--data", tmp_path / "moved")


def test_what_cannot_be_averaged(multi, tmp_path):
    folder = trained(tmp_path / "run", multi, average=1)
    (folder / "ep-02.pt").rename(folder / "away.pt")
    error = inside("evaluate.py", "--average", folder)
    assert error.startswith(f"error: {folder} lacks some of ep-01.pt to ep-04.pt")
    assert not (folder / "wa.pt").exists() and (folder / "ep-01.pt").exists()  # nothing is pruned
    (folder / "away.pt").rename(folder / "ep-02.pt")
    shutil.copy(folder / "ep-03.pt", folder / "last.pt")
    error = inside("evaluate.py", "--average", folder)
    assert error.startswith(f"error: {folder} is not trained to its last epoch (4)")
    error = inside("evaluate.py", "--average", tmp_path / "nothing")
    assert f"--average {tmp_path / 'nothing'}: no run's folder (it has no args.json)" in error
    assert left(folder) == ["ep-00.pt", "ep-01.pt", "ep-02.pt", "ep-03.pt", "ep-04.pt", "last.pt"]


def test_ranks_average_without_pruning_what_another_still_reads(multi, tmp_path):
    """Rank 1 reads slowly: rank 0 waits for it before it deletes."""
    folder = trained(tmp_path / "run", multi, average=1)
    expected, read = mean_state(folder, (1, 2, 3, 4)), models.read_checkpoint

    def slow(rank):
        if rank == 1:
            models.read_checkpoint = lambda path: (time.sleep(0.15), read(path))[1]

    found = in_ranks("evaluate.py", "--average", folder, before=slow)
    assert [code for code, _ in found] == [0, 0], found
    wa = read(folder / "wa.pt")["state"]
    assert all(torch.allclose(wa[k], v, atol=1e-7) for k, v in expected.items()) and left(folder) == [
        "last.pt",
        "wa.pt",
    ]
    assert found[0][1].count("wrote") == 1 and "wrote" not in found[1][1]


# --------------------------------------------------------------------------------------------------------- summary


def result(folder, run, ckpt, score, **more):
    """A metrics file as scoring writes it."""
    (folder / run).mkdir(exist_ok=True)
    content = {
        "task": "multi-label", "mAP": score, "mAUC": 0.9, "accuracy": score, "teachers": [], "model": "ast-tiny",
        "params": 5.4e6, "clips": 7, "fold": None, "seed": 0, "val_score": None,
    }  # fmt: skip
    (folder / run / f"metrics-{ckpt}-eval.json").write_text(json.dumps(content | more))


def table(folder, capsys):
    """-> its title, {run: {column: cell}}"""
    evaluate.summary(folder)
    text = (folder / "summary.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return text.splitlines()[0], {line[0]: dict(zip(lines[0][1:], line[1:])) for line in lines[2:]}


def test_summary_over_seeds(tmp_path, capsys):
    for seed, score in enumerate((0.50, 0.52, 0.54)):
        result(tmp_path, f"ast-tiny-s{seed}", "best", score, seed=seed, val_score=score + 0.02)
        result(tmp_path, f"ast-tiny-s{seed}", "wa", score + 0.01, seed=seed, val_score=0.9)
        result(tmp_path, f"ast-tiny-from-cnn-s{seed}", "best", score + 0.1, seed=seed, teachers=["cnn"], val_score=0.4)
    result(tmp_path, "ensemble-ast-tiny", "wa", 0.60, val_score=0.1)
    result(tmp_path, "one-s0", "last", 0.7)
    title, rows = table(tmp_path, capsys)
    assert "in percent, mean ± standard deviation over seeds" in title and "folds" not in title
    assert list(rows) == ["ast-tiny", "one", "ast-tiny-from-cnn"]  # without a teacher first
    assert rows["ast-tiny"] == {
        "student": "ast-tiny", "M params": "5.4", "teachers": "no KD", "runs": "3", "val": "54.0 ± 2.0",
        "best mAP": "52.0 ± 2.0", "averaged mAP": "53.0 ± 2.0", "ensemble mAP": "60.0", "last mAP": "-", "mAUC": "90.0 ± 0.0",
    }  # fmt: skip
    kd = rows["ast-tiny-from-cnn"]
    assert (kd["teachers"], kd["val"], kd["best mAP"], kd["averaged mAP"]) == ("cnn", "40.0 ± 0.0", "62.0 ± 2.0", "-")
    assert (rows["one"]["last mAP"], rows["one"]["best mAP"], rows["one"]["val"]) == ("70.0", "-", "-")


def test_summary_names_scores_of_an_earlier_epoch_and_runs_of_one_seed(tmp_path, capsys):
    for run, epoch, values in (
        ("old-s0", 1, (0.2, 0.6, 0.5)),
        ("new-s0", 2, (0.2, 0.6, 0.5)),
        ("folds-s0", 1, (None, None)),
    ):
        result(tmp_path, run, "best", 0.5, epoch=epoch)
        log = [{"epoch": e} | ({"val_score": v} if v else {}) for e, v in enumerate(values, 1)]
        (tmp_path / run / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in log))
    result(tmp_path, "old-s1", "best", 0.4)  # of seed 0, as the other
    evaluate.summary(tmp_path)
    said = capsys.readouterr().out
    assert said.count("score it again") == 2 and "new-s0" not in said
    for run, now in (("old-s0", 2), ("folds-s0", 2)):
        assert f"{tmp_path / run / 'metrics-best-eval.json'} is of epoch 1, and best.pt now of {now}" in said
    assert said.count("seed and fold of another run of the row 'old'") == said.count("seed and fold of another") == 1


def test_summary_over_folds_of_one_seed(tmp_path, capsys):
    """0.6, 0.7, 0.8: mean 70, deviation 10. Scored from last.pt, its accuracy is shown too."""
    for fold, score in ((1, 0.6), (2, 0.7), (3, 0.8)):
        result(tmp_path, f"cnn-fold{fold}-s0", "last", score, task="single-label", fold=fold, mAP=0.5, clips=6 + fold)
    title, rows = table(tmp_path, capsys)
    assert title.endswith("deviation over folds of the one seed") and "folds 1, 2, 3 (7-9 clips)" in title
    assert list(rows) == ["cnn"] and "val" not in rows["cnn"]
    assert (rows["cnn"]["runs"], rows["cnn"]["last accuracy"], rows["cnn"]["mAP"]) == ("3", "70.0 ± 10.0", "50.0 ± 0.0")


def test_summary_of_ensembles(tmp_path, capsys):
    """Of two settings over folds: one row. That of averaged weights counts, else that of the best epochs, else of the last."""
    for ckpt, less, shown in (("last", 0.4, "30.0 ± 14.1"), ("best", 0.3, "40.0 ± 14.1"), ("wa", 0, "70.0 ± 14.1")):
        for fold, score in ((1, 0.6), (2, 0.8)):
            name = f"ensemble-cnn-fold{fold}+ast-fold{fold}"
            result(tmp_path, name, ckpt, score - less, task="single-label", fold=fold)
        _, rows = table(tmp_path, capsys)
        assert list(rows) == ["cnn+ast"] and rows["cnn+ast"]["ensemble accuracy"] == shown


@drawn()
def test_the_curves_of_a_hundred_runs_have_room(tmp_path, capsys):
    """One of them is taught, whatever its name: its line is solid, as its log has the teacher's loss."""
    for i in range(100):
        result(tmp_path, f"efficientnet-b2--tau-{i}", "best", 0.5)
        entry = {"epoch": 1, "loss": 1.0, "val_score": 0.5} | ({"loss_d": 1.0} if i == 7 else {})
        (tmp_path / f"efficientnet-b2--tau-{i}" / "log.jsonl").write_text(json.dumps(entry) + "\n")
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        save = evaluate.save_figure
        patch.setattr(evaluate, "save_figure", lambda fig, *paths: (save(fig, *paths), figures.append(fig)))
        table(tmp_path, capsys)
    [ax] = figures[0].axes
    assert [line.get_linestyle() for line in ax.lines].count("-") == 1
    assert ax.get_position().height * figures[0].get_figheight() > 2.5  # inches


def test_summary_over_seeds_of_whole_cross_validations(tmp_path, capsys):
    """Seeds 0.5, 0.7 (mean 0.6), 0.6, 0.8 (0.7) and 0.8, 0.8 (0.8): mean 70, deviation 10; over all six runs it were 12.6. A
    seed with one fold of two is no cross-validation, and a setting of one seed has no deviation over seeds."""
    for seed, scores in enumerate(((0.5, 0.7), (0.6, 0.8), (0.8, 0.8), (0.1,))):
        for fold, score in enumerate(scores, 1):
            result(tmp_path, f"cnn-fold{fold}-s{seed}", "best", score, task="single-label", fold=fold, seed=seed)
    for fold, score in ((1, 0.6), (2, 0.8)):
        result(tmp_path, f"ast-fold{fold}-s0", "best", score, task="single-label", fold=fold)
        result(tmp_path, f"ensemble-cnn-fold{fold}", "best", score, task="single-label", fold=fold)
    title, rows = table(tmp_path, capsys)
    assert title.endswith("deviation over seeds, each a mean over its folds")
    assert (rows["cnn"]["runs"], rows["cnn"]["best accuracy"], rows["cnn"]["ensemble accuracy"]) == (
        "6",  # the seed that has fewer folds is left out
        "70.0 ± 10.0",
        "70.0",
    )
    assert rows["ast"]["best accuracy"] == "70.0"


def test_summary_of_nothing(tmp_path):
    assert inside("evaluate.py", "--summary", tmp_path).startswith(f"error: {tmp_path} holds no metrics-*-eval.json")


def test_of_damaged_scores_or_settings_only_that_file_is_to_be_removed(tmp_path):
    scores = tmp_path / "a-s0" / "metrics-best-eval.json"
    dataset.write_json(scores, {})
    with pytest.raises(ValueError, match=f"{re.escape(str(scores))} is damaged: restore it, or remove it and"):
        evaluate.summary(tmp_path)


@drawn()
def test_val_is_the_score_of_the_best_epoch(multi, tmp_path, capsys):
    flags = ["--model", CNN, "--pretrained", "no", "--epochs", 3, "--batch-size", 24, "--lr", 3e-3]
    run = tmp_path / "exp" / "cnn-s0"
    inside("train_teacher.py", "--data", multi, "--out", run, *flags)
    inside("evaluate.py", "--average", run)
    for name in ("best", "wa", "last"):
        inside("evaluate.py", "--ckpt", run / f"{name}.pt")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    _, rows = table(tmp_path / "exp", capsys)
    assert rows["cnn"]["val"] == f"{100 * max(e['val_mAP'] for e in log):.1f}"
    assert (tmp_path / "exp" / "summary.png").stat().st_size > 1000  # the curves of log.jsonl


def test_bench_prints_a_table_and_writes_it(tmp_path):
    here = {"before": lambda: os.chdir(tmp_path)}
    code, output = forked("bench.py", "--quick", "input", "scores", **here)
    assert code == 0, output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["quick"] and len(found["rows"]) == 4
    assert all(r["ours"] > 0 and r["what"] in output for r in found["rows"])
    peers = [r for r in found["rows"] if r["beside"]]
    assert len(peers) == 2 and all(r["ratio"] == pytest.approx(r["theirs"] / r["ours"]) for r in peers)
    code, output = forked("bench.py", "--quick", "nothing", **here)
    assert code == 2 and "unknown part nothing" in output
