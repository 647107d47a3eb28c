"""torchrun with two gloo processes on the CPU: the same training and the same scores as one process."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command, inside

import models
import prep_data

TINY = ["--model", "ast-tiny", "--pretrained", "no", "--epochs", 2, "--batch-size", 12]


def torchrun(*args, flag=None):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line += [flag, *args] if flag else [ROOT / args[0], *args[1:]]
    return subprocess.run(list(map(str, line)), check=False, capture_output=True, text=True, timeout=300)


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
    assert done.returncode == 0 and done.stdout.count("rounded up to 14") == 1, done.stderr
    shutil.copytree(two, tmp_path / "copy")
    done = torchrun("evaluate.py", "--average", two)
    assert done.returncode == 0 and done.stdout.count("are best on val") == done.stdout.count("wrote") == 1, done.stderr
    inside("evaluate.py", "--average", tmp_path / "copy")
    a, b = (models.read_checkpoint(run / "wa.pt") for run in (two, tmp_path / "copy"))
    assert a["averaged"] == b["averaged"] and all(torch.equal(a["state"][k], v) for k, v in b["state"].items())


def test_an_error_of_one_rank_ends_all(multi, tmp_path):
    done = torchrun("train_teacher.py", "--data", multi, "--out", tmp_path / "x", "--fold", 7, *TINY)
    assert done.returncode != 0 and "has no fold 7" in done.stderr


def test_machines_without_a_common_folder_are_refused(multi, tmp_path):
    """Rank 0 finds a run to go on from, rank 1, whose --out is elsewhere, finds none: they would wait for each other."""
    flags = f"--data '{multi}' {' '.join(map(str, TINY))}"
    inside("train_teacher.py", "--data", multi, "--out", tmp_path / "0", *TINY)
    line = f"{sys.executable} '{ROOT}/train_teacher.py' {flags} --out '{tmp_path}/'$RANK"
    done = torchrun("bash", "-c", line, flag="--no-python")
    assert done.returncode != 0 and f"{tmp_path}/0/last.pt is not the same for all processes" in done.stderr
    other = tmp_path / "data"
    shutil.copytree(multi, other / "0")
    shutil.copytree(multi, other / "1")
    stats = prep_data.read_json(other / "1" / "stats.json")
    prep_data.write_json(other / "1" / "stats.json", stats | {"crc32": [v ^ 1 for v in stats["crc32"]]})
    line = f"{sys.executable} '{ROOT}/train_teacher.py' --out '{tmp_path}/new' {' '.join(map(str, TINY))} --data '{other}/'$RANK"
    done = torchrun("bash", "-c", line, flag="--no-python")
    assert done.returncode != 0 and f"{other}/0 is not the same for all processes" in done.stderr


@pytest.fixture
def running(multi, tmp_path):
    """Two ranks in training: (torchrun, {rank: its process id}), after the first epoch."""
    out = tmp_path / "run"
    flags = ["--model", "timm:mobilenetv3_small_050", "--pretrained", "no", "--epochs", 500, "--batch-size", 12]
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train_teacher.py"]
    line = [sys.executable, *map(str, [*line, "--data", multi, "--out", out, *flags])]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        while "epoch  1/500" not in (said := run.stdout.readline()):
            assert run.poll() is None, said
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                inside_it = (folder / "environ").read_bytes().split(b"\0")
                if str(out).encode() in (folder / "cmdline").read_bytes():
                    found |= {r: int(folder.name) for r in (0, 1) if f"RANK={r}".encode() in inside_it}
            except OSError:
                continue
        assert len(found) == 2
        yield run, found
        run.kill()


def test_a_dead_rank_ends_the_run(running):
    run, ranks = running
    os.kill(ranks[1], signal.SIGKILL)
    said, _ = run.communicate(timeout=60)
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in said


def test_sigterm_to_torchrun_saves_the_step(running, tmp_path):
    run, _ = running
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode != 0 and "stopped by SIGTERM; the same command goes on" in said
    assert models.read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] >= 1
