"""distill.py: what teacher, student and loss receive, every setting of Tables 5 and 7 against a loop written out here, defaults."""

import argparse
import functools
import inspect
import itertools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import AST, CNN, inside

import dataset
import distill
import models
import train_teacher

pytestmark = pytest.mark.usefixtures("toy")
CPU = torch.device("cpu")
TINY = ["--pretrained", "no", "--epochs", 2, "--batch-size", 24]
LR = 3e-3


def weights(path):
    return models.read_checkpoint(path)["state"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write_teacher(path, name, data, seed=0, n_frames=None, **changes):
    """A checkpoint with random weights and a head that is sure of itself, so that temperatures matter."""
    torch.manual_seed(seed)
    model = models.build_model(name, len(data.classes), n_frames or data.n_frames)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):  # as after training: each channel has its own mean and variance
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
        (model.mlp_head[1] if name == AST else model.head).weight.mul_(200 if name == CNN else 50)
    meta = {
        "classes": data.classes, "mean": data.mean, "std": data.std, "n_frames": n_frames or data.n_frames, "task": data.task,
        "sample_rate": 16000, "data": str(data.root), "epoch": 1, "args": {"fold": data.fold, "seed": 9, "pretrained": "no"},
    }  # fmt: skip
    models.save_checkpoint(path, model, **meta | changes)
    return path


@pytest.fixture(scope="module")
def teachers(multi, toy, tmp_path_factory):
    """Three checkpoints: a CNN, an AST, and a CNN of another normalisation."""
    folder, data = tmp_path_factory.mktemp("teachers"), dataset.FbankDataset(multi, "train")
    return {
        "cnn": write_teacher(folder / "cnn.pt", CNN, data, 1),
        "ast": write_teacher(folder / "ast.pt", AST, data, 2),
        "other": write_teacher(folder / "other.pt", CNN, data, 1, mean=data.mean + 3.0, std=data.std * 1.7),
    }


class Spy:
    """What every model and the loss received, in the order of the calls."""

    def __init__(self, patch):
        self.teacher, self.student, self.losses, self.models, self.hooks = [], [], [], [], []
        loss, wrap = distill.cmkd_loss, models.wrap

        def spied_wrap(model, args, device, trains=True):
            net = wrap(model, args, device, trains)
            see = self.seen(self.student if trains else self.teacher)
            self.hooks.append(net.register_forward_hook(see, with_kwargs=True))
            self.models.append((trains, net))
            return net

        def spied_loss(*args, **options):
            given = inspect.signature(loss).bind(*args, **options)
            given.apply_defaults()
            found = loss(*args, **options)
            self.losses.append((given.arguments, [v.item() for v in found]))
            return found

        patch.setattr(models, "wrap", spied_wrap)
        patch.setattr(distill, "cmkd_loss", spied_loss)

    def seen(self, calls):
        def hook(net, args, options, out):
            cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            facts = {"training": net.training, "grad": torch.is_grad_enabled(), "cast": cast, **options}
            calls.append({"x": args[0].clone(), "out": out, **facts})

        return hook


def distilled(multi, out, patch, flags, model=AST):
    spy = Spy(patch)
    output = inside("distill.py", "--data", multi, "--model", model, "--out", out, *TINY, "--lr", LR, *flags)
    assert not output.startswith("error"), output
    for hook in spy.hooks:  # other tests may call these models later
        hook.remove()
    return spy, output


def settings(data, *flags, model=AST):
    line = ["--data", str(data.root), "--model", model, *map(str, [*TINY, "--lr", LR, *flags])]
    return train_teacher.resolve(train_teacher.parser("").parse_args(line), data)


# ------------------------------------------------------------------------ Tables 5 and 7 against a loop written out

