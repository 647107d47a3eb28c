"""train_teacher.py and distill.py: the recipe table, sampling, schedules, and whole tiny runs by the real command lines."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, command, inside

import distill
import evaluate
import models
import prep_data
import train_teacher

CNN, AST = "timm:mobilenetv3_small_050", "ast-tiny"
TINY = ["--pretrained", "no", "--epochs", 2, "--batch-size", 12]


def settings(*flags, data):
    return train_teacher.resolve(train_teacher.parser("").parse_args(["--data", "x", *map(str, flags)]), data)


class Fake:  # stands for a data set of a given source
    def __init__(self, source, task, n=40000, n_frames=1000, has_val=True):
        self.source, self.task, self.n, self.n_frames, self.has_val = (source, task, n, n_frames, has_val)

    def __len__(self):
        return self.n


FSD = Fake("fsd50k", "multi-label", 36796)
ESC = Fake("esc50", "single-label", 1600, 500, has_val=False)
BAL = Fake("audioset", "multi-label", 20000, has_val=False)


@pytest.mark.parametrize(
    "data, flags, want",
    [
        (
            FSD,
            ["--model", "efficientnet-b2"],
            {
                "lr": 5e-4,
                "batch_size": 24,
                "epochs": 50,
                "warmup": 1000,
                "decay": "plateau",
                "mixup": 0.5,
                "balanced": True,
            },
        ),
        (
            FSD,
            ["--model", "ast-base"],
            {
                "lr": 5e-5,
                "batch_size": 12,
                "freq_mask": 48,
                "time_mask": 192,
                "average": "val",
                "pretrained": "imagenet",
            },
        ),
        (FSD, ["--model", "hybrid-b0"], {"lr": 5e-4, "batch_size": 24}),
        (
            BAL,
            ["--model", "efficientnet-b2"],
            {"lr": 1e-4, "batch_size": 120, "epochs": 30, "decay": (0.5, 5, 10), "average": 16},
        ),
        (BAL, ["--model", "ast-base"], {"lr": 1e-5, "batch_size": 12, "epochs": 5, "decay": (0.5, 1, 2), "average": 1}),
        (BAL, ["--model", "ast-base", "--epochs", 10], {"epochs": 10, "average": 4}),
        (
            BAL,
            ["--model", "efficientnet-b2", "--recipe", "audioset-bal"],
            {"lr": 1e-3, "batch_size": 100, "epochs": 60, "decay": (0.5, 5, 35), "average": 41},
        ),
        (
            BAL,
            ["--model", "ast-base", "--recipe", "audioset-bal"],
            {"lr": 5e-5, "epochs": 25, "decay": (0.5, 5, 10), "average": 6, "balanced": False},
        ),
        (
            ESC,
            ["--model", "efficientnet-b2"],
            {
                "lr": 1e-4,
                "batch_size": 48,
                "epochs": 25,
                "warmup": 0,
                "decay": (0.85, 1, 5),
                "mixup": 0.0,
                "average": "off",
            },
        ),
        (ESC, ["--model", "ast-base"], {"lr": 1e-4, "freq_mask": 24, "time_mask": 96, "balanced": False}),
        (ESC, ["--model", "ast-base", "--pretrained", "audioset.pt"], {"lr": 1e-5}),
        (Fake("esc10", "single-label", 320, 500, False), ["--model", AST], {"recipe": "esc50"}),
        (
            Fake("csv", "multi-label", 500, 200),
            ["--model", AST],
            {"recipe": "fsd50k", "warmup": 205, "time_mask": 38},
        ),  # 2050 steps
        (Fake("csv", "single-label", 500), ["--model", CNN, "--lr", 0.1], {"recipe": "esc50", "lr": 0.1}),
    ],
)
def test_the_recipe_table_decides_what_the_command_line_left_open(data, flags, want):
    got = vars(settings(*flags, data=data))
    assert {k: got[k] for k in want} == want


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixup", 1.5],
        ["--epochs", 0],
        ["--lr", 0],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--batch-size", 0],
        ["--freq-mask", 129],
        ["--label-smoothing", 1],
    ],
)
def test_a_flag_out_of_range_is_named(flags):
    with pytest.raises(ValueError, match=flags[0]):
        settings("--model", AST, *flags, data=FSD)


def test_decay_and_warmup():
    rates = [train_teacher.decay_factor(argparse.Namespace(decay=(0.5, 5, 10)), e, []) for e in (1, 10, 11, 15, 16, 21)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.125]
    rates = [train_teacher.decay_factor(argparse.Namespace(decay=(0.85, 1, 5)), e, []) for e in (5, 6, 7)]
    assert rates == pytest.approx([1, 0.85, 0.85**2])
    scores = [0.1, 0.2, 0.2, 0.19, 0.18, 0.3, 0.1, 0.1, 0.1]
    parameter = torch.zeros(1, requires_grad=True)
    reference = torch.optim.SGD([parameter], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, "max", 0.5, 2)
    args = argparse.Namespace(decay="plateau")
    for e in range(len(scores)):
        plateau.step(scores[e])
        history = [{"val_score": s, "loss": 0} for s in scores[: e + 1]]
        assert train_teacher.decay_factor(args, e + 2, history) == reference.param_groups[0]["lr"]
    assert reference.param_groups[0]["lr"] == 0.25
    args = argparse.Namespace(lr=2.0, warmup=4)
    rates = []
    for done in range(6):
        train_teacher.set_rate(reference, args, 0.5, done)
        rates.append(reference.param_groups[0]["lr"])
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1]


def test_balanced_sampling_draws_classes_alike_and_depends_on_the_epoch(multi):
    data = prep_data.FbankDataset(multi, "train")
    orders = [train_teacher.epoch_order(data, 0, e, True) for e in range(1, 400)]
    drawn = np.bincount(np.concatenate(orders), minlength=len(data)) / sum(map(len, orders))
    weights = data.weights() / data.weights().sum()
    assert np.abs(drawn / weights - 1).max() < 0.15
    assert not np.array_equal(orders[0], orders[1])
    plain = train_teacher.epoch_order(data, 0, 1, False)
    assert sorted(plain) == list(range(len(data)))


def test_batches_are_what_the_parts_make_and_do_not_depend_on_where_one_starts(multi):
    data = prep_data.FbankDataset(multi, "train")
    args = settings("--model", AST, "--batch-size", 8, "--mixup", 1, data=data)
    device = torch.device("cpu")
    every = list(train_teacher.batches(data, args, 3, device))
    assert len(every) == 6 and every[0][0].shape == (8, 100, 128)
    for (x, y, mixed), again in zip(every[4:], train_teacher.batches(data, args, 3, device, first=4)):
        assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and torch.equal(mixed, again[2])
    kept = prep_data.FbankDataset(multi, "train")
    kept.keep_on(device)
    for (x, y, mixed), again in zip(every, train_teacher.batches(kept, args, 3, device)):
        assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and torch.equal(mixed, again[2])
    clips = train_teacher.epoch_order(data, args.seed, 3, args.balanced)[:8]
    d = prep_data.draw(np.random.default_rng([args.seed, 3, 1]), 8, len(data), 1.0, args.freq_mask, args.time_mask, 100)
    lam = torch.from_numpy(d["lam"])
    a, b = data.fetch(clips), data.fetch(d["partner"])
    assert torch.equal(every[0][2], prep_data.mix(a[0].float(), b[0].float(), lam, a[1], b[1]))
    soft = [prep_data.targets(v[2], 3, "multi-label", 0.1) for v in (a, b)]
    assert torch.allclose(every[0][1], lam[:, None] * soft[0] + (1 - lam[:, None]) * soft[1])


@pytest.fixture(scope="module")
def teacher(multi, tmp_path_factory):
    out = tmp_path_factory.mktemp("exp") / "teacher"
    said = command("train_teacher.py", "--data", multi, "--model", CNN, "--out", out, *TINY)
    assert "epoch  2/2" in said and str(out) in said
    return out


def weights(path):
    return models.read_checkpoint(path)["state"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a.keys() | b.keys())


def test_a_run_leaves_its_files_and_repeats_bit_for_bit(teacher, multi, tmp_path):
    files = {p.name for p in teacher.iterdir()}
    assert {"args.json", "best.pt", "ep-00.pt", "ep-01.pt", "ep-02.pt", "last.pt", "log.jsonl", "curve.png"} == files
    log = [json.loads(line) for line in (teacher / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in log] == [1, 2] and {"loss", "lr", "val_mAP", "val_mAUC", "seconds"} <= log[0].keys()
    best = models.read_checkpoint(teacher / "best.pt")
    assert best["epoch"] == max(log, key=lambda e: e["val_mAP"])["epoch"]
    assert best["classes"] == ["high", "low", "noise"] and best["task"] == "multi-label" and best["n_frames"] == 100
    train = prep_data.FbankDataset(multi, "train")
    assert (best["mean"], best["std"], best["sample_rate"]) == (train.mean, train.std, 16000)
    command("train_teacher.py", "--data", multi, "--model", CNN, "--out", tmp_path / "again", *TINY)
    assert same(weights(teacher / "last.pt"), weights(tmp_path / "again" / "last.pt"))
    inside("train_teacher.py", "--data", multi, "--model", CNN, "--out", tmp_path / "other", "--seed", 1, *TINY)
    assert not same(weights(teacher / "last.pt"), weights(tmp_path / "other" / "last.pt"))


def test_interrupted_runs_go_on_to_the_same_weights(teacher, multi, tmp_path):
    shutil.copytree(teacher, tmp_path / "run")
    last = models.read_checkpoint(tmp_path / "run" / "last.pt")
    first = models.read_checkpoint(teacher / "ep-01.pt")
    for name in ("last.pt", "ep-02.pt", "log.jsonl", "curve.png"):
        (tmp_path / "run" / name).unlink()
    flags = ["--data", multi, "--model", CNN, "--out", tmp_path / "run", *TINY]
    # a run that stopped before its first epoch was done starts anew; its end is the same
    assert "going on" not in inside("train_teacher.py", *flags)
    assert same(weights(tmp_path / "run" / "last.pt"), last["state"])
    (tmp_path / "run" / "curve.png").unlink()  # killed after the last epoch was saved
    assert "trained already" in inside("train_teacher.py", *flags) and (tmp_path / "run" / "curve.png").exists()
    assert first["epoch"] == 1
    said = inside("train_teacher.py", *flags[:-2], "--batch-size", 6)
    assert "batch_size 12 -> 6" in said


def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_bit_for_bit(teacher, multi, tmp_path, monkeypatch):
    flags = ["train_teacher.py", "--data", str(multi), "--model", CNN, "--out", str(tmp_path / "run"), *map(str, TINY)]
    monkeypatch.setattr("sys.argv", flags)
    monkeypatch.setattr(train_teacher, "RESUME_SECONDS", 0)  # save after every step
    save, saves = train_teacher.save_last, []

    def save_and_die(*args, **more):
        save(*args, **more)
        saves.append(args)
        if len(saves) == 7:  # 4 steps and the end of epoch 1, then 2 steps
            raise RuntimeError("killed")

    monkeypatch.setattr(train_teacher, "save_last", save_and_die)
    with pytest.raises(RuntimeError, match="killed"):
        train_teacher.main()
    prep_data.unlock(tmp_path / "run")
    cut = models.read_checkpoint(tmp_path / "run" / "last.pt")
    assert (len(cut["history"]), cut["step"]) == (1, 2)
    said = command(*flags)
    assert "epoch 2, step 2" in said
    assert same(weights(tmp_path / "run" / "last.pt"), weights(teacher / "last.pt"))
    logs = [
        [json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (teacher, tmp_path / "run")
    ]
    assert [(e["loss"], e["val_mAP"]) for e in logs[0]] == [(e["loss"], e["val_mAP"]) for e in logs[1]]


@pytest.mark.parametrize("model", [CNN, AST])
def test_distill_with_lam_1_is_train_teacher_bit_for_bit(model, teacher, multi, tmp_path):
    plain = teacher
    if model == AST:
        plain = tmp_path / "plain"
        inside("train_teacher.py", "--data", multi, "--model", model, "--out", plain, *TINY)
    command(
        "distill.py",
        "--data",
        multi,
        "--model",
        model,
        "--out",
        tmp_path / "kd",
        "--teacher",
        teacher / "best.pt",
        "--lam",
        1,
        *TINY,
    )
    assert same(weights(plain / "last.pt"), weights(tmp_path / "kd" / "last.pt"))
    assert same(weights(plain / "best.pt"), weights(tmp_path / "kd" / "best.pt"))


def test_distill_averages_and_scores_by_command_line(teacher, multi, tmp_path):
    out = tmp_path / "exp" / "kd-s0"
    before = weights(teacher / "best.pt")
    command("distill.py", "--data", multi, "--model", AST, "--out", out, "--teacher", teacher / "best.pt", *TINY)
    assert same(before, weights(teacher / "best.pt"))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(0.5 * log[0]["loss_g"] + 0.5 * log[0]["loss_d"], rel=1e-5)
    best = models.read_checkpoint(out / "best.pt")
    assert best["args"]["tau"] == 1.0 and best["teachers"] == [CNN] and not any("teacher" in k for k in best["state"])
    epochs = {e: weights(out / f"ep-{e:02d}.pt") for e in (1, 2)}
    said = command("evaluate.py", "--average", out)
    assert not list(out.glob("ep-*.pt"))
    first = models.read_checkpoint(out / "wa.pt")["averaged"][0]
    assert f"epochs {first}-2" in said
    data, found = prep_data.FbankDataset(multi, "val"), {}
    for start in (1, 2):  # the search, by brute force
        mean = {k: torch.stack([epochs[e][k].double() for e in range(start, 3)]).mean(0).float() for k in epochs[2]}
        model, meta = models.load_checkpoint(out / "best.pt")
        model.load_state_dict(mean)
        p, y = evaluate.predict(model, data, torch.device("cpu"), meta["mean"], meta["std"])
        found[start] = evaluate.scores(p, y, "multi-label")["mAP"], mean
    assert found[first][0] == max(v[0] for v in found.values())
    wa = weights(out / "wa.pt")
    assert all(torch.allclose(wa[k], found[first][1][k], atol=1e-7) for k in wa)

    said = command("evaluate.py", "--ckpt", out / "best.pt")
    result = json.loads((out / "metrics-best-eval.json").read_text())
    model, meta = models.load_checkpoint(out / "best.pt")
    p, y = evaluate.predict(
        model, prep_data.FbankDataset(multi, "eval"), torch.device("cpu"), meta["mean"], meta["std"]
    )
    assert (
        result["mAP"] == pytest.approx(evaluate.scores(p, y, "multi-label")["mAP"], abs=1e-9)
        and f"{100 * result['mAP']:.2f}" in said
    )
    assert len((out / "per_class-best-eval.csv").read_text().splitlines()) == 4
    inside("evaluate.py", "--ckpt", out / "wa.pt", teacher / "best.pt")
    together = json.loads((tmp_path / "exp" / "ensemble-kd+teacher" / "metrics-wa-eval.json").read_text())
    model, meta = models.load_checkpoint(out / "wa.pt")
    other, other_meta = models.load_checkpoint(teacher / "best.pt")
    eval_split = prep_data.FbankDataset(multi, "eval")
    p = [
        evaluate.predict(m, eval_split, torch.device("cpu"), v["mean"], v["std"])[0]
        for m, v in ((model, meta), (other, other_meta))
    ]
    assert together["mAP"] == pytest.approx(evaluate.scores((p[0] + p[1]) / 2, y, "multi-label")["mAP"], abs=1e-9)


def test_prediction_is_the_same_for_any_batch_size_and_shows_probabilities(teacher, multi):
    model, meta = models.load_checkpoint(teacher / "best.pt")
    data = prep_data.FbankDataset(multi, "eval")
    p, y = evaluate.predict(model, data, torch.device("cpu"), meta["mean"], meta["std"], batch_size=5)
    x = torch.stack([data[i][0] for i in range(len(data))])
    with torch.no_grad():
        want = torch.sigmoid(model((x - meta["mean"]) / (2 * meta["std"])))
    assert np.abs(p - want.numpy()).max() < 1e-5
    assert np.array_equal(y, np.stack([data[i][1] for i in range(len(data))]))


def test_single_label_folds_and_what_a_teacher_may_not_be(folds, multi, teacher, tmp_path):
    run = tmp_path / "fold1"
    said = inside("train_teacher.py", "--data", folds, "--model", CNN, "--fold", 1, "--out", run, *TINY)
    assert "no validation split" in said
    assert models.read_checkpoint(run / "best.pt")["epoch"] == 2  # the last epoch: no choice on a test fold
    kd = ["--data", folds, "--model", CNN, "--out", tmp_path / "kd", *TINY, "--teacher"]
    said = inside("distill.py", *kd, run / "best.pt", "--fold", 1)
    assert "tau=5.0" in said
    inside("evaluate.py", "--ckpt", tmp_path / "kd" / "best.pt")
    result = json.loads((tmp_path / "kd" / "metrics-best-eval.json").read_text())
    assert result["clips"] == 16 and result["fold"] == 1
    assert "no weight averaging" in inside("evaluate.py", "--average", run) and not list(run.glob("ep-*"))
    kd[5] = tmp_path / "refused"
    assert "leak" in inside("distill.py", *kd, run / "best.pt", "--fold", 2)
    assert "task" in inside("distill.py", *kd, teacher / "best.pt", "--fold", 1)
    # other classes: the first difference is named
    model, meta = models.load_checkpoint(run / "best.pt")
    meta = {k: v for k, v in meta.items() if k not in ("format", "model")} | {"classes": ["high", "LOW", "noise"]}
    models.save_checkpoint(tmp_path / "foreign.pt", model, **meta)
    said = inside("distill.py", *kd, tmp_path / "foreign.pt", "--fold", 1)
    assert "LOW" in said and "classes" in said
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("model", [CNN, AST])
def test_a_teacher_of_another_length_and_normalisation(model, multi, tmp_path):
    """A teacher of 1 s teaches a student of 0.5 s: its positions are resampled, its input converted, and both are said."""
    table, short = multi.parent / "raw audio" / "clips.csv", tmp_path / "short"
    inside("prep_data.py", "csv", "--root", table, "--out", short, "--clip-seconds", 0.5, "--workers", 1)
    inside("train_teacher.py", "--data", multi, "--model", model, "--out", tmp_path / "long", *TINY)
    kd = ["--data", short, "--model", CNN, "--out", tmp_path / "kd", *TINY, "--teacher", tmp_path / "long" / "best.pt"]
    said = inside("distill.py", *kd)
    assert "is for 100 frames" in said and "positions are resampled" in said and "its input is converted" in said
    said = inside("evaluate.py", "--ckpt", tmp_path / "long" / "best.pt", "--data", short)
    assert "positions are resampled" in said and "14 clips" in said
    ours, meta = models.load_checkpoint(tmp_path / "long" / "best.pt", 50)
    whole, _ = models.load_checkpoint(tmp_path / "long" / "best.pt")
    if model == AST:  # the grid is cut from its centre
        grid = whole.v.pos_embed[:, 2:].reshape(12, 9, -1)[:, 9 // 2 - 4 // 2 :][:, :4]
        assert torch.equal(ours.v.pos_embed[0, 2:], grid.reshape(48, -1))
    teachers, _ = distill.load_teachers(
        [tmp_path / "long" / "best.pt"],
        prep_data.FbankDataset(short, "train"),
        argparse.Namespace(fold=None),
        torch.device("cpu"),
    )
    data, (net, scale, offset) = prep_data.FbankDataset(short, "train"), teachers[0]
    x = torch.stack([data[i][0] for i in range(4)])
    student_sees = prep_data.normalise(x, data.mean, data.std)
    want = ours(prep_data.normalise(x, meta["mean"], meta["std"]))
    torch.testing.assert_close(net(scale * student_sees + offset), want, atol=1e-4, rtol=1e-4)


def test_the_rate_on_esc50_depends_on_what_the_weights_have_heard(tmp_path):
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "deit.pth")
    torch.save({"module.v.cls_token": torch.zeros(1)}, tmp_path / "audio.pth")
    for name, lr in (("deit", 1e-4), ("audio", 1e-5)):
        assert settings("--model", "ast-base", "--pretrained", tmp_path / f"{name}.pth", data=ESC).lr == lr


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("train_teacher.py", ["--data", "nowhere", "--model", AST], "nowhere is no prepared folder"),
        ("train_teacher.py", ["--data", "MULTI", "--model", "resnet"], "unknown model 'resnet'"),
        ("train_teacher.py", ["--data", "MULTI", "--model", AST, "--fold", 1], "has no fold 1"),
        ("train_teacher.py", ["--data", "FOLDS", "--model", AST], "give --fold"),
        ("train_teacher.py", ["--data", "FOLDS", "--model", AST, "--fold", 9], "has no fold 9"),
        ("train_teacher.py", ["--data", "MULTI", "--model", AST, "--pretrained", "gone.pth"], "gone.pth"),
        ("train_teacher.py", ["--data", "MULTI", "--model", CNN, "--pretrained", "imagenet"], "--pretrained"),
        ("distill.py", ["--data", "MULTI", "--model", AST, "--teacher", "gone.pt"], "gone.pt"),
        ("distill.py", ["--data", "MULTI", "--model", AST, "--teacher", "gone.pt", "--lam", 2], "--lam"),
        ("distill.py", ["--data", "MULTI", "--model", AST, "--teacher", "gone.pt", "--lam", "nan"], "--lam"),
        ("distill.py", ["--data", "MULTI", "--model", AST, "--teacher", "TEACHER", "--tau", "nan"], "--tau"),
        ("distill.py", ["--data", "MULTI", "--model", AST, "--teacher", "TEACHER", "--tau", "inf"], "--tau"),
        ("evaluate.py", ["--ckpt", "gone.pt"], "gone.pt"),
        ("evaluate.py", ["--average", "gone"], "gone"),
        ("evaluate.py", ["--summary", "gone"], "gone"),
        ("prep_data.py", ["esc50", "--root", "gone"], "gone does not exist"),
        ("prep_data.py", ["fsd50k", "--root", "."], "FSD50K.ground_truth"),
    ],
)
def test_bad_input_gets_one_sentence(script, flags, words, multi, folds, teacher, tmp_path, monkeypatch):
    flags = [{"MULTI": multi, "FOLDS": folds, "TEACHER": teacher / "best.pt"}.get(f, f) for f in flags]
    if script in ("train_teacher.py", "distill.py"):
        flags += ["--out", tmp_path / "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = inside(script, *flags)
    assert said.startswith("error: ") and words in said and "\n" not in said
    assert not (tmp_path / "out" / "ep-00.pt").exists()


def test_an_unknown_dataset_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "prep_data.py", "fsd51k"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2 and "invalid choice: 'fsd51k'" in done.stderr
    done = subprocess.run(
        ["bash", ROOT / "run_all.sh", "fsd51k"], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "fsd51k" in done.stderr


NAME = '-it\'s $(touch pwned) "ü" %s {0};'  # of a folder: nothing in it may be taken for more than a name


@pytest.fixture
def run_all(folds, tmp_path):
    """-> a function that starts run_all.sh on a prepared folder of an odd name, below tmp_path."""
    shutil.copytree(folds, tmp_path / NAME)
    names = {"CNN": CNN, "AST": AST, "PRETRAINED_CNN": "no", "PRETRAINED_AST": "no", "EPOCHS": "1", "FOLDS": "2"}

    def start(**knobs):
        env = os.environ | names | {"PYTHON": sys.executable} | knobs
        line, pipe = ["bash", ROOT / "run_all.sh", NAME], subprocess.PIPE
        return subprocess.Popen(
            line, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=env, start_new_session=True
        )

    return start


def test_run_all_does_everything_once(run_all, tmp_path):
    run = run_all()
    said, errors = run.communicate(timeout=600)
    assert run.returncode == 0, said + errors
    exp = tmp_path / "exp" / NAME
    cnn = CNN.replace(":", "-")
    runs = [f"{cnn}-fold2-s0", f"{AST}-fold2-s0", f"{AST}-from-{cnn}-fold2-s0", f"{cnn}-from-{AST}-fold2-s0"]
    assert sorted(p.name for p in exp.iterdir() if p.is_dir()) == sorted(runs)
    table = (exp / "summary.md").read_text()
    assert table in said and sum(line.startswith("| ") for line in table.splitlines()) == 5
    written = {p: p.stat().st_mtime_ns for run in runs for p in (exp / run).glob("*.pt")}
    again = run_all()
    said, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and said.count("trained already") == 4 and "=== evaluate" not in said
    assert written == {p: p.stat().st_mtime_ns for run in runs for p in (exp / run).glob("*.pt")}
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, "exp"]  # nothing was run from the name


@pytest.mark.slow
def test_run_all_killed_again_and_again_ends_in_the_same_table(run_all, tmp_path):
    whole = run_all(EXP="exp/whole")
    began = time.monotonic()
    assert not whole.wait(600)
    took, rng, kills = time.monotonic() - began, np.random.default_rng(0), 0
    while kills < 12:
        run = run_all(EXP="exp/killed")
        try:
            run.wait(rng.uniform(0, took / 3))
            break
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            kills += 1
    run = run_all(EXP="exp/killed")
    assert run.wait(600) == 0
    tables = [(tmp_path / "exp" / name / "summary.md").read_text().split("\n", 1) for name in ("whole", "killed")]
    assert tables[0][1] == tables[1][1] and kills > 2
    print(f"{kills} kills of run_all.sh, the same table")


def test_the_log_is_never_behind_the_weights(multi, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["train_teacher.py", "--data", str(multi), "--model", CNN, "--out", str(tmp_path), *map(str, TINY)]
    )
    save = train_teacher.save_last

    def save_and_die(*args, **more):
        save(*args, **more)
        raise RuntimeError("killed")

    monkeypatch.setattr(train_teacher, "save_last", save_and_die)
    with pytest.raises(RuntimeError, match="killed"):
        train_teacher.main()
    assert (
        len((tmp_path / "log.jsonl").read_text().splitlines())
        == len(models.read_checkpoint(tmp_path / "last.pt")["history"])
        == 1
    )
