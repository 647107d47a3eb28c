"""analyze.py on cases with a known answer, and its command lines on toy runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import AST, CNN, drawn, in_ranks, inside, write_prepared
from torch import nn

import analyze
import dataset
import evaluate
import models

pytestmark = pytest.mark.usefixtures("undrawn")
CPU = torch.device("cpu")
META = {"mean": -6.0, "std": 3.0, "args": {}}


@pytest.fixture(scope="module")
def runs(multi, toy, tmp_path_factory):
    """Folders of toy runs: an AST of two epochs, two seeds of a CNN, and CNNs taught by each of the AST's epochs."""
    root, flags = (
        tmp_path_factory.mktemp("exp"),
        ("--data", multi, "--pretrained", "no", "--keep-epochs", "--epochs", 2),
    )
    for name, model, seed in (("ast-s0", AST, 0), ("cnn-s0", CNN, 0), ("cnn-s1", CNN, 1)):
        inside("train_teacher.py", *flags, "--model", model, "--seed", seed, "--lr", 1e-3, "--out", root / name)
    for epoch in (1, 2):
        teacher = root / "ast-s0" / f"ep-0{epoch}.pt"
        inside("distill.py", *flags, "--model", CNN, "--teacher", teacher, "--out", root / f"cnn-from-ast{epoch}-s0")
    return root


