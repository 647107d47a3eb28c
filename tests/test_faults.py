"""Interruption and faults: kills at random moments, flipped bytes, full disks, locks, pre-emption, divergence.

`python -m pytest -q -m slow` runs the long versions of the first two.
"""

import fcntl
import io
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
import types

import numpy as np
import pytest
import torch
from conftest import TIMM_CNN as CNN  # flipped bits of a file of some size
from conftest import ended, forked, inside, write_clips

import dataset
import distill  # noqa: F401  (imported once, not in every child)
import evaluate
import models
import prep_data
import train_teacher

pytestmark = pytest.mark.usefixtures("undrawn")
TINY = ["--pretrained", "no", "--epochs", 3, "--batch-size", 6, "--keep-epochs"]


def small():
    """Runs in a child: shards of 8 clips, and last.pt in the middle of an epoch."""
    dataset.SHARD = prep_data.SHARD = 8
    prep_data.CHUNK, train_teacher.RESUME_SECONDS = 2, 0.05


def stages(folder):
    """The whole of a run below `folder`: command lines from a table of clips to averaged weights and their scores."""
    out, table = folder / "prepared", folder / "raw audio" / "clips.csv"
    a, b = folder / "teacher", folder / "student"
    data = ["--data", out, "--model", CNN, *TINY]
    yield "prep_data.py", ["csv", "--root", table, "--out", out, "--clip-seconds", 0.3, "--workers", 2]
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
    scored = dataset.read_json(folder / "student" / "metrics-wa-eval.json")
    found["scores"] = {k: v for k, v in scored.items() if k not in ("seconds", "checkpoints", "data")}
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, result, seconds of each stage) of a run that nobody interrupts."""
    folder, took = tmp_path_factory.mktemp("undisturbed"), []
    write_clips(folder / "raw audio", {"train": 30, "val": 8, "eval": 12}, True, seconds=0.3)
    for script, args in stages(folder):
        began = time.monotonic()
        code, output = forked(script, *args, before=small)
        assert code == 0, output
        took.append(time.monotonic() - began)
    return folder, result(folder), took


@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_same_commands_end_in_the_same_files(undisturbed, kills):
    """Each stage is killed (SIGKILL, the whole process group) at a moment drawn over its own time."""
    whole, want, took = undisturbed
    folder, rng, finished = whole.with_name(f"killed-{kills}"), random.Random(kills), 0
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
                    code, output = forked(script, *args, kill_after=rng.uniform(0.01, took[n]), before=small)
                    if code == -signal.SIGKILL:
                        break
                    assert code == 0, output
                    finished += 1  # before it was killed: it has to be done again
                    if "--out" in args:
                        shutil.rmtree(args[args.index("--out") + 1])
                for path in whole.glob("*/[!.]*.pt"):  # whatever stands under its name is whole
                    models.read_checkpoint(path)
            code, output = forked(script, *args, before=small)
            assert code == 0, output
        assert result(whole) == want
    finally:
        whole.rename(folder)
        aside.rename(whole)
    print(f"{5 * (kills // 5)} kills, {finished} times the end came first; 0 differences")


# what to run on a file with a flipped bit: it must be one sentence, or nothing may change but what an edit may
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
    "raw audio/clips.csv": ("prep_data.py", ["csv", "--root", "raw audio/clips.csv", "--out", "again", "--clip-seconds", 0.3]),
    "raw audio/audio/train 0.wav": ("prep_data.py", ["csv", "--root", "raw audio/clips.csv", "--out", "again", "--clip-seconds", 0.3]),
}  # fmt: skip


@pytest.mark.parametrize("flips", [3, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_flipped_bits_are_harmless_or_named(undisturbed, name, flips, tmp_path):
    whole, (script, args) = undisturbed[0], READERS[name]
    folder, rng = tmp_path / "copy", random.Random(name)
    shutil.copytree(whole, folder)
    args = args or [*map(str, list(stages(whole))[2][1])]
    good, failed = (folder / name).read_bytes(), 0
    scores = folder / "student" / "metrics-wa-eval.json"
    want = {k: dataset.read_json(scores)[k] for k in ("mAP", "mAUC", "accuracy", "clips")}
    for _ in range(flips):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(bad)
        shutil.rmtree(folder / "again", ignore_errors=True)
        local = [str(a).replace(str(whole), str(folder)) for a in args]
        if script == "evaluate.py" and "--ckpt" in local:
            local += ["--data", "prepared"]
        code, output = forked(script, *local, before=lambda: (os.chdir(folder), small()))
        assert code in (0, 1) and "Traceback" not in output, output
        errors = [line for line in output.splitlines() if "error: " in line]
        if code:
            failed += 1
            assert len(errors) == 1 and len(errors[0]) > 20, output
        elif name in ("prepared/clips.csv", "prepared/classes.csv"):
            assert f"{name} was edited after its preparation" in output, output
        elif name == "student/metrics-wa-eval.json":
            continue  # nothing guards the digits of a score
        elif "--ckpt" in local or "--summary" in local:
            assert {k: dataset.read_json(scores)[k] for k in want} == want, f"a silent wrong score: {output}"
        elif name.endswith("last.pt"):
            assert "trained already" in output
        elif script == "prep_data.py" and "--check" in local:
            assert "is sound" in output
    print(f"{name}: {flips} flips, {failed} errors, {flips - failed} harmless")
    if name.endswith((".pt", ".npy")):  # each byte of these has a checksum, but for what fills a zip up
        assert failed >= flips - max(1, flips // 5)


def limited(size):
    """Runs in a child: no file may grow beyond `size` bytes, as on a full disk."""

    def limit():
        small()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return limit


def test_a_full_disk_is_one_sentence_and_loses_nothing(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed[0] / "raw audio", folder / "raw audio")
    for script, args in list(stages(folder))[:4]:
        code, output = forked(script, *args, before=limited(30_000))
        assert code == 1 and "Traceback" not in output, output
        assert f"error: {folder}" in output and "could not be written" in output and "free some disk" in output, output
        code, output = forked(script, *args, before=small)
        assert code == 0, output  # after room was made
    assert not [p for p in folder.rglob("*") if ".tmp" in p.name]


@pytest.mark.parametrize("script", ["train_teacher.py", "distill.py"])
def test_a_disk_too_small_for_the_checkpoints_is_found_first(script, undisturbed, multi, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000))
    flags = ["--data", multi, "--model", CNN, *TINY, "--out", tmp_path / "run"]
    flags += ["--teacher", undisturbed[0] / "teacher" / "best.pt"] if script == "distill.py" else []
    output = inside(script, *flags)
    assert output.startswith("error: ") and "free, the checkpoints need" in output and "--out" in output
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_disk_that_had_room_for_a_run_has_room_for_its_rest(multi, tmp_path):
    run, size = tmp_path / "run", sum(v.nbytes for v in models.build_model(CNN, 3).state_dict().values())

    def before():
        """A disk for three epochs, ep-00, best, wa and twice last; a signal in step 3 of epoch 3."""
        record, steps = train_teacher.record, []
        used = lambda: sum(p.stat().st_size for p in run.glob("*.pt"))
        shutil.disk_usage = lambda _: types.SimpleNamespace(free=12 * size - used())
        train_teacher.record = lambda *a: (steps.append(0), setattr(a[0], "stop", len(steps) == 19), record(*a))

    for code in (143, 0):
        found, output = forked("train_teacher.py", "--data", multi, "--model", CNN, *TINY, "--out", run, before=before)
        assert found == code, output


def test_two_processes_on_one_folder(multi, tmp_path):
    for script, folder in (("train_teacher.py", tmp_path / "run"), ("prep_data.py", tmp_path / "prepared")):
        folder.mkdir()
        child, path = forked(
            "evaluate.py", wait=False, before=lambda folder=folder: (dataset.lock(folder), time.sleep(60))
        )
        try:
            args = ["--data", multi, "--model", CNN, *TINY, "--out", folder]
            if script == "prep_data.py":
                table = write_clips(tmp_path / "raw", {"train": 4, "eval": 4}, True)
                args = ["csv", "--root", table, "--out", folder]
            wait_until(lambda folder=folder: locked(folder))
            assert f"{folder} is in use by another process" in inside(script, *args)
        finally:
            os.kill(child, signal.SIGKILL)
            ended(child, path)
        assert not inside(script, *args).startswith("error")  # the lock went with its process


def test_a_lock_that_a_killed_process_is_about_to_lose_is_waited_for(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    timer = threading.Timer(0.3, os.close, (descriptor,))
    timer.start()
    dataset.lock(tmp_path)
    timer.join()
    dataset.unlock(tmp_path)


def locked(folder):
    try:
        dataset.lock(folder)
    except ValueError:
        return True
    dataset.unlock(folder)
    return False


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("script", ["train_teacher.py", "distill.py"])
def test_sigterm_saves_the_step_and_exits_143(script, undisturbed, multi, tmp_path):
    def before():
        """The signal comes in step 3 of epoch 2."""
        record, steps = train_teacher.record, []

        def signalled(*args):
            steps.append(0)
            if len(steps) == 11:
                os.kill(os.getpid(), signal.SIGTERM)
            return record(*args)

        train_teacher.record = signalled

    args = ["--data", multi, "--model", CNN, *TINY, "--out", tmp_path / "run"]
    args += ["--teacher", undisturbed[0] / "teacher" / "best.pt"] if script == "distill.py" else []
    code, output = forked(script, *args, before=before)
    assert code == 143 and "stopped by SIGTERM; the same command resumes" in output and "Traceback" not in output
    last = models.read_checkpoint(tmp_path / "run" / "last.pt")
    assert (last["epoch"], len(last["log"])) == (1, 3)


def test_sigterm_before_training_exits_143(multi, tmp_path):
    def before():
        dataset.FbankDataset.__init__ = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)

    code, output = forked("train_teacher.py", "--data", multi, "--model", CNN, "--out", tmp_path / "run", before=before)
    assert code == 143 and "stopped by SIGTERM" in output and "Traceback" not in output, output


def test_ctrl_c_is_one_line(multi, tmp_path):
    def before():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        train_teacher.record = lambda *_: os.kill(os.getpid(), signal.SIGINT)

    args = ["--data", multi, "--model", CNN, *TINY, "--out", tmp_path / "run"]
    code, output = forked("train_teacher.py", *args, before=before)
    assert code == 130 and "stopped by SIGINT; the same command resumes" in output and "Traceback" not in output, output


def test_ctrl_c_while_a_file_is_written_is_one_line(multi, tmp_path):
    """torch.save makes an error of its own of an exception in its stream."""

    class Stream(io.BytesIO):
        def write(self, block):
            os.kill(os.getpid(), signal.SIGINT)
            return super().write(block)

    def before():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        save, torch.save = torch.save, lambda content, _: save(content, Stream())

    args = ["--data", multi, "--model", CNN, *TINY, "--out", tmp_path / "run"]
    code, output = forked("train_teacher.py", *args, before=before)
    assert code == 130 and output.count("stopped by SIGINT") == 1 and "Traceback" not in output, output


@pytest.mark.parametrize("script", ["train_teacher.py", "distill.py"])
def test_divergence_stops_with_the_clips_and_keeps_what_was_good(script, undisturbed, multi, tmp_path, monkeypatch):
    flags = ["--data", multi, "--model", CNN, "--pretrained", "no", "--epochs", 3, "--batch-size", 12]
    flags += ["--teacher", undisturbed[0] / "teacher" / "best.pt"] if script == "distill.py" else []
    augment, calls = dataset.augment, []

    def broken(*args):  # the third step of the second epoch
        calls.append(0)
        return augment(*args) * (torch.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(dataset, "augment", broken)
    output = inside(script, *flags, "--out", tmp_path / "run")
    data = dataset.FbankDataset(multi, "train")
    clips = ", ".join(data.ids[i] for i in dataset.epoch_order(data, 0, 2, True)[24:36])
    assert output.startswith("error: ") and "epoch 2, step 2, at --lr 5.00e-04" in output
    assert f"(clips {clips})" in output and "--lr" in output
    last = models.read_checkpoint(tmp_path / "run" / "last.pt")  # which fails on weights that are not finite
    assert len(last["history"]) == 1 and not (tmp_path / "run" / "ep-02.pt").exists()


def test_what_is_not_finite_is_never_saved_in_the_middle_of_an_epoch(multi, tmp_path, monkeypatch):
    """A gradient that is not finite while the loss still is: the save after that very step finds it."""
    total_norm, calls = torch.nn.utils.get_total_norm, []

    def broken(gradients):
        calls.append(0)
        if len(calls) == 6:
            gradients[0].view(-1)[0] = torch.inf
        return total_norm(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", broken)
    monkeypatch.setattr(train_teacher, "RESUME_SECONDS", 0)
    output = inside("train_teacher.py", "--data", multi, "--model", CNN, *TINY, "--out", tmp_path / "run")
    assert "not finite in epoch 1, step 5" in output
    last = models.read_checkpoint(tmp_path / "run" / "last.pt")
    assert len(last["log"]) == 5 and last["log"].isfinite().all()


def test_weights_that_are_not_finite_are_never_averaged_or_scored(undisturbed, tmp_path):
    model, meta = models.load_checkpoint(undisturbed[0] / "student" / "ep-02.pt")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = np.nan
    models.save_checkpoint(tmp_path / "nan.pt", model, **meta)
    for use in (lambda p: evaluate.average_weights([p]), models.load_checkpoint):
        with pytest.raises(ValueError, match=r"not finite.*diverged"):
            use(tmp_path / "nan.pt")