# name: (teachers, flags, lam, tau of each teacher, combine, kl)
SETTINGS = {
    "default": (["cnn"], [], 0.5, [1], "loss", "bernoulli"),
    "conventional": (["cnn"], ["--conventional"], 0.5, [1], "loss", "bernoulli"),
    "lam": (["cnn"], ["--lam", 0.2], 0.2, [1], "loss", "bernoulli"),
    "lam 0": (["cnn"], ["--lam", 0], 0, [1], "loss", "bernoulli"),
    "tau": (["cnn"], ["--tau", 2.5], 0.5, [2.5], "loss", "bernoulli"),
    "softmax": (["cnn"], ["--kl", "softmax"], 0.5, [1], "loss", "softmax"),
    "kd head": (["cnn"], ["--kd-head"], 0.5, [1], "loss", "bernoulli"),
    "ast": (["ast"], [], 0.5, [1], "loss", "bernoulli"),
    "other": (["other"], [], 0.5, [1], "loss", "bernoulli"),
    "other, conventional": (["other"], ["--conventional"], 0.5, [1], "loss", "bernoulli"),
    "two": (["cnn", "ast"], [], 0.5, [1, 1], "loss", "bernoulli"),
    "two, ensemble": (["cnn", "ast"], ["--combine", "ensemble"], 0.5, [1, 1], "ensemble", "bernoulli"),
    "two, taus": (["cnn", "ast"], ["--tau", 3, 1.5], 0.5, [3, 1.5], "loss", "bernoulli"),
    "two, taus, ensemble": (["cnn", "ast"], ["--tau", 3, 1.5, "--combine", "ensemble"], 0.5, [3, 1.5], "ensemble", "bernoulli"),
    "patchout": (["ast"], ["--patchout", 3, 1], 0.5, [1], "loss", "bernoulli"),
    "mixed precision": (["ast"], ["--teacher-precision", "bfloat16"], 0.5, [1], "loss", "bernoulli"),
}  # fmt: skip


def divergence(zt, zk, kl):
    """KL(teacher || student), the definition."""
    if kl == "softmax":
        return (zt.softmax(1) * (zt.log_softmax(1) - zk.log_softmax(1))).sum(1).mean() / zk.shape[1]
    p = zt.sigmoid()
    return (p * (F.logsigmoid(zt) - F.logsigmoid(zk)) + (1 - p) * (F.logsigmoid(-zt) - F.logsigmoid(-zk))).mean()


def by_hand(data, paths, flags, lam, taus, combine, kl):
    """The same training in plain PyTorch, without distill.py: the student after it."""
    teachers = [models.load_checkpoint(p) for p in paths]
    patchout = ["--patchout", 3, 1] if "--patchout" in flags else []
    args = settings(data, *patchout)
    torch.manual_seed(0)
    student = models.build_model(AST, 3, 30, kd_head="--kd-head" in flags)
    optimizer = torch.optim.Adam(student.parameters(), LR, betas=(0.95, 0.999), weight_decay=5e-7)
    student.train()
    for x, y, mixed, keep in itertools.chain(*(dataset.batches(data, args, e, CPU) for e in (1, 2))):
        raw = mixed if "--conventional" in flags else x * 2 * data.std + data.mean
        zt = []
        for (model, meta), tau in zip(teachers, taus, strict=True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="--teacher-precision" in flags):
                zt.append(model((raw - meta["mean"]) / (2 * meta["std"])) / tau)
        zs, zk = student(x, both=True, keep=keep)
        assert (zs is zk) == ("--kd-head" not in flags)
        zt = [sum(zt) / len(zt)] if combine == "ensemble" else zt
        loss_g = -(y * F.logsigmoid(zs) + (1 - y) * F.logsigmoid(-zs)).mean()
        loss = lam * loss_g + (1 - lam) * sum(divergence(z, zk, kl) for z in zt) / len(zt)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def logits(model, data):
    model.eval()
    x = torch.stack([data[i][0] for i in range(len(data))])
    with torch.no_grad():
        return torch.stack(model((x - data.mean) / (2 * data.std), both=True))


