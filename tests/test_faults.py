"""Interruption and faults: kills at random moments, flipped bytes, full disks, locks, pre-emption, divergence.

`python -m pytest -q -m slow` runs the long versions of the first two.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, command, inside, write_clips

import distill
import evaluate
import models
import prep_data
import train_teacher

CNN = "timm:mobilenetv3_small_050"
TINY = ["--pretrained", "no", "--epochs", 3, "--batch-size", 6, "--keep-epochs"]
MAIN = {m.__name__ + ".py": m.main for m in (prep_data, train_teacher, distill, evaluate)}


def forked(script, args, kill_after=None, before=lambda: None):
    """Run a script in a forked process, which saves its imports: -> (exit code, what it wrote). Killed with all its
    children after `kill_after` s, if it still runs."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads: none of this process's holds a lock
        child = os.fork()
    if not child:
        os.close(read)
        os.setpgid(0, 0)
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv, prep_data.SHARD, prep_data.CHUNK, train_teacher.RESUME_SECONDS = [script, *map(str, args)], 8, 2, 0.05
        code = 70
        try:
            if kill_after is not None:
                threading.Timer(kill_after, os.killpg, (0, signal.SIGKILL)).start()
            before()
            models.command_line(MAIN[script])
            code = 0
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with open(read, errors="replace") as f:
        said = f.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def stages(folder):
    """The whole of a run below `folder`: command lines from a table of clips to averaged weights and their scores."""
    out, table = folder / "prepared", folder / "raw audio" / "clips.csv"
    a, b = folder / "teacher", folder / "student"
    data = ["--data", out, "--model", CNN, *TINY]
    yield "prep_data.py", ["csv", "--root", table, "--out", out, "--clip-seconds", 1, "--workers", 2]
    yield "train_teacher.py", [*data, "--out", a]
    yield "distill.py", [*data, "--out", b, "--teacher", a / "best.pt", "--seed", 1]
    yield "evaluate.py", ["--average", b, "--keep-epochs"]
    yield "evaluate.py", ["--ckpt", b / "wa.pt"]


