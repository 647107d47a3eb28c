"""train_teacher.py: the recipe table, the schedules, whole tiny runs, and runs that were interrupted."""

import argparse
import ast
import copy
import csv
import importlib
import itertools
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import AST, CNN, ROOT, TIMM_CNN, command, forked, inside, write_prepared
from sklearn.metrics import average_precision_score, roc_auc_score

import dataset
import evaluate
import models
import train_teacher

pytestmark = pytest.mark.usefixtures("toy", "undrawn")
TINY = ["--pretrained", "no", "--epochs", 2, "--batch-size", 12]


def weights(path):
    return models.read_checkpoint(path)["state"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(run):
    """The epochs of a run, without what a clock says."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("seconds", "clips_per_second", "peak_gib")} for e in lines]


# ---------------------------------------------------------------------------------------------------- the recipe table


class Fake:
    """Stands for the training split of a data set of a given source."""

    root, classes, labels = pathlib.Path("fake"), ["a", "b"], np.array([[0], [1]])

    def __init__(self, source, task, n, n_frames=1000, has_val=True):
        self.source, self.task, self.n, self.n_frames, self.has_val = source, task, n, n_frames, has_val

    def __len__(self):
        return self.n


FSD = Fake("fsd50k", "multi-label", 36796)
FULL = Fake("audioset", "multi-label", 2_000_000, has_val=False)
BAL = Fake("audioset", "multi-label", 20_000, has_val=False)
ESC = Fake("esc50", "single-label", 1600, 500, has_val=False)
ESC10 = Fake("esc10", "single-label", 320, 500, has_val=False)
DEMO = Fake("demo", "multi-label", 240, 200)
CNNS, ASTS = ("efficientnet-b2", "densenet-121", "hybrid-b0", "timm:resnet10t"), ("ast-tiny", "ast-base")


def settings(*flags, data):
    return train_teacher.resolve(train_teacher.parser("").parse_args(["--data", "x", *map(str, flags)]), data)


def halved(flat, every, epochs):
    return [0.5 ** max(0, -(-(e - flat) // every)) for e in range(1, epochs + 1)]


# Table 2 as PAPER.md prints it: lr, batch, epochs, warmup, factor of each epoch, mixup, balancing, frequency and time mask, averaging
WANT = {
    ("fsd50k", "cnn"): (FSD, [], 5e-4, 24, 50, 1000, "plateau", 0.5, True, 48, 192, "val"),
    ("fsd50k", "ast"): (FSD, [], 5e-5, 12, 50, 1000, "plateau", 0.5, True, 48, 192, "val"),
    ("audioset", "cnn"): (FULL, [], 1e-4, 120, 30, 1000, halved(10, 5, 30), 0.5, True, 48, 192, 16),
    ("audioset", "ast"): (FULL, [], 1e-5, 12, 5, 1000, [1, 1, 0.5, 0.25, 0.125], 0.5, True, 48, 192, 1),
    ("audioset-bal", "cnn"): (BAL, ["--recipe", "audioset-bal"], 1e-3, 100, 60, 1000, halved(35, 5, 60), 0.5, False, 48, 192, 41),
    ("audioset-bal", "ast"): (BAL, ["--recipe", "audioset-bal"], 5e-5, 12, 25, 1000, halved(10, 5, 25), 0.5, False, 48, 192, 6),
    ("esc50", "cnn"): (ESC, [], 1e-4, 48, 25, 0, [0.85 ** max(0, e - 5) for e in range(1, 26)], 0, False, 24, 96, "off"),
    ("esc50", "ast"): (ESC, [], 1e-4, 48, 25, 0, [0.85 ** max(0, e - 5) for e in range(1, 26)], 0, False, 24, 96, "off"),
    ("esc10", "cnn"): (ESC10, [], 1e-4, 48, 25, 0, [0.85 ** max(0, e - 5) for e in range(1, 26)], 0, False, 24, 96, "off"),
    ("multi", "cnn"): (Fake("csv", "multi-label", 36796, 200), [], 5e-4, 24, 50, 1000, "plateau", 0.5, True, 48, 38, "val"),
    ("multi", "ast"): (Fake("csv", "multi-label", 36796, 200), [], 5e-5, 12, 50, 1000, "plateau", 0.5, True, 48, 38, "val"),
    ("single", "cnn"): (Fake("csv", "single-label", 4000, 300), [], 1e-4, 48, 25, 0, [0.85 ** max(0, e - 5) for e in range(1, 26)],
                        0, False, 24, 58, "off"),
}  # fmt: skip


@pytest.mark.parametrize("column", WANT, ids="-".join)
def test_every_cell_of_the_recipe_table_is_the_papers(column):
    data, flags, *want, average = WANT[column]
    for model in CNNS if column[1] == "cnn" else ASTS:
        args = settings("--model", model, *flags, data=data)
        decay = args.decay
        if decay != "plateau":
            decay = pytest.approx([train_teacher.decay_factor(args, e, []) for e in range(1, args.epochs + 1)])
        got = [args.lr, args.batch_size, args.epochs, args.warmup, decay, args.mixup, args.balanced, args.freq_mask]
        assert [*got, args.time_mask, args.average] == [*want, average]
        assert args.pretrained == "imagenet" and args.label_smoothing == 0.1 and args.patchout == [0, 0]
        assert args.recipe == {"multi": "fsd50k", "single": "esc50", "esc10": "esc50"}.get(*column[:1] * 2)
    assert train_teacher.BETAS == (0.95, 0.999) and train_teacher.WEIGHT_DECAY == 5e-7


@pytest.mark.parametrize(
    "data, flags, want",
    [
        (BAL, ["--model", "ast-base", "--epochs", 10], {"epochs": 10, "average": 4}),  # the last two thirds
        (BAL, ["--model", "efficientnet-b2", "--epochs", 9], {"average": 4}),
        (BAL, ["--model", "ast-base", "--epochs", 5], {"average": 1}),
        (FSD, ["--model", "ast-base", "--epochs", 9], {"average": "val"}),
        (ESC, ["--model", "ast-base", "--epochs", 9], {"average": "off"}),
        (Fake("csv", "multi-label", 36796, has_val=False), ["--model", CNN], {"average": 17, "decay": "plateau"}),
        (Fake("csv", "multi-label", 500), ["--model", CNN], {"warmup": 100}),  # a tenth of 50 epochs of 20 steps
        (Fake("csv", "multi-label", 500), ["--model", "ast-tiny", "--warmup", 7], {"warmup": 7}),
        (Fake("csv", "multi-label", 5), ["--model", CNN], {"batch_size": 5, "warmup": 5}),
        (DEMO, ["--model", CNN], {"recipe": "demo", "pretrained": "no"}),
        (FSD, ["--model", CNN, "--pretrained", ""], {"pretrained": "imagenet"}),  # of an empty variable: never random
        (DEMO, ["--model", CNN, "--recipe", "fsd50k"], {"lr": 5e-4, "pretrained": "imagenet"}),
        (
            FSD,
            ["--model", CNN, "--lr", 0.1, "--mixup", 0, "--no-balanced", "--freq-mask", 0, "--time-mask", 5],
            {"lr": 0.1, "mixup": 0, "balanced": False, "freq_mask": 0, "time_mask": 5, "batch_size": 24},
        ),
        (ESC, ["--model", CNN, "--balanced", "--batch-size", 7], {"balanced": True, "batch_size": 7}),
    ],
)
def test_the_table_decides_what_the_command_line_left_open(data, flags, want):
    got = vars(settings(*flags, data=data))
    assert {k: got[k] for k in want} == want


def test_the_rate_on_esc50_depends_on_what_the_weights_have_heard(tmp_path):
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "deit.pth")
    torch.save({"module.v.cls_token": torch.zeros(1)}, tmp_path / "audio.pth")
    for name, lr in (("deit.pth", 1e-4), ("audio.pth", 1e-5)):
        assert settings("--model", "ast-base", "--pretrained", tmp_path / name, data=ESC).lr == lr
        assert settings("--model", "efficientnet-b2", "--pretrained", tmp_path / name, data=ESC).lr == 1e-4
        assert settings("--model", "ast-base", "--pretrained", tmp_path / name, data=FSD).lr == 5e-5
    with pytest.raises(FileNotFoundError, match="no weights at"):
        settings("--model", "ast-base", "--pretrained", tmp_path / "gone.pth", data=ESC)


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixup", 1.5], ["--epochs", 0], ["--lr", 0], ["--lr", "nan"], ["--lr", "inf"], ["--batch-size", 0], ["--warmup", -1],
        ["--freq-mask", 129], ["--time-mask", 1001], ["--label-smoothing", 1], ["--seed", -1], ["--patchout", 12, 0],
        ["--patchout", 0, 99], ["--patchout", -1, 0],
    ],
)  # fmt: skip
def test_a_flag_out_of_range_is_named(flags):
    with pytest.raises(ValueError, match=flags[0]):
        settings("--model", "ast-tiny", *flags, data=FSD)


def test_patchout_is_for_asts():
    with pytest.raises(ValueError, match="--patchout"):
        settings("--model", CNN, "--patchout", 1, 0, data=FSD)


def test_plateau_is_that_of_torch_and_rises_with_the_score():
    scores = [0.1, 0.2, 0.2, 0.19, 0.18, 0.3, 0.1, 0.1, 0.1]
    want = [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]  # three epochs in a row without a better score
    args = argparse.Namespace(decay="plateau")
    history = [{"val_score": s, "loss": 0} for s in scores]
    assert [train_teacher.decay_factor(args, n + 1, history[:n]) for n in range(10)] == want
    history = [{"loss": 1 - s + 0.001 * n} for n, s in enumerate(scores)]  # no validation split: the training loss
    assert [train_teacher.decay_factor(args, n + 1, history[:n]) for n in range(10)] == want
    history = [{"loss": 1.0}] * 9  # a plateau of the loss
    assert [train_teacher.decay_factor(args, n + 1, history[:n]) for n in (3, 4, 8)] == [1, 0.5, 0.25]


# ----------------------------------------------------------------------------------------------------------- one run


@pytest.fixture(scope="module")
def teacher(multi, toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("exp") / "teacher"
    output = inside("train_teacher.py", "--data", multi, "--model", CNN, "--out", out, *TINY)
    assert "epoch  2/2" in output and str(out) in output
    return out


def test_a_run_leaves_its_files_and_repeats_bit_for_bit(teacher, multi, tmp_path):
    files = {p.name for p in teacher.iterdir()}
    assert files == {"args.json", "best.pt", "ep-00.pt", "ep-01.pt", "ep-02.pt", "last.pt", "log.jsonl"}
    epochs = log(teacher)
    assert [e["epoch"] for e in epochs] == [1, 2] and {"loss", "grad_norm", "lr", "val_mAP", "val_mAUC"} <= epochs[
        0
    ].keys()
    best = models.read_checkpoint(teacher / "best.pt")
    assert best["classes"] == ["high", "low", "noise"] and best["task"] == "multi-label" and best["n_frames"] == 30
    train = dataset.FbankDataset(multi, "train")
    assert (best["mean"], best["std"], best["sample_rate"]) == (train.mean, train.std, 16000)
    assert best["data"] == str(multi.resolve()) and best["args"]["seed"] == 0 and best["model"]["name"] == CNN
    short = ["train_teacher.py", "--data", multi, "--model", TIMM_CNN, *TINY[:2], "--epochs", 1, "--batch-size", 24]
    command(*short, "--out", tmp_path / "one")
    inside(*short, "--out", tmp_path / "again")
    assert same(weights(tmp_path / "one" / "last.pt"), weights(tmp_path / "again" / "last.pt"))
    assert log(tmp_path / "one") == log(tmp_path / "again")
    inside("train_teacher.py", "--data", multi, "--model", CNN, "--out", tmp_path / "other", "--seed", 1, *TINY)
    for name in ("ep-00.pt", "last.pt"):
        assert not same(weights(teacher / name), weights(tmp_path / "other" / name))


def test_the_run_is_named_after_data_model_fold_and_seed(folds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside("train_teacher.py", "--data", folds, "--model", CNN, "--fold", 2, "--seed", 3, *TINY)
    run = tmp_path / "exp" / "folds" / "timm-toy_efficientnet-fold2-s3"
    assert models.read_checkpoint(run / "best.pt")["epoch"] == 2  # the last epoch: no choice on a test fold
    assert "val_score" not in log(run)[0]


@pytest.fixture
def shifted(tmp_path):
    """A folder whose validation clips are much louder than its training clips."""
    folder = write_prepared(tmp_path / "shifted", {"train": 36, "val": 30}, True)
    shard = np.load(folder / "fbank-00000.npy")
    val = dataset.FbankDataset(folder, "val")
    shard[val.rows] += 6
    for row, n in zip(val.rows, val.frames):
        shard[row, n:] = 0
    np.save(folder / "fbank-00000.npy", shard)
    return folder


def test_logged_scores_are_those_of_the_epochs_weights(shifted, tmp_path):
    """Each epoch's file, scored on validation by hand: eval mode, the training clips' mean and std, all clips whole."""
    run = tmp_path / "run"
    inside("train_teacher.py", "--data", shifted, "--model", CNN, "--out", run, *TINY, "--lr", 3e-3, "--epochs", 3)
    train, val = dataset.FbankDataset(shifted, "train"), dataset.FbankDataset(shifted, "val")
    x, y = (torch.stack(v) for v in zip(*(val[i] for i in range(len(val)))))

    def by_hand(epoch, mean, std):
        model = models.load_checkpoint(run / f"ep-{epoch:02d}.pt")[0]
        with torch.no_grad():
            p = torch.sigmoid(model((x - mean) / (2 * std))).numpy()
        return {
            "val_mAP": average_precision_score(y, p), "val_mAUC": roc_auc_score(y, p),
            "val_accuracy": np.mean([y[i, p[i].argmax()] for i in range(len(p))]),
        }  # fmt: skip

    for entry in log(run):
        want = by_hand(entry["epoch"], train.mean, train.std)
        assert {k: entry[k] for k in want} == pytest.approx(want, abs=1e-6) and entry["val_score"] == entry["val_mAP"]
    # its own mean would have given other scores
    assert by_hand(3, train.mean, train.std) != pytest.approx(by_hand(3, val.mean + 6, val.std), abs=1e-6)


def test_best_is_the_first_of_the_best_epochs_and_the_rate_follows_the_scores(multi, tmp_path, monkeypatch):
    script = iter([0.3, 0.5, 0.2, 0.5, 0.4, 0.1])
    scores = evaluate.scores
    monkeypatch.setattr(evaluate, "scores", lambda *a: scores(*a) | {"mAP": next(script)})
    flags = [*TINY[:2], "--epochs", 6, "--batch-size", 24, "--lr", 0.01, "--warmup", 0]
    output = inside("train_teacher.py", "--data", multi, "--model", AST, "--out", tmp_path / "run", *flags)
    best = models.read_checkpoint(tmp_path / "run" / "best.pt")
    assert best["epoch"] == 2 and best["val_score"] == 0.5
    assert same(best["state"], weights(tmp_path / "run" / "ep-02.pt"))
    assert [line.count("*") for line in output.splitlines() if line.startswith("epoch")] == [1, 1, 0, 0, 0, 0]
    assert [e["lr"] for e in log(tmp_path / "run")] == [0.01] * 5 + [0.005]  # after epochs 3, 4 and 5


def test_training_learns_three_sounds(tmp_path):
    data = write_prepared(tmp_path / "data", {"train": 96, "val": 30, "eval": 90}, True)
    flags = ["--pretrained", "no", "--epochs", 8, "--batch-size", 8, "--lr", 3e-3]
    inside("train_teacher.py", "--data", data, "--model", TIMM_CNN, "--out", tmp_path / "run", *flags)
    found = {}
    for name in ("ep-00", "best"):
        model, meta = models.load_checkpoint(tmp_path / "run" / f"{name}.pt")
        p, y = evaluate.predict(
            model, dataset.FbankDataset(data, "eval"), torch.device("cpu"), meta["mean"], meta["std"]
        )
        found[name] = average_precision_score(y, p)
    assert found["best"] > 0.9 and found["ep-00"] < 0.8, found
    losses = [e["loss"] for e in log(tmp_path / "run")]
    assert losses[-1] < losses[0]


def test_pretrained_weights_are_where_training_starts(multi, tmp_path, monkeypatch):
    model = models.build_model(CNN, 3, 30)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    flags = ["--data", multi, "--model", CNN, "--epochs", 1, "--batch-size", 48]
    inside("train_teacher.py", *flags, "--pretrained", tmp_path / "start.pth", "--out", tmp_path / "a")
    assert same(weights(tmp_path / "a" / "ep-00.pt"), model.state_dict())
    assert not same(weights(tmp_path / "a" / "ep-01.pt"), model.state_dict())
    theirs = timm.create_model(TIMM_CNN.removeprefix("timm:")).state_dict()
    monkeypatch.setattr(models, "imagenet_state", lambda tag: theirs)
    inside("train_teacher.py", *flags, "--model", TIMM_CNN, "--out", tmp_path / "b")  # imagenet is the default
    stem = weights(tmp_path / "b" / "ep-00.pt")["backbone.conv_stem.weight"]
    assert torch.equal(stem, theirs["conv_stem.weight"].sum(1, keepdim=True))


@pytest.mark.parametrize("precision, dtype", [(None, None), ("bfloat16", torch.bfloat16)])
def test_what_the_model_receives_in_each_step(multi, tmp_path, monkeypatch, precision, dtype):
    """The batches of dataset.py in training, whole clips in validation; train and eval mode; patchout in training only."""
    calls, forward = [], models.AST.forward

    def spy(model, x, both=False, keep=None):
        cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        calls.append((model.training, x.clone(), keep, cast, torch.is_grad_enabled()))
        return forward(model, x, both, keep)

    monkeypatch.setattr(models.AST, "forward", spy)
    flags = ["--data", multi, "--model", AST, "--out", tmp_path / "run", *TINY, "--patchout", 3, 1]
    flags += ["--precision", precision] if precision else []
    inside("train_teacher.py", *flags)
    train = dataset.FbankDataset(multi, "train")
    args = settings("--model", AST, *TINY, "--patchout", 3, 1, data=train)
    batches = list(itertools.chain(*(dataset.batches(train, args, e, torch.device("cpu")) for e in (1, 2))))
    assert [c[0] for c in calls] == ([True] * 4 + [False]) * 2 and {c[3] for c in calls} == {dtype}
    seen = [c for c in calls if c[0]]
    for (_, x, keep, _, grad), (want, _, _, kept) in zip(seen, batches, strict=True):
        assert torch.equal(x, want) and torch.equal(keep, kept) and len(keep) == 9 and grad
    for _, x, keep, _, grad in (c for c in calls if not c[0]):
        assert x.shape == (12, 30, 128) and keep is None and not grad


# ------------------------------------------------------------------------------------------------- interrupted runs


class Killed(Exception):
    pass


def interrupted(script, flags, out, saves, monkeypatch):
    """Run a script that dies right after its last.pt was written so many times; the rate of each step it began."""
    rates, save, left = [], train_teacher.save_last, [saves]

    class Adam(torch.optim.Adam):
        def __init__(self, parameters, lr, betas, **options):
            assert betas == (0.95, 0.999) and options["weight_decay"] == 5e-7
            super().__init__(parameters, lr, betas, **options)

        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    def save_and_die(*args):
        save(*args)
        left[0] -= 1
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "Adam", Adam)
        patch.setattr(train_teacher, "save_last", save_and_die)
        patch.setattr(train_teacher, "RESUME_SECONDS", 0 if saves else 1e9)  # save after every step
        try:
            output = inside(script, *flags, "--out", out)
        except Killed:
            output = None
    return rates, output


@pytest.mark.parametrize("script", ["train_teacher.py", "distill.py"])
@pytest.mark.parametrize(
    "model, recipe, flags, factors",
    [
        (AST, "audioset", ["--patchout", 3, 1], [1, 1, 0.5, 0.25, 0.125, 0.0625]),
        (CNN, "esc50", ["--warmup", 9], [1, 1, 1, 1, 1, 0.85]),  # stochastic depth
    ],
)
def test_a_killed_run_resumes_bit_for_bit_at_the_rate_of_the_formula(
    script, model, recipe, flags, factors, multi, teacher, tmp_path, monkeypatch
):
    flags = ["--data", multi, "--model", model, "--recipe", recipe, *TINY, "--epochs", 6, *flags]
    flags += ["--lr", 0.002, "--teacher", teacher / "best.pt"] if script == "distill.py" else ["--lr", 0.002]
    want = [0.002 * factors[s // 4] * min(1, (s + 1) / 2) for s in range(24)]  # warmup: at most a tenth of 24 steps
    rates, _ = interrupted(script, flags, tmp_path / "whole", 0, monkeypatch)
    assert rates == pytest.approx(want, rel=1e-12)
    rates = []  # killed after step 1 of epoch 1, in the warmup; after step 2 of epoch 4; before its end
    for saves, done in ((1, 1), (16, 14), (2, 16)):
        more, output = interrupted(script, flags, tmp_path / "cut", saves, monkeypatch)
        rates += more
        last = models.read_checkpoint(tmp_path / "cut" / "last.pt")
        assert output is None and last["epoch"] * 4 + len(last["log"]) == len(rates) == done
    more, output = interrupted(script, flags, tmp_path / "cut", 0, monkeypatch)
    assert f"resuming from {tmp_path / 'cut' / 'last.pt'}: epoch {last['epoch'] + 1}, step {len(last['log'])}" in output
    assert rates + more == pytest.approx(want, rel=1e-12)
    for name in ("last.pt", "best.pt", *(f"ep-{e:02d}.pt" for e in range(7))):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name)), name
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
    states = [models.read_checkpoint(tmp_path / k / "last.pt")["optimizer"]["state"] for k in ("whole", "cut")]
    assert all(same(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_a_run_without_last_starts_anew_to_the_same_weights(teacher, multi, tmp_path):
    shutil.copytree(teacher, tmp_path / "run")
    for name in ("last.pt", "ep-02.pt", "log.jsonl"):
        (tmp_path / "run" / name).unlink()
    flags = ["--data", multi, "--model", CNN, "--out", tmp_path / "run", *TINY]
    assert "resuming" not in inside("train_teacher.py", *flags)
    assert same(weights(tmp_path / "run" / "last.pt"), weights(teacher / "last.pt"))


def test_a_run_that_never_trained_does_not_bind_its_settings(multi, tmp_path, monkeypatch):
    flags = ["--data", multi, "--model", CNN, "--out", tmp_path / "run", "--epochs", 1, "--batch-size", 12]
    assert "no weights at" in inside("train_teacher.py", *flags, "--pretrained", tmp_path / "gone.pth")
    flags += ["--pretrained", "no"]
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "batches", lambda *_: 1 / 0)  # ends after ep-00.pt, before it has trained
        with pytest.raises(ZeroDivisionError):
            inside("train_teacher.py", *flags)
    first = models.read_checkpoint(tmp_path / "run" / "ep-00.pt")["state"]
    assert "epoch  1/1" in inside("train_teacher.py", *flags, "--seed", 1)
    start = models.read_checkpoint(tmp_path / "run" / "ep-00.pt")
    assert start["args"]["seed"] == 1 and not torch.equal(start["state"]["head.weight"], first["head.weight"])
    assert "is a run with other settings (seed 1 -> 2)" in inside("train_teacher.py", *flags, "--seed", 2)


def test_data_that_were_prepared_anew_are_another_run_and_are_named_by_scores(tmp_path):
    folder = write_prepared(tmp_path / "data", {"train": 12, "eval": 6}, True)
    flags = ["--data", folder, "--model", CNN, "--out", tmp_path / "run", *TINY]
    assert "epoch  2/2" in inside("train_teacher.py", *flags)
    score = ["evaluate.py", "--ckpt", tmp_path / "run" / "best.pt"]
    assert "another preparation" not in inside(*score)
    edited = (folder / "clips.csv").read_text().splitlines(keepends=True)
    (folder / "clips.csv").write_text("".join(edited[:-1]))  # by hand: an edit is used, and printed
    assert "is trained already" in inside("train_teacher.py", *flags) and "another preparation" not in inside(*score)
    shutil.rmtree(folder)
    write_prepared(folder, {"train": 13, "eval": 6}, True)
    assert "is a run with other settings (tables [" in inside("train_teacher.py", *flags)
    assert f"was trained on another preparation than {folder}: its training clips may be among these" in inside(*score)


def test_validation_without_a_label_is_an_error(tmp_path):
    folder = write_prepared(tmp_path / "data", {"train": 12, "val": 6}, True)
    with open(folder / "clips.csv", newline="") as f:
        header, *rows = csv.reader(f)
    dataset.write_csv(folder / "clips.csv", header, ([*r[:5], "" if r[3] == "val" else r[5], *r[6:]] for r in rows))
    flags = ["--data", folder, "--model", CNN, "--out", tmp_path / "run", *TINY]
    assert "no validation clip of" in inside("train_teacher.py", *flags)


def test_classes_without_a_training_clip_are_named(tmp_path, capsys):
    folder = write_prepared(tmp_path / "data", {"train": 9, "val": 6}, True, labels=lambda rng: [int(rng.integers(2))])
    train_teacher.open_data(train_teacher.parser("").parse_args(["--data", str(folder), "--model", CNN]))
    printed = capsys.readouterr().out
    assert all(f"in {s}, neither learned nor scored there: 1 of 3 classes (noise)" in printed for s in ("train", "val"))


def test_fewer_clips_than_processes_is_an_error(monkeypatch):
    monkeypatch.setattr(dataset, "world", lambda: 8)
    with pytest.raises(ValueError, match="5 training clips are too few for 8 processes"):
        settings("--model", CNN, data=Fake("csv", "multi-label", 5))


def test_a_finished_run_stays_finished(teacher, multi, tmp_path, monkeypatch):
    shutil.copytree(multi, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    flags = ["--model", CNN, "--out", tmp_path / "run", *TINY]
    inside("train_teacher.py", "--data", "data", *flags)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.suffix != ".json"}
    code, output = forked("train_teacher.py", "--data", "data", *flags)
    assert code == 0 and f"{tmp_path / 'run'} is trained already (2 epochs)" in output
    with monkeypatch.context() as patch:
        patch.delattr(models, "build_model")  # so no weights to start it from are fetched
        patch.delattr(dataset, "atomic_write")  # nor is anything written
        assert "trained already" in inside("train_teacher.py", "--data", "data", *flags)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    more = ["--keep-epochs", "--cache", "device", "--no-compile", "--device", "cpu"]
    for data in (tmp_path / "data", tmp_path / "link", "./data/../data"):
        assert "trained already" in inside("train_teacher.py", "--data", data, *flags, *more), data
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.suffix != ".json"}
    assert dataset.read_json(tmp_path / "run" / "args.json")["keep_epochs"]
    # args.json of an older version, which did not have these flags
    args = dataset.read_json(tmp_path / "run" / "args.json")
    dataset.write_json(
        tmp_path / "run" / "args.json", {k: v for k, v in args.items() if k not in ("patchout", "recipe")}
    )
    assert "trained already" in inside("train_teacher.py", "--data", "data", *flags)
    old = {k: v for k, v in args.items() if k != "label_smoothing"}
    dataset.write_json(tmp_path / "run" / "args.json", old)
    assert "label_smoothing" in inside("train_teacher.py", "--data", "data", *flags, "--label-smoothing", 0.2)
    assert "trained already" in inside("train_teacher.py", "--data", "data", *flags)
    for change, words in (
        (["--lr", 0.1], "lr 0.0005 -> 0.1"),
        (["--epochs", 3], "epochs 2 -> 3"),
        (["--seed", 1], "seed 0 -> 1"),
    ):
        output = inside("train_teacher.py", "--data", "data", *flags, *change)
        assert output.startswith("error: ") and words in output and "--out" in output
    other = write_prepared(tmp_path / "other", {"train": 48, "val": 12}, True)
    assert inside("train_teacher.py", "--data", other, *flags).startswith("error: ")


def test_resume_elsewhere(multi, tmp_path, monkeypatch):
    """Where clips lie, how the model runs and on which device may differ from the run's beginning; the weights that it
    started from may be gone."""
    start = tmp_path / "start.pth"
    torch.save(models.build_model(CNN, 3, 30).state_dict(), start)
    flags = ["--data", multi, "--model", CNN, *TINY, "--pretrained", start]
    interrupted("train_teacher.py", flags, tmp_path / "whole", 0, monkeypatch)
    interrupted("train_teacher.py", [*flags, "--cache", "disk"], tmp_path / "cut", 6, monkeypatch)
    last = models.read_checkpoint(tmp_path / "cut" / "last.pt")
    assert last["epoch"] == 1
    gpu = copy.deepcopy(last)  # as a GPU's run left it
    gpu["args"] |= {"device": "cuda", "cache": "device"}
    torch.save(gpu, tmp_path / "cut" / "last.pt")
    args = dataset.read_json(tmp_path / "cut" / "args.json")
    dataset.write_json(tmp_path / "cut" / "args.json", args | {"device": "cuda", "cache": "device"})
    more = ["--cache", "device", "--no-compile", "--device", "cpu"]
    start.unlink()
    output = inside("train_teacher.py", *flags, "--out", tmp_path / "cut", *more)
    assert "resuming" in output and "are read from cpu memory" in output
    assert same(weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "cut" / "last.pt"))


def test_the_log_is_never_behind_the_weights(multi, tmp_path, monkeypatch):
    interrupted("train_teacher.py", ["--data", multi, "--model", CNN, *TINY], tmp_path, 5, monkeypatch)
    assert len(log(tmp_path)) == len(models.read_checkpoint(tmp_path / "last.pt")["history"]) == 1


# --------------------------------------------------------------------------------------------------- what is wrong


def test_silence_alone_is_an_error(multi, tmp_path):
    silent = shutil.copytree(multi, tmp_path / "silent")
    header, *lines = (silent / "clips.csv").read_text().splitlines()
    assert header.endswith(",mean,var")
    zeros = f",{dataset.FLOOR},0.0"  # what prep_data.py writes for them
    lines = [line.rsplit(",", 2)[0] + zeros for line in lines]
    (silent / "clips.csv").write_text("\n".join([header, *lines]) + "\n")
    output = inside("train_teacher.py", "--data", silent, "--model", CNN, *TINY, "--out", tmp_path / "run")
    assert output.splitlines()[-1].startswith("error: all training clips of") and "silent" in output
    assert not (tmp_path / "run").exists()


def test_one_class_that_every_clip_has_is_an_error_and_a_detector_is_not(tmp_path):
    flags = ["--model", CNN, *TINY, "--out", tmp_path / "run"]
    every = write_prepared(tmp_path / "every", {"train": 8, "val": 4}, True, classes=["dog"], labels=lambda rng: [0])
    output = inside("train_teacher.py", "--data", every, *flags)
    assert output.startswith("error: ") and "all training clips" in output and "have the same labels" in output
    only = write_prepared(
        tmp_path / "only", {"train": 8, "val": 4}, False, classes=["normal", "odd"], labels=lambda _: [0]
    )
    assert "have the same labels" in inside("train_teacher.py", "--data", only, *flags)
    assert not (tmp_path / "run").exists()
    some = lambda rng: [0][: rng.integers(2)]
    detector = write_prepared(tmp_path / "some", {"train": 12, "val": 12}, True, classes=["dog"], labels=some)
    assert "epoch  2/2" in inside("train_teacher.py", "--data", detector, *flags)


def test_weights_in_a_folder_that_is_no_run_are_not_overwritten(multi, tmp_path):
    (tmp_path / "best.pt").write_bytes(b"a teacher's, copied")
    flags = ["--data", multi, "--model", CNN, "--pretrained", "no", "--epochs", "1", "--out", tmp_path]
    assert "holds best.pt: give another --out" in inside("train_teacher.py", *flags)
    assert [p.name for p in tmp_path.glob("*.pt")] == ["best.pt"] and (tmp_path / "best.pt").stat().st_size == 19


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "nowhere", "--model", CNN], "nowhere is not a prepared folder"),
        (["--data", "MULTI", "--model", "resnet"], "unknown model 'resnet'"),
        (["--data", "MULTI", "--model", "timm:nothing"], "unknown model 'timm:nothing'"),
        (["--data", "MULTI", "--model", CNN, "--fold", 1], "has no split 'train' of --fold 1: it has splits"),
        (["--data", "FOLDS", "--model", CNN], "it has train and eval of --fold 1, 2, 3"),
        (["--data", "FOLDS", "--model", CNN, "--fold", 9], "of --fold 9: it has train and eval of"),
        (["--data", "MULTI", "--model", CNN, "--pretrained", "gone.pth"], "gone.pth"),
        (["--data", "MULTI", "--model", TIMM_CNN, "--pretrained", "imagenet"], "--pretrained"),
        (["--data", "MULTI", "--model", CNN, "--device", "cuda"], "--device"),
        (["--data", "MULTI", "--model", CNN, "--recipe", "audioset-bal"], "no split 'train-balanced'"),
    ],
)
def test_bad_input_gets_one_sentence(flags, words, multi, folds, tmp_path, monkeypatch):
    flags = [{"MULTI": multi, "FOLDS": folds}.get(f, f) for f in flags]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output = inside("train_teacher.py", *flags, "--out", tmp_path / "out")
    assert output.startswith("error: ") and words in output and "\n" not in output
    assert not (tmp_path / "out" / "ep-00.pt").exists()


class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("soundfile", "torchaudio", "stream_unzip", "prep_data"):
            raise ModuleNotFoundError(f"{name} is not installed here")


OURS = "dataset", "models", "evaluate", "train_teacher", "distill"


def test_everything_but_preparation_runs_without_audio_libraries(multi, tmp_path):
    tiny = ["--data", multi, "--model", CNN, *TINY[:2], "--epochs", 1, "--batch-size", 24]
    lines = [
        ["train_teacher.py", *tiny, "--out", tmp_path / "a"],
        ["distill.py", *tiny, "--out", tmp_path / "b", "--teacher", tmp_path / "a" / "best.pt"],
        ["evaluate.py", "--average", tmp_path / "b"],
        ["evaluate.py", "--ckpt", tmp_path / "b" / "wa.pt"],
    ]

    def blocked():
        """In a forked process: our files are imported anew, and find no audio libraries."""
        for name in list(sys.modules):
            if name.split(".")[0] in (*OURS, "soundfile", "torchaudio", "stream_unzip", "prep_data", "analyze"):
                del sys.modules[name]
        sys.meta_path.insert(0, Blocked())
        for script, *args in lines:
            sys.argv = [script, *map(str, args)]
            importlib.import_module(script.removesuffix(".py")).main()
            for folder in list(sys.modules["dataset"].LOCKS):
                sys.modules["dataset"].unlock(folder)
        sys.exit(0)

    code, output = forked("train_teacher.py", before=blocked)
    assert code == 0, output
    assert (tmp_path / "b" / "metrics-wa-eval.json").exists()


def test_no_behaviour_hangs_on_an_assert_that_python_minus_O_removes():
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        asserts = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)]
        assert not asserts and "__debug__" not in path.read_text(encoding="utf-8"), (path, asserts)