@pytest.fixture(scope="module")
def trained(multi, teachers, tmp_path_factory):
    """-> a function: setting -> (folder, spy, output) of its run, which it starts once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name):
        who, flags, *_ = SETTINGS[name]
        with pytest.MonkeyPatch.context() as patch:
            flags = ["--teacher", *(teachers[k] for k in who), *flags]
            return folder / name, *distilled(multi, folder / name, patch, flags)

    return run


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_ends_in_the_weights_of_the_loop_written_out(name, trained, multi, teachers):
    who, *want = SETTINGS[name]
    data, (folder, _, _) = dataset.FbankDataset(multi, "train"), trained(name)
    ours = logits(models.load_checkpoint(folder / "last.pt")[0], data)
    theirs = logits(by_hand(data, [teachers[k] for k in who], *want), data)
    torch.testing.assert_close(ours, theirs, atol=2e-3 if name == "mixed precision" else 2e-4, rtol=0)


def test_all_settings_end_in_pairwise_different_weights(trained, multi):
    data = dataset.FbankDataset(multi, "train")
    found = {k: logits(models.load_checkpoint(trained(k)[0] / "last.pt")[0], data) for k in SETTINGS}
    for a, b in itertools.combinations(found, 2):
        limit = 1e-5 if {a, b} == {"ast", "mixed precision"} else 2e-3
        assert (found[a] - found[b]).abs().max() > limit, (a, b)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_teacher_student_and_loss_receive(name, trained, multi, teachers):
    who, flags, lam, taus, combine, kl = SETTINGS[name]
    data, (_, spy, output) = dataset.FbankDataset(multi, "train"), trained(name)
    args = settings(data, *(["--patchout", 3, 1] if "--patchout" in flags else []))
    batches = list(itertools.chain(*(dataset.batches(data, args, e, CPU) for e in (1, 2))))
    metas = [models.read_checkpoint(teachers[k]) for k in who]
    students = [c for c in spy.student if c["training"]]
    assert len(batches) == len(students) == len(spy.losses) == 4 and len(spy.teacher) == 4 * len(who)
    for step, (x, y, mixed, keep) in enumerate(batches):
        student, (given, _) = students[step], spy.losses[step]
        assert torch.equal(student["x"], x) and student["grad"] and student["both"]
        assert student["keep"] is None if keep is None else torch.equal(student["keep"], keep)
        raw = mixed if "--conventional" in flags else x * 2 * data.std + data.mean
        for n, meta in enumerate(metas):
            call = spy.teacher[step * len(who) + n]
            torch.testing.assert_close(call["x"], (raw - meta["mean"]) / (2 * meta["std"]), atol=1e-5, rtol=0)
            assert torch.equal(call["x"], x) or "other" in who or "--conventional" in flags
            assert not call["training"] and not call["grad"] and call.get("keep") is None
            assert call["cast"] == (torch.bfloat16 if "--teacher-precision" in flags else torch.float32)
            assert torch.equal(given["teacher_logits"][n], call["out"]) and not call["out"].requires_grad
        assert student["cast"] == torch.float32
        assert torch.equal(given["student_logits"], student["out"][0])
        assert torch.equal(given["kd_logits"], student["out"][1]) and torch.equal(given["targets"], y)
        given_tau = given["tau"] if isinstance(given["tau"], list) else [given["tau"]] * len(who)
        assert (given["lam"], given_tau, given["combine"], given["kl"]) == (lam, taus, combine, kl)
        assert given["task"] == "multi-label"
    assert ("has another normalisation: its input is converted" in output) == ("other" in who)


def test_the_log_holds_the_terms_of_the_loss(trained):
    for name in SETTINGS:
        folder, spy, _ = trained(name)
        epochs = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for n, entry in enumerate(epochs):
            want = torch.tensor([v for _, v in spy.losses[2 * n : 2 * n + 2]]).mean(0).tolist()
            assert [entry[k] for k in ("loss", "loss_g", "loss_d")] == pytest.approx(want, rel=1e-5)
            lam = SETTINGS[name][2]
            assert entry["loss"] == pytest.approx(lam * entry["loss_g"] + (1 - lam) * entry["loss_d"], rel=1e-5)


def test_teachers_stay_as_they_are(trained, teachers):
    """No gradient reaches them, batch norms keep their statistics, and none of it is in the student's files."""
    for name in SETTINGS:
        folder, spy, _ = trained(name)
        for path, (_, net) in zip((teachers[k] for k in SETTINGS[name][0]), (m for m in spy.models if not m[0])):
            assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
            fresh, _ = models.load_checkpoint(path)
            x = torch.randn(3, 30, 128)
            torch.testing.assert_close(net(x), fresh(x), atol=1e-3, rtol=1e-4)
        best = models.read_checkpoint(folder / "best.pt")
        assert best["teachers"] == [{"cnn": CNN, "other": CNN, "ast": AST}[k] for k in SETTINGS[name][0]]
        assert best["state"].keys() == models.build_model(**best["model"]).state_dict().keys()
        assert any(k.startswith("kd_head.") for k in best["state"]) == (name == "kd head")
        assert best["args"]["lam"] == SETTINGS[name][2]