def result(folder):
    """What must not depend on interruptions: the prepared bytes, all weights, the log but its times, the scores."""
    found = {p.name: p.read_bytes() for p in (folder / "prepared").iterdir()}
    for path in sorted(folder.glob("*/*.pt")):
        file = models.read_checkpoint(path)
        found[path.relative_to(folder)] = {k: v.numpy().tobytes() for k, v in file["state"].items()}
    for path in folder.glob("*/log.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        timing = ("seconds", "clips_per_second", "peak_gib")
        found[path.relative_to(folder)] = [{k: v for k, v in e.items() if k not in timing} for e in lines]
    scored = prep_data.read_json(folder / "student" / "metrics-wa-eval.json")
    found["scores"] = {k: v for k, v in scored.items() if k not in ("seconds", "checkpoints", "data")}
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, result, seconds of each stage) of a run that nobody interrupts."""
    folder, took = tmp_path_factory.mktemp("undisturbed"), []
    write_clips(folder / "raw audio", {"train": 30, "val": 8, "eval": 12}, True)
    for script, args in stages(folder):
        began = time.monotonic()
        code, said = forked(script, args)
        assert code == 0, said
        took.append(time.monotonic() - began)
    return folder, result(folder), took


@pytest.mark.parametrize("kills", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_same_commands_end_in_the_same_files(undisturbed, kills):
    """Each stage is killed (SIGKILL, the whole process group) again and again, at a moment drawn over its own time."""
    whole, want, took = undisturbed
    folder, rng, ended = whole.with_name(f"killed-{kills}"), random.Random(kills), 0
    folder.mkdir()
    shutil.copytree(whole / "raw audio", folder / "raw audio")
    # the table names clips relative to itself, but a prepared folder holds their full paths: give both runs one place
    aside = whole.with_name(f"aside-{kills}")
    whole.rename(aside)
    folder.rename(whole)
    try:
        for n, (script, args) in enumerate(stages(whole)):
            for _ in range(kills // 5):
                while True:
                    code, said = forked(script, args, kill_after=rng.uniform(0.01, took[n]))
                    if code == -signal.SIGKILL:
                        break
                    assert code == 0, said
                    ended += 1  # before it was killed: it has to be done again
                    if "--out" in args:
                        shutil.rmtree(args[args.index("--out") + 1])
                for path in whole.glob("*/[!.]*.pt"):  # whatever stands under its name is whole
                    models.read_checkpoint(path)
            code, said = forked(script, args)
            assert code == 0, said
        assert result(whole) == want
    finally:
        whole.rename(folder)
        aside.rename(whole)
    print(f"{5 * (kills // 5)} kills, {ended} times the end came first; 0 differences")


# what to run on a file with a flipped byte: it must be refused in one sentence, or nothing may change
READERS = {
    "student/wa.pt": ("evaluate.py", ["--ckpt", "student/wa.pt"]),
    "student/last.pt": ("distill.py", None),
    "prepared/stats.json": ("evaluate.py", ["--ckpt", "student/wa.pt"]),
    "prepared/clips.csv": ("evaluate.py", ["--ckpt", "student/wa.pt"]),
    "prepared/classes.csv": ("evaluate.py", ["--ckpt", "student/wa.pt"]),
    "prepared/fbank-00000.npy": ("prep_data.py", ["--check", "prepared"]),
    "student/args.json": ("evaluate.py", ["--average", "student", "--keep-epochs"]),
    "student/log.jsonl": ("evaluate.py", ["--summary", "."]),
    "student/metrics-wa-eval.json": ("evaluate.py", ["--summary", "."]),
    "raw audio/clips.csv": ("prep_data.py", ["csv", "--root", "raw audio/clips.csv", "--out", "again", "--clip-seconds", 1]),
    "raw audio/audio/train 0.wav": ("prep_data.py", ["csv", "--root", "raw audio/clips.csv", "--out", "again", "--clip-seconds", 1]),
}  # fmt: skip


@pytest.mark.parametrize("flips", [6, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_flipped_bytes_are_harmless_or_refused(undisturbed, name, flips, tmp_path):
    whole, (script, args) = undisturbed[0], READERS[name]
    folder, rng = tmp_path / "copy", random.Random(name)
    shutil.copytree(whole, folder)
    args = args or [*map(str, list(stages(whole))[2][1])]
    good, refused = (folder / name).read_bytes(), 0
    scores = folder / "student" / "metrics-wa-eval.json"
    want = {k: prep_data.read_json(scores)[k] for k in ("mAP", "mAUC", "accuracy", "clips")}
    for _ in range(flips):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(bad)
        shutil.rmtree(folder / "again", ignore_errors=True)
        local = [str(a).replace(str(whole), str(folder)) for a in args]
        if script == "evaluate.py" and "--ckpt" in local:
            local += ["--data", "prepared"]
        code, said = forked(script, local, before=lambda: os.chdir(folder))
        assert code in (0, 1) and "Traceback" not in said, said
        errors = [line for line in said.splitlines() if "error: " in line]
        if code:
            refused += 1
            assert len(errors) == 1 and len(errors[0]) > 20, said
        elif "--ckpt" in local or "--summary" in local:
            assert {k: prep_data.read_json(scores)[k] for k in want} == want, f"a silent wrong score: {said}"
        elif name.endswith("last.pt"):
            assert "trained already" in said
        elif script == "prep_data.py" and "--check" in local:
            assert "is sound" in said
    print(f"{name}: {flips} flips, {refused} refused, {flips - refused} harmless")
    assert refused or flips < 10 or name.startswith("raw audio")


def limited(size):
    """Runs in a child: no file may grow beyond `size` bytes, as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return limit


