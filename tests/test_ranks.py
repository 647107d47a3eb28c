"""torchrun with two gloo processes on the CPU: the same training and the same scores as one process."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, command, inside

TINY = ["--model", "ast-tiny", "--pretrained", "no", "--epochs", 2, "--batch-size", 12]


def torchrun(script, *args):
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / script),
        *map(str, args),
    ]
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=300)


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_two_ranks_train_and_score_like_one(multi, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    inside("train_teacher.py", "--data", multi, "--out", one, *TINY)
    done = torchrun("train_teacher.py", "--data", multi, "--out", two, *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch  2/2") == 1  # rank 0 alone speaks and writes
    for a, b in zip(log(one), log(two)):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert b["val_mAP"] == pytest.approx(a["val_mAP"], abs=0.05)
    command("evaluate.py", "--ckpt", one / "best.pt")
    alone = json.loads((one / "metrics-best-eval.json").read_text())
    done = torchrun("evaluate.py", "--ckpt", one / "best.pt")
    assert done.returncode == 0, done.stderr
    both = json.loads((one / "metrics-best-eval.json").read_text())
    assert both["clips"] == 14 and [both[k] for k in ("mAP", "mAUC")] == pytest.approx(
        [alone[k] for k in ("mAP", "mAUC")], abs=1e-6
    )
    kd = ["--data", multi, "--out", tmp_path / "kd", "--teacher", one / "best.pt", *TINY[:-1], 13]
    done = torchrun("distill.py", *kd)
    assert done.returncode == 0 and "rounded up to 14" in done.stdout, done.stderr


def test_an_error_of_one_rank_ends_all(multi, tmp_path):
    done = torchrun("train_teacher.py", "--data", multi, "--out", tmp_path / "x", "--fold", 7, *TINY)
    assert done.returncode != 0 and "has no fold 7" in done.stderr