def test_single_label_data_are_taught_by_softmax(folds, tmp_path, monkeypatch):
    data = dataset.FbankDataset(folds, "train", 1)
    teacher = write_teacher(tmp_path / "t.pt", AST, data)
    flags = ["--fold", 1, "--teacher", teacher, "--lam", 0.3]
    spy, output = distilled(folds, tmp_path / "kd", monkeypatch, flags, model=CNN)
    assert "no validation split" in output and models.read_checkpoint(tmp_path / "kd" / "best.pt")["epoch"] == 2
    for given, (loss, loss_g, loss_d) in spy.losses:
        zs, zt, y = given["student_logits"], given["teacher_logits"][0], given["targets"]
        assert torch.allclose(y.sum(1), torch.ones(len(y)))
        want_g = -(y * zs.log_softmax(1)).sum(1).mean().item()
        want_d = divergence(zt / 2.5, zs, "softmax").item() * 3  # from an AST to a CNN
        assert [loss_g, loss_d] == pytest.approx([want_g, want_d], rel=1e-4)
        assert loss == pytest.approx(0.3 * want_g + 0.7 * want_d, rel=1e-4)


@pytest.mark.parametrize("model, flags", [(AST, ["--patchout", 3, 1]), (CNN, [])])
def test_lam_1_is_train_teacher_bit_for_bit(model, flags, teachers, multi, tmp_path):
    flags = ["--data", multi, "--model", model, *TINY, *flags]
    inside("train_teacher.py", *flags, "--out", tmp_path / "plain")
    inside("distill.py", *flags, "--out", tmp_path / "kd", "--teacher", teachers["cnn"], teachers["ast"], "--lam", 1)
    for name in ("ep-00.pt", "last.pt", "best.pt"):
        assert same(weights(tmp_path / "plain" / name), weights(tmp_path / "kd" / name))


def test_settings_are_printed_and_a_finished_run_is_compared_with_them(teachers, multi, tmp_path):
    flags = ["--data", multi, "--model", CNN, "--teacher", teachers["cnn"], teachers["cnn"], *TINY]
    output = inside("distill.py", *flags, "--out", tmp_path / "kd")
    assert "epoch  2/2" in output and "lam=0.5" in output and "tau=1.0" in output and "combine=loss" in output
    assert "trained already" in inside("distill.py", *flags, "--out", tmp_path / "kd")
    output = inside("distill.py", *flags, "--out", tmp_path / "kd", "--lam", 0.4)
    assert output.startswith("error: ") and "lam 0.5 -> 0.4" in output


def test_pretrained_weights_are_where_distillation_starts(teachers, multi, tmp_path, monkeypatch):
    model = models.build_model(AST, 3, 30)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    monkeypatch.chdir(tmp_path)
    flags = ["--data", multi, "--model", AST, "--epochs", 1, "--batch-size", 48, "--teacher", teachers["cnn"]]
    inside("distill.py", *flags, "--pretrained", "start.pth")
    run = tmp_path / "exp" / "multi" / "ast-toy-from-timm-toy_efficientnet-s0"
    assert same(weights(run / "ep-00.pt"), model.state_dict())
    # the same paths by other names, the teacher's too
    flags[-1] = teachers["cnn"].parent / ".." / teachers["cnn"].parent.name / teachers["cnn"].name
    assert "trained already" in inside("distill.py", *flags, "--pretrained", tmp_path / "start.pth")


# ------------------------------------------------------------------------------------------------------ temperature