def content(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def figured(*line, out):
    """What a command line prints, and the content of its file beside its two figures."""
    with drawn():
        output = inside("analyze.py", *line, "--out", out)
    for kind in ("png", "pdf"):
        assert (out / f"{line[0]}.{kind}").stat().st_size > 5000
    return output, content(out, line[0])


# ------------------------------------------------------------------------------------------------------ robustness


def disturbed(data, kind, level, seed=0, clips=None):
    """(before, after) of these clips, normalised"""
    clips = np.arange(len(data)) if clips is None else clips
    x = data.batch(clips)[0].float()
    disturb = analyze.disturbance(kind, level, seed, data, CPU)
    after = dataset.augment(x, *disturb(clips), META["mean"], META["std"])
    return dataset.normalise(x, META["mean"], META["std"]), after


@pytest.mark.parametrize(("kind", "level", "width"), [("frequency mask", 48, 48), ("time mask", 40, 12)])
def test_a_mask_is_as_wide_as_its_level_and_becomes_the_normalised_zero(multi, kind, level, width):
    data = dataset.FbankDataset(multi, "eval")
    data.rows, data.frames = data.rows[:6], data.frames[:6]
    before, after = disturbed(data, kind, level)
    if kind == "time mask":
        before, after = before.mT, after.mT  # (B, F, T): masked cells are in columns
    starts = set()
    for a, b in zip(before, after):
        masked = (b == 1.0).all(0)  # (0 + 6) / (2 * 3)
        at = torch.nonzero(masked)[:, 0]
        assert torch.equal(b[:, ~masked], a[:, ~masked])
        inside = at[: width if kind == "frequency mask" else None]  # padding is 1.0, too
        assert width <= len(at) and (inside[:width].diff() == 1).all()
        starts.add(int(at[0]))
    assert len(starts) > 3


def test_shift_is_circular_and_noise_is_uniform(multi):
    data = dataset.FbankDataset(multi, "eval")
    before, after = disturbed(data, "time shift", 10)
    shifts = [next(s for s in range(-10, 11) if torch.equal(b, a.roll(s, 0))) for a, b in zip(before, after)]
    assert len(set(shifts)) > 5 and min(shifts) < 0 < max(shifts)
    before, after = disturbed(data, "noise", 0.3)
    noise = (after - before).flatten(1)
    assert noise.min() > -1e-6 and noise.max() < 0.3 + 1e-6
    assert noise.mean(1).numpy() == pytest.approx(np.full(len(data), 0.15), abs=0.01)
    assert abs(np.corrcoef(noise)[0, 1:]).max() < 0.1  # each clip has noise of its own


def test_one_more_draw_of_the_augmentation_is_nothing_here(multi, monkeypatch):
    """README's row 'the augmentation': a new key of `draw`, used in `augment`, is 0 for a disturbance."""
    data, draw, augment = dataset.FbankDataset(multi, "eval"), dataset.draw, dataset.augment
    usual = disturbed(data, "frequency mask", 24)[1]
    monkeypatch.setattr(
        dataset, "draw", lambda rng, size, *a, **k: draw(rng, size, *a, **k) | {"gain": rng.random(size)}
    )
    monkeypatch.setattr(dataset, "augment", lambda x, d, *a: augment(x + d.pop("gain")[:, None, None], d, *a))
    torch.testing.assert_close(disturbed(data, "frequency mask", 24)[1], usual, check_dtype=False)


@pytest.mark.parametrize("kind", analyze.LEVELS)
def test_draws_follow_from_seed_and_level_and_clip_alone(multi, kind):
    data, level = dataset.FbankDataset(multi, "eval"), analyze.LEVELS[kind][0][2]
    every = disturbed(data, kind, level)[1]
    assert torch.equal(disturbed(data, kind, level, clips=np.array([3, 9]))[1], every[[3, 9]])
    assert not torch.equal(disturbed(data, kind, level, seed=1)[1], every)


class OneFrame(nn.Module):
    """Logits from one frame, or from each bin's median over time, which no circular shift changes; knows the classes' bands."""

    def __init__(self, frame=None):
        super().__init__()
        self.frame = frame

    def forward(self, x):
        z = x.median(1).values if self.frame is None else x[:, self.frame]  # (B, F)
        return torch.stack([z[:, 16:28].mean(1), z[:, 40:52].mean(1), z[:, 100:].mean(1)], 1)


def drops_of(monkeypatch, model, data, kinds, levels=None):
    monkeypatch.setattr(evaluate, "open_checkpoint", lambda *_: (model, META, data))
    for kind, values in (levels or {}).items():
        monkeypatch.setitem(analyze.LEVELS, kind, (values, ""))
    return analyze.drops("x.pt", type("Args", (), {"disturb": kinds, "split": "train", "data": None}), CPU)


def test_a_model_that_ignores_time_loses_nothing_under_shift(multi, monkeypatch):
    data = dataset.FbankDataset(multi, "train")
    found = drops_of(monkeypatch, OneFrame(), data, ["time shift"])
    assert found["time shift"].shape == (3, 5) and (found["time shift"] == 0).all()
    found = drops_of(monkeypatch, OneFrame(frame=0), data, ["time shift"])
    assert found["time shift"][:, 2:].min() > 1  # the first frame is now and then padding


def test_a_full_mask_leaves_a_model_nothing_and_the_drop_is_the_hand_computed_one(multi, monkeypatch):
    data = dataset.FbankDataset(multi, "train")
    full = {"frequency mask": (128,), "time mask": (100,)}
    found = drops_of(monkeypatch, OneFrame(), data, list(full), full)
    p, y = evaluate.predict(OneFrame(), data, CPU, META["mean"], META["std"])
    clean = evaluate.scores(p, y, "multi-label")["mAP"]
    blind = y.mean(dtype=np.float64)  # average precision of equal scores is the share of positives
    assert found["clean"] == clean > blind + 0.2
    for kind in full:
        assert found[kind] == pytest.approx(np.full((3, 1), 100 * (clean - blind) / clean))


def test_robustness_command_line_pools_a_label(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "SEEDS", 2)
    paths = [runs / "cnn-s0" / "best.pt", runs / "cnn-s1" / "best.pt", runs / "ast-s0" / "best.pt"]
    output, found = figured("robustness", *paths, "--disturb", "time shift", "noise", out=tmp_path)
    assert list(found) == [*map(str, paths), "cnn"]
    first, second, ast, both = found.values()
    assert ast["label"] == "ast" and ast["score"] == "mAP" and 0 < ast["clean"] <= 1
    assert {k: list(v) for k, v in ast["drop"].items()} == {
        "time shift": ["10", "50", "100", "200", "500"],
        "noise": ["0.05", "0.1", "0.2", "0.3", "0.5"],
    }
    a, b, pool = (entry["drop"]["noise"]["0.5"] for entry in (first, second, both))
    assert pool["mean"] == pytest.approx((a["mean"] + b["mean"]) / 2)
    assert pool["deviation"] == pytest.approx(abs(a["mean"] - b["mean"]) / 2**0.5)
    lines = [line for line in output.splitlines() if line.startswith("cnn ")]
    assert len(lines) == 2 and f"{pool['mean']:.1f} ± {pool['deviation']:.1f}" in lines[1]


def test_robustness_is_the_same_in_two_processes(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "SEEDS", 1)
    line = ("robustness", runs / "cnn-s0", "--disturb", "noise", "--device", "cpu", "--out")
    inside("analyze.py", *line, tmp_path / "one")
    for code, output in in_ranks("analyze.py", *line, tmp_path / "two"):
        assert code == 0, output
    one, two = (content(tmp_path / name, "robustness") for name in ("one", "two"))
    for level, entry in one[str(runs / "cnn-s0" / "best.pt")]["drop"]["noise"].items():
        assert two[str(runs / "cnn-s0" / "best.pt")]["drop"]["noise"][level] == pytest.approx(entry, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ similarity


def test_correlation_equals_numpy():
    rng = np.random.default_rng(0)
    p, q = rng.random((40, 7), np.float32), rng.random((40, 7), np.float32)
    assert analyze.correlation(p, q) == pytest.approx(
        np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q)]), abs=1e-6
    )
    assert analyze.correlation(p, 3 - 2 * p) == pytest.approx(-1)