def test_a_full_disk_is_one_sentence_and_loses_nothing(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed[0] / "raw audio", folder / "raw audio")
    lines = list(stages(folder))
    for script, args in lines[:4]:
        code, said = forked(script, args, before=limited(60_000))
        assert code == 1 and "Traceback" not in said and f"the disk of {folder}" in said, said
        assert forked(script, args)[0] == 0  # after room was made
    assert not [p for p in folder.rglob("*") if ".tmp" in p.name]


def test_two_processes_on_one_folder(multi, tmp_path):
    for script, folder in (("train_teacher.py", tmp_path / "run"), ("prep_data.py", tmp_path / "prepared")):
        folder.mkdir()
        prep_data.lock(folder)
        try:
            args = ["--data", multi, "--model", CNN, *TINY, "--out", folder]
            if script == "prep_data.py":
                table = write_clips(tmp_path / "raw", {"train": 4, "eval": 4}, True)
                args = ["csv", "--root", table, "--out", folder]
            assert f"{folder} is in use by another process" in command(script, *args, ok=False)
        finally:
            prep_data.unlock(folder)


def test_sigterm_saves_the_step_and_exits_143(multi, tmp_path):
    args = ["--data", multi, "--model", CNN, *TINY[:2], "--epochs", 400, "--batch-size", 6, "--out", tmp_path / "run"]
    line = [sys.executable, str(ROOT / "train_teacher.py"), *map(str, args)]
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "epoch  2/400" not in (said := run.stdout.readline()):
        assert said, run.stderr.read()
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 143 and "stopped by SIGTERM" in errors and "Traceback" not in errors
    last = models.read_checkpoint(tmp_path / "run" / "last.pt")
    assert last["epoch"] >= 2 and last["step"] > 0  # in the middle of an epoch


def test_sigterm_of_the_preparation(tmp_path):
    table = write_clips(tmp_path / "raw", {"train": 300, "eval": 30}, True)
    line = [sys.executable, str(ROOT / "prep_data.py"), "csv", "--root", str(table), "--out", str(tmp_path / "p"), "--workers", "1"]  # fmt: skip
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "p" / ".fbank-00000.npy").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 143 and "stopped by SIGTERM" in errors and "Traceback" not in errors


def test_divergence_stops_with_the_clips_and_keeps_what_was_good(multi, tmp_path, monkeypatch):
    flags = ["--data", multi, "--model", CNN, "--pretrained", "no", "--epochs", 3, "--batch-size", 12]
    augment, calls = prep_data.augment, []

    def broken(*args):  # the third step of the second epoch
        calls.append(0)
        return augment(*args) * (torch.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(prep_data, "augment", broken)
    said = inside("train_teacher.py", *flags, "--out", tmp_path / "run")
    order = train_teacher.epoch_order(prep_data.FbankDataset(multi, "train"), 0, 2, True)
    clips = ", ".join(prep_data.FbankDataset(multi, "train").ids[i] for i in order[24:36])
    assert (
        said.startswith("error: ")
        and "epoch 2, step 2, at learning rate 5.00e-04" in said
        and f"(clips {clips})" in said
    )
    last = models.read_checkpoint(tmp_path / "run" / "last.pt")  # which refuses weights that are not finite
    assert len(last["history"]) == 1 and not (tmp_path / "run" / "ep-02.pt").exists()


def test_weights_that_are_not_finite_are_never_averaged_or_scored(undisturbed, tmp_path):
    model, meta = models.load_checkpoint(undisturbed[0] / "student" / "ep-02.pt")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = np.nan
    meta = {k: v for k, v in meta.items() if k not in ("format", "model")}
    models.save_checkpoint(tmp_path / "nan.pt", model, **meta)
    for use in (lambda p: evaluate.average_weights([p]), models.load_checkpoint):
        with pytest.raises(ValueError, match="not finite.*diverged"):
            use(tmp_path / "nan.pt")