@pytest.mark.parametrize(
    "source, student, kinds, pretrained, want",
    [
        ("fsd50k", "efficientnet-b0", ["ast-base"], "imagenet", 2.5),
        ("fsd50k", "hybrid-b2", ["ast-tiny"], "imagenet", 2.5),
        ("fsd50k", "timm:resnet18", ["ast-tiny"], "no", 2.5),
        ("audioset", "densenet-121", ["ast-base"], "imagenet", 2.5),
        ("fsd50k", "ast-base", ["efficientnet-b0"], "imagenet", 1.0),
        ("fsd50k", "ast-tiny", ["ast-base"], "imagenet", 1.0),
        ("fsd50k", "efficientnet-b0", ["densenet-121"], "imagenet", 1.0),
        ("fsd50k", "efficientnet-b0", ["hybrid-b2"], "imagenet", 1.0),
        ("fsd50k", "efficientnet-b0", ["ast-tiny", "densenet-121"], "imagenet", [2.5, 1.0]),
        ("fsd50k", "ast-base", ["efficientnet-b0", "densenet-121"], "imagenet", 1.0),
        ("esc50", "efficientnet-b2", ["ast-base"], "imagenet", 5.0),
        ("esc50", "ast-base", ["efficientnet-b2"], "weights.pth", 5.0),
        ("esc10", "ast-base", ["efficientnet-b2"], "imagenet", 5.0),
        ("esc50", "efficientnet-b2", ["ast-base"], "no", 1.0),
        ("csv", "efficientnet-b2", ["ast-base"], "imagenet", 2.5),
        ("csv", "ast-base", ["efficientnet-b2"], "no", 1.0),
    ],
)
def test_the_default_temperature_follows_the_direction(source, student, kinds, pretrained, want):
    args = argparse.Namespace(model=student, tau=None, pretrained=pretrained)
    metas = [{"model": {"name": name}, "args": {"pretrained": "imagenet"}} for name in kinds]
    distill.resolve_tau(args, metas, argparse.Namespace(source=source))
    assert args.tau == want


def test_the_temperature_of_esc50_is_1_for_a_teacher_that_started_from_random_weights():
    metas = [{"model": {"name": "ast-tiny"}, "args": {"pretrained": p}} for p in ("no", "imagenet")]
    args = argparse.Namespace(model="efficientnet-b0", tau=None, pretrained="imagenet")
    distill.resolve_tau(args, metas, argparse.Namespace(source="esc50"))
    assert args.tau == [1.0, 5.0]


def test_temperatures_reach_the_loss(multi, teachers, tmp_path, monkeypatch):
    """Of an AST and a CNN to a CNN each has its own."""
    flags = ["--teacher", teachers["cnn"], teachers["ast"], "--epochs", 1]
    spy, output = distilled(multi, tmp_path / "kd", monkeypatch, flags, model=CNN)
    assert "tau=[1.0, 2.5]" in output and {tuple(given["tau"]) for given, _ in spy.losses} == {(1.0, 2.5)}


def test_self_kd_with_the_seed_of_the_teacher_is_said(multi, teachers, tmp_path):
    flags = ["--data", multi, *TINY, "--epochs", 1, "--teacher", teachers["cnn"]]
    for model, seed, twins in ((CNN, 9, True), (CNN, 0, False), (AST, 9, False)):
        output = inside("distill.py", *flags, "--model", model, "--seed", seed, "--out", tmp_path / f"{model}-{seed}")
        assert ("for self-KD give another --seed" in output) == twins


# ----------------------------------------------------------------------------------------------- what a teacher may be


@pytest.mark.parametrize("model", [CNN, AST])
def test_a_teacher_of_another_length_and_normalisation(model, multi, tmp_path, monkeypatch):
    data = dataset.FbankDataset(multi, "train")
    path = write_teacher(tmp_path / "long.pt", model, data, 3, n_frames=50, mean=data.mean - 2, std=data.std / 2)
    spy, output = distilled(multi, tmp_path / "kd", monkeypatch, ["--teacher", path, "--epochs", 1])
    assert "is for 50 frames" in output and "positions are resampled" in output and "its input is converted" in output
    ours, whole = models.load_checkpoint(path, 30)[0], models.load_checkpoint(path)[0]
    if model == AST:  # the grid is cut from its centre
        grid = whole.v.pos_embed[:, 2:].reshape(12, 4, -1)[:, 1:3]
        assert torch.equal(ours.v.pos_embed[0, 2:], grid.reshape(24, -1))
    x = (spy.student[0]["x"] * 2 * data.std + data.mean - (data.mean - 2)) / data.std
    torch.testing.assert_close(spy.teacher[0]["out"], ours(x), atol=1e-3, rtol=1e-4)