def test_leading_directions_hold_the_variance():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(100, 4)) - 0.0)
    u = np.linalg.qr(u - u.mean(0))[0]
    z = u * np.sqrt([5, 2.5, 1.5, 1])  # 50, 25, 15 and 10 % of the variance
    widths = {0.3: 1, 0.5: 1, 0.51: 2, 0.75: 2, 0.8: 3, 1.0: 4}
    assert {v: analyze.leading(z + 7, v).shape[1] for v in widths} == widths
    assert abs(analyze.leading(z + 7, 0.7).T @ u[:, :2]) == pytest.approx(np.eye(2), abs=1e-8)


def test_svcca_of_a_linear_image_is_one_and_of_noise_is_the_floor():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2000, 20)) * np.linspace(3, 0.1, 20)
    turn, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    assert analyze.svcca(analyze.leading(z), analyze.leading(5 * z @ turn[:20] - 2)) == pytest.approx(1)
    any_map = rng.normal(size=(20, 30))  # which directions lead changes, but the space of all of them does not
    assert analyze.svcca(analyze.leading(z, 1.0), analyze.leading(z @ any_map, 1.0)) == pytest.approx(1)
    u, v = (analyze.leading(rng.normal(size=(2000, 100))) for _ in range(2))
    floor = 8 / (3 * np.pi) * (u.shape[1] / 2000) ** 0.5  # mean singular value of a Gaussian matrix with variance 1 / N
    assert u.shape[1] > 15 and analyze.svcca(u, v) == pytest.approx(floor, rel=0.15)


