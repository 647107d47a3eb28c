"""Two gloo processes on the CPU: the same training and the same scores as one, and an end for all when one fails. They are forked
with torchrun's environment; one test starts torchrun itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import AST, CNN, ROOT, in_ranks, inside, write_prepared

import dataset
import distill  # noqa: F401  (imported once, not in every child)
import evaluate
import models
import train_teacher

pytestmark = pytest.mark.usefixtures("toy", "undrawn")
TINY = ["--pretrained", "no", "--epochs", 2, "--batch-size", 12]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(path):
    return models.read_checkpoint(path)["state"]


def logits(path, data):
    model, meta = models.load_checkpoint(path)
    x = torch.stack([data[i][0] for i in range(len(data))])
    with torch.no_grad():
        return model((x - meta["mean"]) / (2 * meta["std"]))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Clips that two processes cannot share alike: 51 / 13 / 7."""
    return write_prepared(tmp_path_factory.mktemp("uneven") / "data", {"train": 51, "val": 13, "eval": 7}, True)


@pytest.fixture(scope="module")
def teacher(uneven, toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("exp") / "teacher"
    inside("train_teacher.py", "--data", uneven, "--model", CNN, "--out", out, *TINY)
    return out / "best.pt"


def test_torchrun(multi, tmp_path):
    """The real thing: torchrun and the smallest real AST, against one process."""
    flags = ["--data", multi, "--model", "ast-tiny", *TINY[:2], "--epochs", 1, "--batch-size", 24, "--out"]
    line = [*map(str, [*TORCHRUN, ROOT / "train_teacher.py", *flags, tmp_path / "two"])]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch  1/1") == 1  # rank 0 alone prints and writes
    inside("train_teacher.py", *flags, tmp_path / "one")
    a, b = (log(tmp_path / k)[0] for k in ("one", "two"))
    assert b["loss"] == pytest.approx(a["loss"], abs=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    data = dataset.FbankDataset(multi, "eval")
    a, b = (logits(tmp_path / k / "last.pt", data) for k in ("one", "two"))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a parent's death is Linux's")
def test_a_killed_torchrun_leaves_nobody_in_the_folder(multi, tmp_path):
    flags = ["--data", multi, "--model", "ast-tiny", *TINY[:2], "--epochs", 99, "--out", tmp_path / "run"]
    line = [*map(str, [*TORCHRUN, ROOT / "train_teacher.py", *flags])]
    torchrun = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "ep-00.pt").exists():
        assert torchrun.poll() is None
        time.sleep(0.1)
    torchrun.kill()
    torchrun.wait()
    for _ in range(100):
        try:
            dataset.lock(tmp_path / "run")
            return dataset.unlock(tmp_path / "run")
        except ValueError:
            time.sleep(0.1)
    raise AssertionError("its processes go on without it")


def spying(folder):
    """Runs in each rank: keep what its model receives, and its weights after each epoch."""

    def before(rank):
        forward, finish, seen = models.AST.forward, train_teacher.finish_epoch, []

        def spied_forward(model, x, both=False, keep=None):
            if model.training:
                seen.append((x.clone(), keep))
            return forward(model, x, both, keep)

        def spied_finish(run, *args):
            finish(run, *args)
            n = len(run.history)
            torch.save((run.model.state_dict(), seen), folder / f"rank{rank}-{n}.pt")

        models.AST.forward, train_teacher.finish_epoch = spied_forward, spied_finish

    return before


@pytest.mark.parametrize("script", ["train_teacher.py", "distill.py"])
@pytest.mark.parametrize("flags", [["--batch-size", 13], ["--patchout", 3, 1]])
def test_two_ranks_of_an_ast_end_in_the_same_weights_as_one_process(script, flags, uneven, teacher, tmp_path):
    flags = ["--data", uneven, "--model", AST, *TINY, "--lr", 1e-3, *flags]
    flags += ["--teacher", teacher] if script == "distill.py" else []
    found = in_ranks(script, *flags, "--out", tmp_path / "two", before=spying(tmp_path))
    assert [code for code, _ in found] == [0, 0], found
    assert found[0][1].count("epoch  2/2") == 1 and "epoch  2/2" not in found[1][1]
    size = 14 if 13 in flags else 12
    assert ("--batch-size rounded up to 14, a multiple of the 2 processes" in found[0][1]) == (size == 14)
    one = [*flags, "--batch-size", size]
    inside(script, *one, "--out", tmp_path / "one")
    train, data = (dataset.FbankDataset(uneven, split) for split in ("train", "eval"))
    for epoch in (1, 2):
        (a, seen), (b, others) = (torch.load(tmp_path / f"rank{r}-{epoch}.pt") for r in (0, 1))
        assert all(torch.equal(a[k], b[k]) for k in a)  # the ranks do not drift apart
    ours, theirs = (logits(tmp_path / k / "last.pt", data) for k in ("one", "two"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for x, y in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert y["loss"] == pytest.approx(x["loss"], abs=1e-5) and y["val_mAP"] == pytest.approx(x["val_mAP"], abs=1e-6)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-3)
    # each rank saw its share of the very batches of one process, and the same patches
    line = [str(f) for f in one if f not in ("--teacher", teacher)]
    args = train_teacher.resolve(train_teacher.parser("").parse_args(line), train)
    batches = [b for e in (1, 2) for b in dataset.batches(train, args, e, torch.device("cpu"))]
    assert len(batches) == len(seen) == len(others)
    for (x, _, _, keep), (x0, keep0), (x1, keep1) in zip(batches, seen, others):
        assert torch.equal(x, torch.cat([x0, x1]))
        assert keep is keep0 is keep1 is None or torch.equal(keep, keep0) and torch.equal(keep, keep1)


def test_ranks_of_a_cnn_have_the_same_parameters(uneven, teacher, tmp_path):
    """Its batch norms see other clips in each rank, and stochastic depth draws otherwise: the gradient is still one."""
    flags = [
        "--data",
        uneven,
        "--model",
        CNN,
        "--out",
        tmp_path / "kd",
        "--teacher",
        teacher,
        teacher,
        *TINY,
        "--lr",
        1e-3,
    ]
    found = in_ranks("distill.py", *flags, before=spying(tmp_path))
    assert [code for code, _ in found] == [0, 0], found
    a, b = (torch.load(tmp_path / f"rank{r}-2.pt")[0] for r in (0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    val = dataset.FbankDataset(uneven, "val")  # each rank scored its share with the statistics that are saved
    for entry in log(tmp_path / "kd"):
        model, meta = models.load_checkpoint(tmp_path / "kd" / f"ep-{entry['epoch']:02d}.pt")
        p, y = evaluate.predict(model, val, torch.device("cpu"), meta["mean"], meta["std"])
        assert entry["val_mAP"] == pytest.approx(evaluate.scores(p, y, val.task)["mAP"], abs=1e-6)


def test_two_ranks_score_and_average_like_one(uneven, teacher, tmp_path):
    shutil.copytree(teacher.parent, tmp_path / "run")
    shutil.copytree(teacher.parent, tmp_path / "copy")
    inside("evaluate.py", "--ckpt", tmp_path / "copy" / "best.pt")
    assert [code for code, _ in in_ranks("evaluate.py", "--ckpt", tmp_path / "run" / "best.pt")] == [0, 0]
    alone, both = (dataset.read_json(tmp_path / k / "metrics-best-eval.json") for k in ("copy", "run"))
    assert both["clips"] == 7
    assert [both[k] for k in ("mAP", "mAUC")] == pytest.approx([alone[k] for k in ("mAP", "mAUC")], abs=1e-6)
    inside("evaluate.py", "--average", tmp_path / "copy")
    found = in_ranks("evaluate.py", "--average", tmp_path / "run")
    assert [code for code, _ in found] == [0, 0] and found[0][1].count("wrote") == 1, found
    a, b = (models.read_checkpoint(tmp_path / k / "wa.pt") for k in ("run", "copy"))
    assert a["averaged"] == b["averaged"] and all(torch.equal(a["state"][k], v) for k, v in b["state"].items())


def test_more_ranks_than_clips_to_score(tmp_path, multi, teacher):
    few = write_prepared(tmp_path / "few", {"train": 24, "val": 1, "eval": 2}, True)
    data = dataset.FbankDataset(few, "eval")
    model, meta = models.load_checkpoint(teacher)

    def before(rank):
        models.setup()
        p, y = evaluate.predict(model, data, torch.device("cpu"), meta["mean"], meta["std"])
        torch.save((torch.from_numpy(p), torch.from_numpy(y)), tmp_path / f"{rank}.pt")
        os._exit(0)

    assert [code for code, _ in in_ranks("evaluate.py", n=3, before=before)] == [0, 0, 0]
    p, y = evaluate.predict(model, data, torch.device("cpu"), meta["mean"], meta["std"])
    for r in range(3):  # every rank holds all of them, in the order of the clips
        ours, targets = torch.load(tmp_path / f"{r}.pt")
        torch.testing.assert_close(ours, torch.from_numpy(p), atol=1e-5, rtol=0)
        assert torch.equal(targets, torch.from_numpy(y))


# -------------------------------------------------------------------------------------------------------- one fails


def start(folder, *flags):
    return "train_teacher.py", "--data", folder, "--model", AST, *TINY, *flags


def test_an_error_of_all_ranks_is_an_error(multi, tmp_path):
    found = in_ranks(*start(multi, "--fold", 7, "--out", tmp_path / "x"))
    assert any(code == 1 and "error: " in output and "of --fold 7: it has" in output for code, output in found), found
    assert all(code for code, _ in found)


def test_an_error_of_one_rank_ends_it_at_once(multi, tmp_path):
    def before(rank):
        def broken(*_, **__):
            raise ValueError("this rank has a broken disk")

        if rank == 1:
            models.build_model = broken

    began = time.monotonic()
    found = in_ranks(*start(multi, "--out", tmp_path / "x"), before=before)
    assert found[1][0] == 1 and "error: this rank has a broken disk" in found[1][1], found
    assert found[0][0] and time.monotonic() - began < 60


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_whose_peer_died_does_not_wait_for_ever(multi, tmp_path, dies):
    def before(rank):
        record, steps = train_teacher.record, []

        def deadly(*args):
            steps.append(0)
            if rank == dies and len(steps) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return record(*args)

        train_teacher.record = deadly

    found = in_ranks(*start(multi, "--out", tmp_path / "x"), before=before, kill=False)
    assert found[dies][0] == -signal.SIGKILL and found[1 - dies][0] == 1, found


def test_a_loss_that_is_not_finite_in_one_rank_is_found(multi, tmp_path):
    def before(rank):
        augment, calls = dataset.augment, []

        def broken(*args):
            calls.append(0)
            return augment(*args) * (torch.nan if rank == 1 and len(calls) == 2 else 1)

        dataset.augment = broken

    found = in_ranks(*start(multi, "--out", tmp_path / "x"), before=before)
    assert any("not finite in epoch 1, step 1" in output for _, output in found), found
    assert not (tmp_path / "x" / "ep-01.pt").exists()


def test_machines_without_a_common_folder_are_an_error(multi, tmp_path):
    """Rank 0 finds a run to resume, rank 1, whose --out is elsewhere, finds none: they would wait for each other."""
    inside(*start(multi, "--out", tmp_path / "0"))
    args = dataset.read_json(tmp_path / "0" / "args.json")
    assert args["model"] == AST
    found = in_ranks(*start(multi), before=lambda rank: sys.argv.extend(["--out", str(tmp_path / str(rank))]))
    assert any(f"{tmp_path}/0/last.pt is not the same for all processes" in output for _, output in found), found
    other = tmp_path / "data"
    shutil.copytree(multi, other / "0")
    shutil.copytree(multi, other / "1")
    stats = dataset.read_json(other / "1" / "stats.json")
    dataset.write_json(other / "1" / "stats.json", stats | {"crc32": [v ^ 1 for v in stats["crc32"]]})
    line = ["train_teacher.py", "--model", AST, *TINY, "--out", tmp_path / "new"]
    found = in_ranks(*line, before=lambda rank: sys.argv.extend(["--data", str(other / str(rank))]))
    assert any("is not the same for all processes" in output for _, output in found), found
    dataset.write_json(other / "1" / "stats.json", stats)
    table = other / "1" / "clips.csv"  # cut by hand on one machine only
    table.write_text("\n".join(line for line in table.read_text().splitlines() if ",train-3," not in line) + "\n")
    found = in_ranks(*line, before=lambda rank: sys.argv.extend(["--data", str(other / str(rank))]))
    assert any("is not the same for all processes" in output for _, output in found), found


def test_sigterm_saves_the_step_and_the_ranks_resume_to_the_same_weights(multi, tmp_path):
    whole, cut = (start(multi, "--patchout", 3, 0, "--out", tmp_path / k) for k in ("whole", "cut"))
    assert [code for code, _ in in_ranks(*whole)] == [0, 0]

    def before(rank):
        record, steps = train_teacher.record, []

        def signalled(*args):
            steps.append(0)
            if len(steps) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return record(*args)

        train_teacher.record = signalled
        threading.Timer(60, os._exit, (77,)).start()  # rank 1 waits for rank 0, which ends

    found = in_ranks(*cut, before=before)
    assert found[0][0] == 143 and "stopped by SIGTERM" in found[0][1], found
    last = models.read_checkpoint(tmp_path / "cut" / "last.pt")
    assert (last["epoch"], len(last["log"])) == (1, 2)
    found = in_ranks(*cut)
    assert [code for code, _ in found] == [0, 0] and "epoch 2, step 2" in found[0][1], found
    a, b = (weights(tmp_path / k / "last.pt") for k in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = ([epoch["loss"] for epoch in log(tmp_path / k)] for k in ("whole", "cut"))
    assert b == pytest.approx(a)  # of both ranks, in the epoch that was interrupted too