def test_what_a_teacher_may_not_be(folds, multi, teachers, tmp_path):
    one = write_teacher(tmp_path / "fold1.pt", CNN, dataset.FbankDataset(folds, "train", 1))
    flags = ["--data", folds, "--model", CNN, "--out", tmp_path / "kd", *TINY, "--teacher"]
    assert "leak" in inside("distill.py", *flags, one, "--fold", 2)
    assert "task" in inside("distill.py", *flags, teachers["cnn"], "--fold", 1)
    foreign = write_teacher(
        tmp_path / "f.pt", CNN, dataset.FbankDataset(folds, "train", 1), classes=["high", "LOW", "noise"]
    )
    output = inside("distill.py", *flags, foreign, "--fold", 1)
    assert "LOW" in output and "classes" in output
    flags[1] = multi
    assert "leak" in inside("distill.py", *flags, write_teacher(tmp_path / "m.pt", CNN, dataset.FbankDataset(multi, "train"), args={"fold": 1}))  # fmt: skip
    assert not (tmp_path / "kd").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["gone.pt"], "gone.pt"),
        (["gone.pt", "--lam", 2], "--lam"),
        (["gone.pt", "--lam", -0.1], "--lam"),
        (["gone.pt", "--lam", "nan"], "--lam"),
        (["TEACHER", "--lam", 1, "--kd-head"], "leaves a head untrained"),
        (["TEACHER", "--tau", "nan"], "--tau"),
        (["TEACHER", "--tau", "inf"], "--tau"),
        (["TEACHER", "--tau", 0], "--tau"),
        (["TEACHER", "--tau", 1, 2], "--tau has 2 values for 1 teachers"),
        (["TEACHER", "TEACHER", "TEACHER", "--tau", 1, 2], "--tau has 2 values for 3 teachers"),
        (["BROKEN"], "is not a readable weight file"),
    ],
)
def test_bad_input_gets_one_sentence(flags, words, multi, teachers, tmp_path):
    shutil.copy(teachers["cnn"], tmp_path / "broken.pt")
    content = bytearray((tmp_path / "broken.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "broken.pt").write_bytes(content)
    flags = [{"TEACHER": teachers["cnn"], "BROKEN": tmp_path / "broken.pt"}.get(f, f) for f in flags]
    output = inside("distill.py", "--data", multi, "--model", CNN, *TINY, "--out", tmp_path / "kd", "--teacher", *flags)
    assert output.startswith("error: ") and words in output and "\n" not in output
    assert not (tmp_path / "kd" / "ep-00.pt").exists()


def test_supervised_training_does_not_take_over_a_distilled_run(trained, multi):
    name = next(iter(SETTINGS))
    flags = ["--data", multi, "--model", AST, *TINY, "--lr", LR, "--out", trained(name)[0]]
    output = inside("train_teacher.py", *flags)
    assert output.startswith("error: ") and "is a run with other settings (teacher [" in output, output


def test_a_teacher_that_was_trained_anew_makes_another_run(multi, tmp_path):
    data, teacher = dataset.FbankDataset(multi, "train"), tmp_path / "t.pt"
    flags = ["--data", multi, "--model", AST, *TINY, "--lr", LR, "--out", tmp_path / "kd", "--teacher", teacher]
    for lr, says in (
        (1e-3, "epoch  2/2"),
        (1e-3, "is trained already"),
        (2e-3, "is a run with other settings (teacher_args ["),
    ):
        write_teacher(teacher, CNN, data, args={"fold": None, "lr": lr})
        assert says in inside("distill.py", *flags)


def test_a_teacher_that_trained_on_makes_another_run(multi, tmp_path):
    """Its best.pt was of its first epoch, and is of a later one when the student resumes."""
    data, teacher = dataset.FbankDataset(multi, "train"), tmp_path / "t.pt"
    flags = ["--data", multi, "--model", AST, *TINY, "--lr", LR, "--out", tmp_path / "kd", "--teacher", teacher]
    for epoch, says in (
        (1, "epoch  2/2"),
        (1, "is trained already"),
        (3, "other settings (teacher_epochs [1] -> [3])"),
    ):
        write_teacher(teacher, CNN, data, epoch=epoch)
        assert says in inside("distill.py", *flags)
    settings = dataset.read_json(tmp_path / "kd" / "args.json")
    dataset.write_json(tmp_path / "kd" / "args.json", {k: v for k, v in settings.items() if k != "teacher_epochs"})
    assert "is trained already" in inside("distill.py", *flags)  # a run of an older version