@pytest.mark.parametrize("kind", ["ast", "ast-two-heads", "cnn", "hybrid"])
def test_features_and_predictions_come_from_one_pass(multi, toy, kind):
    torch.manual_seed(0)
    if kind == "hybrid":
        model = models.Hybrid("toy_efficientnet", 3, kd_head=True)
    else:
        model = models.build_model(CNN if kind == "cnn" else AST, 3, 30, kd_head=kind == "ast-two-heads")
    data, calls = dataset.FbankDataset(multi, "eval"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    p, z = analyze.predict_with_features(model, META, data, CPU, "")
    assert len(calls) == 1
    x = dataset.normalise(data.batch(range(len(data)))[0].float(), META["mean"], META["std"])
    with torch.no_grad():
        assert z == pytest.approx(model.features(x).numpy(), abs=1e-5)
        assert p == pytest.approx(model(x).sigmoid().numpy(), abs=1e-5)


def test_similarity_command_line(runs, tmp_path):
    paths = [runs / name / "last.pt" for name in ("ast-s0", "cnn-s0", "cnn-from-ast2-s0")]
    output, found = figured("similarity", *paths, out=tmp_path)
    assert found["checkpoints"] == [str(p) for p in paths]
    for key in ("correlation", "svcca"):
        m = np.array(found[key])
        assert m.shape == (3, 3) and m == pytest.approx(m.T) and np.diag(m) == pytest.approx(np.ones(3))
        assert f"{m[0, 1]:.3f}" in output


# ------------------------------------------------------------------------------------------------------- attention


def test_uniform_attention_has_the_hand_computed_distance(multi, toy):
    model = models.build_model(AST, 3, 30)
    for block in model.v.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
    data = dataset.FbankDataset(multi, "eval")
    found = analyze.attention_distance(model, META, data, CPU, "")
    assert model.grid == (12, 2)
    assert found == pytest.approx(np.tile([1 / 2, (12**2 - 1) / (3 * 12)], (2, 1)))  # mean |i - j| over n places


def test_attention_distance_equals_loops_over_the_weights(multi, toy):
    torch.manual_seed(0)
    model = models.build_model(AST, 3, 30).eval()
    for block in model.v.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.4)  # far from uniform
    data = dataset.FbankDataset(multi, "train")
    data.rows, data.frames, data.labels = data.rows[:50], data.frames[:50], data.labels[:50]  # 48 clips are a batch
    found = analyze.attention_distance(model, META, data, CPU, "")
    weights = []
    for block in model.v.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, x, out: weights.append(out))
    with torch.no_grad():
        model(dataset.normalise(data.batch(range(len(data)))[0].float(), META["mean"], META["std"]))
    for layer, a in enumerate(weights):
        a = a[:, :, 2:, 2:]  # without the class tokens
        a = a / a.sum(-1, keepdim=True)
        time = frequency = 0.0
        for i in range(24):
            for j in range(24):
                time += float(a[:, :, i, j].sum()) * abs(i % 2 - j % 2)
                frequency += float(a[:, :, i, j].sum()) * abs(i // 2 - j // 2)
        n = a.shape[0] * a.shape[1] * 24
        assert found[layer] == pytest.approx([time / n, frequency / n], rel=1e-4)


def test_a_batch_that_was_filled_up_counts_its_own_clips_only(multi, toy, monkeypatch):
    torch.manual_seed(0)
    model, data = models.build_model(AST, 3, 30).eval(), dataset.FbankDataset(multi, "eval")
    x = dataset.normalise(data.batch(range(len(data)))[0].float(), META["mean"], META["std"])

    def predict(model, *_, filling=0, **__):  # on a GPU the last batch is filled up with zeros
        with torch.no_grad():
            return model(nn.functional.pad(x, (0, 0, 0, 0, 0, filling))), None

    for measure in (analyze.attention_distance, lambda *a: analyze.predict_with_features(*a)[1]):
        found = []
        for filling in (0, 5):
            monkeypatch.setattr(evaluate, "predict", lambda *a, n=filling, **k: predict(*a, filling=n, **k))
            found.append(measure(model, META, data, CPU, ""))
        assert found[0].shape == found[1].shape and found[1] == pytest.approx(found[0], abs=1e-5)


def test_attention_command_line(runs, tmp_path):
    path = runs / "ast-s0" / "best.pt"
    output, found = figured("attention", f"no KD={path}", f"again={runs / 'ast-s0'}", out=tmp_path)
    assert list(found) == [str(path)]  # the same checkpoint twice
    entry = found[str(path)]
    assert entry["time_ms"] == pytest.approx([100 * v for v in entry["time_patches"]])
    assert entry["mel_bins"] == pytest.approx([10 * v for v in entry["frequency_patches"]])
    assert len(entry["time_ms"]) == 2 and "no KD" in output


# ---------------------------------------------------------------------------------------------- curves and teachers


def test_curves_score_each_epoch_once_and_fall_back_to_the_log(runs, multi, tmp_path, monkeypatch):
    folders = [runs / "cnn-s0", runs / "cnn-s1" / "best.pt", runs / "ast-s0"]
    output, found = figured("curves", *folders, out=tmp_path)
    assert "14 clips of eval and 14 of train" in output
    assert [entry["label"] for entry in found.values()] == ["cnn", "cnn", "ast"]
    entry = found[str(runs / "cnn-s1")]
    log = [json.loads(line) for line in (runs / "cnn-s1" / "log.jsonl").read_text().splitlines()]
    assert entry["loss"] == [e["loss"] for e in log] and entry["val"] == [e["val_score"] for e in log]
    model, meta = models.load_checkpoint(runs / "cnn-s1" / "ep-02.pt")
    p, y = evaluate.predict(model, dataset.FbankDataset(multi, "eval"), CPU, meta["mean"], meta["std"])
    assert entry["scores"]["2"]["eval"] == pytest.approx(evaluate.scores(p, y, "multi-label")["mAP"])
    assert 0 < entry["scores"]["1"]["train"] <= 1
    (tmp_path / "both").mkdir()
    shutil.copy(tmp_path / "curves.json", tmp_path / "both")
    for out in ("both", "val"):  # of another split, scores of training clips are of another number of them
        inside("analyze.py", "curves", runs / "cnn-s0", "--split", "val", "--out", tmp_path / out)
    both, val = (content(tmp_path / out, "curves")[str(runs / "cnn-s0")]["scores"] for out in ("both", "val"))
    assert both["1"]["train"] == val["1"]["train"] and both["1"]["val"] == val["1"]["val"]

    monkeypatch.setattr(evaluate, "main_score", None)  # nothing may be scored again
    assert "lacks" not in inside("analyze.py", "curves", *folders, "--out", tmp_path)
    hidden = (runs / "cnn-s0" / "ep-01.pt").rename(runs / "hidden.pt")
    try:
        assert "lacks" not in inside("analyze.py", "curves", *folders, "--out", tmp_path)
        output, _ = figured("curves", *folders, out=tmp_path / "new")
    finally:
        hidden.rename(runs / "cnn-s0" / "ep-01.pt")
    assert f"{runs / 'cnn-s0'} lacks ep-NN.pt" in output and "validation score" in output
    best = np.mean([found[str(runs / f"cnn-s{s}")]["val"] for s in (0, 1)], 0).max()
    assert f"{100 * best:.4g}" in next(line for line in output.splitlines() if line.startswith("cnn "))


def test_curves_star_the_epoch_that_is_best_on_validation(runs, tmp_path):
    run, out = shutil.copytree(runs / "cnn-s0", tmp_path / "cnn-s0"), tmp_path / "out"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for best in range(1, len(log) + 1):
        lines = (json.dumps(e | {"val_score": float(e["epoch"] == best)}) + "\n" for e in log)
        (run / "log.jsonl").write_text("".join(lines))
        line = next(v for v in inside("analyze.py", "curves", run, "--out", out).splitlines() if v.startswith("cnn "))
        assert [line.split()[i] for i in (6, 9)] == [str(best)] * 2  # of train and of eval
        known = content(out, "curves")[str(run)]["scores"][str(best)]
        assert line.split()[8] == f"{100 * known['eval']:.4g}"


def test_teachers_by_epoch(runs, tmp_path):
    students = [runs / "cnn-s0", runs / "cnn-from-ast1-s0", runs / "cnn-from-ast2-s0"]
    output, found = figured("teachers", *students, out=tmp_path)
    assert found["score"] == "mAP" and [p["teacher_epoch"] for p in found["points"]] == [1, 2]
    assert not list(runs.glob("*/metrics-*")), "the scores of runs are evaluate.py's"
    for epoch, point in enumerate(found["points"], 1):
        teacher, student = runs / "ast-s0" / f"ep-0{epoch}.pt", runs / f"cnn-from-ast{epoch}-s0" / "best.pt"
        assert point["label"] == f"{AST} to {CNN}" and point["teacher"] == str(teacher)
        for path, key in ((teacher, "teacher_score"), (student, "student_score")):
            inside("evaluate.py", "--ckpt", path)
            metrics = path.with_name(f"metrics-{path.stem}-eval.json")
            assert point[key] == json.loads(metrics.read_text())["mAP"]
            metrics.unlink()
    assert len(found["no_kd"][CNN]) == 1 and f"{CNN} without KD" in output


def test_another_folder_of_longer_clips_has_scores_of_its_own(runs, tmp_path):
    """--data of another length resamples an AST's positions, and nothing that was scored on one folder is taken for the other's."""
    other = write_prepared(tmp_path / "longer", {"train": 20, "eval": 12}, True, n_frames=45)
    line = ["analyze.py", "curves", runs / "ast-s0", "--out", tmp_path]
    found = []
    for flags in ((), ("--data", other), ()):
        inside(*line, *flags)
        found.append(content(tmp_path, "curves")[str(runs / "ast-s0")]["scores"]["2"]["eval"])
    assert found[0] == found[2] != found[1]
    line, found = ["analyze.py", "teachers", runs / "cnn-from-ast2-s0", "--out", tmp_path], []
    for flags in ((), ("--data", other), ()):
        inside(*line, *flags)
        [point] = content(tmp_path, "teachers")["points"]
        found.append((point["teacher_score"], point["student_score"]))
    assert found[0] == found[2] and all(a != b for a, b in zip(*found[:2]))


# ------------------------------------------------------------------------------------------------ labels and errors


def test_labels_without_seed_and_fold_unless_they_are_given(tmp_path):
    names = ["a/cnn-fold1-s0/best.pt", "a/cnn-fold2-s10/best.pt", "a/x-s1/best.pt"]
    for name in (*names, "b/cnn-s0/best.pt", "a/x-s1/wa.pt", "a/with=sign/best.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    labels = lambda *items, **options: analyze.labels_of(analyze.parse([str(i) for i in items]), **options)
    one, two, three = (tmp_path / name for name in names)
    assert labels(one, two.parent, f"mine={three}") == ["cnn", "cnn", "mine"]
    assert labels(one, two, by_setting=False) == ["cnn-fold1-s0", "cnn-fold2-s10"]
    assert labels(one, tmp_path / "b/cnn-s0") == ["a/cnn", "b/cnn"]
    assert labels(three, three.parent / "wa.pt") == ["x best", "x wa"]
    assert labels(tmp_path / "a/with=sign") == ["with=sign"]


def test_errors_are_one_sentence(runs, folds, tmp_path):
    def fails(*line):
        return inside("analyze.py", *line, "--out", tmp_path)

    cnn, ast = runs / "cnn-s0" / "best.pt", runs / "ast-s0" / "best.pt"
    assert f"{cnn} is a {CNN}, and attention distance is an AST's" in fails("attention", ast, cnn)
    other = tmp_path / "other" / "best.pt"
    model, meta = models.load_checkpoint(cnn)
    meta |= {"data": str(folds), "task": "single-label"}
    models.save_checkpoint(other, model, **meta | {"args": meta["args"] | {"fold": 1}})
    assert "differ in classes or clips" in fails("similarity", cnn, other)
    (tmp_path / "empty").mkdir()
    for verb, what in (("robustness", "empty"), ("curves", "empty"), ("curves", "absent")):
        assert f"{tmp_path / what} is neither a checkpoint nor a run's folder" in fails(verb, tmp_path / what)
    assert "one of these is given twice" in fails("curves", f"a={cnn}", f"b={cnn}")
    dead = tmp_path / "dead" / "best.pt"
    nn.init.zeros_(model.head.weight)
    nn.init.constant_(model.head.bias, 0.3)
    models.save_checkpoint(dead, model, **meta | {"data": str(folds), "args": meta["args"] | {"fold": 1}})
    assert f"{dead} predicts the same for all classes" in fails("similarity", dead, other)
    assert "none of these checkpoints has a teacher" in fails("teachers", cnn)
    for known in ([str(cnn), str(ast)], [str(tmp_path / "gone.pt")]):
        models.save_checkpoint(other, model, **meta | {"args": meta["args"] | {"fold": 1, "teacher": known}})
        assert f"{other} was taught by {' and '.join(known)}: give students of one" in fails("teachers", other)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copy(cnn, damaged)
    assert f"{damaged / 'log.jsonl'} is missing or damaged" in fails("curves", damaged)
    (damaged / "log.jsonl").write_text('{"epoch": 1\n')
    assert f"{damaged / 'log.jsonl'} is missing or damaged" in fails("curves", damaged)
