"""evaluate.py: scores against scikit-learn, averaging against brute force."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, inside
from scipy.stats import norm
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

import evaluate
import models


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


def test_single_label_scores_from_indices_or_one_hot():
    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 5, 100), rng.dirichlet(np.ones(5), 100)
    got = evaluate.scores(p, y, "single-label")
    assert got["accuracy"] == accuracy_score(y, p.argmax(1))
    one_hot = evaluate.scores(p, np.eye(5)[y], "single-label")
    assert {k: got[k] for k in ("mAP", "mAUC", "accuracy")} == {k: one_hot[k] for k in ("mAP", "mAUC", "accuracy")}
    assert got["mAP"] == pytest.approx(average_precision_score(np.eye(5)[y], p, average="macro"))


def test_scores_refuse_what_they_cannot_score():
    y = np.eye(4)
    for p, t, task in ((y * np.nan, y, "multi-label"), (y[:3], y, "multi-label"), (y, y, "regression")):
        with pytest.raises(ValueError):
            evaluate.scores(p, t, task)


def checkpoint(path, seed, counter):
    torch.manual_seed(seed)
    model = models.build_model("timm:mobilenetv3_small_050", 3, 100)
    state = {
        k: torch.randn(v.shape) if v.is_floating_point() else torch.tensor(counter)
        for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    models.save_checkpoint(path, model, epoch=seed)
    return path


def test_average_weights_is_the_mean_with_counters_of_the_last(tmp_path):
    paths = [checkpoint(tmp_path / f"{i}.pt", i, 10 - i) for i in range(3)]
    states = [models.read_checkpoint(p)["state"] for p in paths]
    got = evaluate.average_weights(paths)
    assert any("running_var" in k for k in got)
    for key, value in got.items():
        if value.is_floating_point():
            mean = torch.stack([s[key].double() for s in states]).mean(0)
            assert torch.allclose(value.double(), mean, atol=1e-7) and value.dtype == torch.float32
        else:
            assert value == 8  # of the last file in the list
    same = evaluate.average_weights([paths[0]] * 3)
    assert all(torch.equal(same[k], v) for k, v in states[0].items())


def test_summary_reads_every_run(tmp_path, capsys):
    def result(run, ckpt, score, **more):
        (tmp_path / run).mkdir(exist_ok=True)
        base = {
            "task": "multi-label",
            "mAP": score,
            "mAUC": 0.9,
            "accuracy": 0.1,
            "teachers": [],
            "model": "ast-tiny",
            "params": 5.4e6,
            "clips": 7,
            "fold": None,
            "seed": 0,
        }
        (tmp_path / run / f"metrics-{ckpt}-eval.json").write_text(json.dumps(base | more))

    for seed, score in enumerate((0.50, 0.52, 0.54)):
        result(f"ast-tiny-s{seed}", "best", score)
        result(f"ast-tiny-s{seed}", "wa", score + 0.01)
        result(f"ast-tiny-from-cnn-s{seed}", "best", score + 0.1, teachers=["cnn"])
    result("ensemble-ast-tiny", "wa", 0.60)
    evaluate.summary(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert text in capsys.readouterr().out
    rows = {
        line.split("|")[1].strip(): [v.strip() for v in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["ast-tiny"] == ["ast-tiny", "5.4", "no KD", "3", "52.0 ± 2.0", "53.0 ± 2.0", "60.0", "90.0 ± 0.0"]
    assert rows["ast-tiny-from-cnn"][2:5] == ["cnn", "3", "62.0 ± 2.0"]


def test_a_class_without_positives_is_said_once_and_left_out(tmp_path):
    rows = [f"{i}.wav,{'abc'[i % 3]},train" for i in range(9)] + [f"{i}.wav,{'ab'[i % 2]},val" for i in range(9, 13)]
    rows += [f"{i}.wav,{'ab'[i % 2]};b,eval" for i in range(13, 19)]
    for i in range(19):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).standard_normal(8000) / 9, 16000)
    (tmp_path / "t.csv").write_text("path,labels,split\n" + "\n".join(rows) + "\n")
    inside(
        "prep_data.py",
        "csv",
        "--root",
        tmp_path / "t.csv",
        "--out",
        tmp_path / "p",
        "--clip-seconds",
        0.5,
        "--workers",
        1,
    )
    flags = ["--model", "timm:mobilenetv3_small_050", "--pretrained", "no", "--epochs", 2, "--batch-size", 4]
    said = inside("train_teacher.py", "--data", tmp_path / "p", "--out", tmp_path / "run", *flags)
    assert said.count("without a positive in val, left out of macro scores: 1 of 3 classes (c)") == 1
    said = inside("evaluate.py", "--ckpt", tmp_path / "run" / "best.pt")
    assert said.count("without a positive in eval, left out of macro scores: 1 of 3 classes (c)") == 1
    found = json.loads((tmp_path / "run" / "metrics-best-eval.json").read_text())
    assert found["classes_without_positives"] == 1 and np.isfinite(found["mAP"])


def test_bench_prints_a_table_and_writes_it(tmp_path):
    line = [sys.executable, ROOT / "tests" / "bench.py", "--quick", "input", "scores"]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["quick"] and len(found["rows"]) == 4
    assert all(r["ours"] > 0 and r["what"] in done.stdout for r in found["rows"])
    peers = [r for r in found["rows"] if r["beside"]]
    assert len(peers) == 2 and all(r["ratio"] == pytest.approx(r["theirs"] / r["ours"]) for r in peers)
    done = subprocess.run([*line, "nothing"], check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2 and "unknown part nothing" in done.stderr
