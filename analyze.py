"""Why cross-model distillation works (Section 4.3), and the paper's figures.

    python analyze.py teachers exp/demo/*-s0               # Figure 2: student against teacher over the teacher's epochs
    python analyze.py curves exp/demo/*-s?                 # Figure 3: learning curves, of runs with --keep-epochs
    python analyze.py robustness exp/demo/*-s0             # Figure 4: drop of the score on disturbed input
    python analyze.py robustness --disturb "time shift" CMKD=RUN CMKD=RUN self-KD=RUN ...                   # Figure 5
    python analyze.py attention exp/demo/ast-tiny*-s0      # Figure 6: mean attention distance by layer
    python analyze.py similarity exp/demo/*-s0             # Table 6: of predictions and of representations
    torchrun --nproc_per_node=8 analyze.py robustness ...  # only this one is sharded

Each takes checkpoints, or runs (a run's folder stands for its best.pt), prints its numbers, and writes NAME.json,
NAME.png and NAME.pdf to --out. LABEL=PATH gives a label; the default is the run's name without fold and seed. Checkpoints
of one label are pooled: mean and sample deviation. A model with a teacher is a solid line, one without is dashed. Scores
in JSON are in [0, 1].
"""

import argparse
import math
import os
import pathlib

import numpy as np
import torch
from matplotlib.patches import Rectangle

import dataset
import evaluate
import models
from dataset import N_MELS, STRIDE

LEVELS = {  # disturbance: its levels, and their unit (ours: the paper's levels are in its Figure 4 only)
    "frequency mask": ((8, 16, 24, 32, 48, 64), "masked mel bins"),
    "time mask": ((10, 20, 30, 40, 50), "masked frames (%)"),
    "time shift": ((10, 50, 100, 200, 500), "largest shift (frames of 10 ms)"),
    "noise": ((0.05, 0.1, 0.2, 0.3, 0.5), "amplitude of the noise"),
}
SEEDS = 3  # of a disturbance
VARIANCE = 0.3  # share of it that SVCCA's directions hold
FRAME_MS = 10


# ----------------------------------------------------------------------------------------------------- checkpoints


def parse(items):
    """Arguments [LABEL=]PATH -> [(label or "", path of a checkpoint)]; FileNotFoundError for a path that is not there."""
    found = []
    for item in items:
        label, _, path = item.partition("=") if "=" in item and not os.path.exists(item) else ("", "", item)
        path = models.best_of(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is neither a checkpoint nor a run's folder (with best.pt)")
        found.append((label, path))
    return found


def labels_of(items, by_setting=True):
    """The labels of what `parse` found: by default the run's name, `by_setting` without fold and seed; with the folders before
    it that differ, and with the checkpoint's name where one run has several here."""
    runs = [os.path.abspath(path.parent) for _, path in items]
    several = len(set(runs)) < len({path for _, path in items})
    common, labels = os.path.commonpath([os.path.dirname(run) for run in runs]), []
    for (label, path), run in zip(items, runs):
        name = os.path.relpath(run, common)
        labels.append(label or (evaluate.setting(name) if by_setting else name) + f" {path.stem}" * several)
    return labels


def pool(entries, keys):
    """{label: its first entry, with its rows (n, m) under each of the keys}, in the order of the labels. An entry has (m,)
    there, or (seeds, m), which it keeps where it is alone; several of a label give their means, as long as the shortest."""
    pools = {}
    for e in entries:
        pools.setdefault(e["label"], []).append(e)
    for label, own in pools.items():
        rows = {}
        for key in keys:
            each = [np.atleast_2d(e[key]) for e in own]
            shortest = min(r.shape[1] for r in each)
            rows[key] = each[0] if len(own) == 1 else np.array([r.mean(0)[:shortest] for r in each])
        pools[label] = own[0] | rows
    return pools


def spread(rows):
    """(n, ...) -> mean (...), sample deviation (...): 0 of a single row"""
    return rows.mean(0), rows.std(0, ddof=1) if len(rows) > 1 else np.zeros(rows.shape[1:])


# ----------------------------------------------------------------------------------------------- tables and figures


def cells(rows):
    """(n, m) -> m texts, mean ± deviation"""
    return [f"{m:.1f} ± {s:.1f}" if len(rows) > 1 else f"{m:.1f}" for m, s in zip(*spread(rows))]


def print_table(header, rows):
    widths = [max(len(str(v)) for v in column) for column in zip(header, *rows)]
    for line in [header, *rows]:
        print(str(line[0]).ljust(widths[0]), *(str(v).rjust(w) for v, w in zip(line[1:], widths[1:])), sep="  ")
    print()


def draw(pools, panels):
    """A panel for each {key: (x, settings of its axes)}: for every label the mean of its rows under this key, and a band of
    their deviation"""
    rows = 1 + (len(panels) > 3)
    columns = math.ceil(len(panels) / rows)
    fig, axes = evaluate.figure(3.7 * columns, 3.2 * rows, rows, columns, grid="both")
    for ax, (key, (x, settings)) in zip(axes, panels.items()):
        for i, (label, e) in enumerate(pools.items()):
            mean, deviation = spread(e[key])
            at = x[: len(mean)]
            ax.plot(at, mean, "-o" if e["taught"] else "--o", color=f"C{i}", ms=3.5, label=label)
            ax.fill_between(at, mean - deviation, mean + deviation, color=f"C{i}", alpha=0.2, lw=0)
        ax.set(**settings)
    return fig


def save(name, content, fig, out):
    """Write NAME.json, NAME.png and NAME.pdf, and print where."""
    dataset.write_json(out / f"{name}.json", content)
    evaluate.save_figure(fig, out / f"{name}.png", out / f"{name}.pdf", dpi=200)
    print(f"wrote {out / name}.json, .png and .pdf")


# ------------------------------------------------------------------------------------------ robustness, Figures 4, 5


def disturbance(kind, level, seed, data, device):
    """disturb(clips) for evaluate.predict: one disturbance of LEVELS, drawn for each clip from (seed, kind, level), so
    that batches, ranks and checkpoints do not matter. Masks become the normalised 0.0, as in training."""
    n, T = len(data), data.n_frames
    rng = np.random.default_rng([seed, list(LEVELS).index(kind), round(1000 * level)])
    d = {k: 0 * v for k, v in dataset.draw(np.random.default_rng(), n, n).items()}  # nothing
    if kind.endswith("mask"):
        axis, limit, width = ("f", N_MELS, level) if kind == "frequency mask" else ("t", T, round(level / 100 * T))
        d[f"{axis}0"] = rng.integers(limit - width + 1, size=n)
        d[f"{axis}1"] = d[f"{axis}0"] + width
    elif kind == "time shift":
        d["shift"] = rng.integers(-level, level + 1, size=n)
    else:
        d["noise"] = np.full(n, level, np.float32)
    seeds, generator = rng.integers(2**62, size=n).tolist(), torch.Generator(device)

    def disturb(clips):
        noise = torch.zeros(1, 1, 1, device=device)
        if kind == "noise":
            streams = (generator.manual_seed(seeds[i]) for i in clips)
            noise = torch.stack([torch.rand(T, N_MELS, generator=g, device=device) for g in streams])  # (b, T, F)
        return {k: torch.from_numpy(v[clips]).to(device) for k, v in d.items()}, noise

    return disturb


def drops(path, args, device):
    """A checkpoint's clean score, and under each disturbance, (SEEDS, levels), its drop in %: 100 (clean - disturbed) / clean"""
    model, meta, data = evaluate.open_checkpoint(path, args.split, args.data, device)
    clean = evaluate.main_score(model, meta, data, device, f"{path}, clean")
    if not clean > 0:
        raise ValueError(f"{path} scores {clean} on clean input and has nothing to lose: give a trained checkpoint")
    found = {"taught": bool(meta.get("teachers")), "score": evaluate.MAIN_SCORE[data.task], "clean": clean}
    for kind in args.disturb:
        found[kind] = np.zeros((SEEDS, len(LEVELS[kind][0])))
        for seed, i in np.ndindex(found[kind].shape):
            level = LEVELS[kind][0][i]
            label = f"{path}, {kind} {level}, seed {seed + 1} of {SEEDS}"
            disturb = disturbance(kind, level, seed, data, device)
            score = evaluate.main_score(model, meta, data, device, label, disturb)
            found[kind][seed, i] = 100 * (clean - score) / clean
    return found


def robustness(args, device):
    """Drop of the score by disturbance and level. The deviation is over seeds of the disturbance; where several
    checkpoints have one label, over them, each the mean of its seeds."""
    items = parse(args.ckpt)
    labels = labels_of(items)
    entries = [{"label": label} | drops(path, args, device) for label, (_, path) in zip(labels, items)]
    if dataset.rank():
        return
    what, panels = " or ".join(sorted({e["score"] for e in entries})), {}
    pools = pool(entries, ["clean", *args.disturb])
    for kind in args.disturb:
        levels, unit = LEVELS[kind]
        names = {"title": f"Random {kind}", "xlabel": unit, "ylabel": f"drop of {what} (%)"}
        panels[kind] = levels, names | {"xticks": levels, "xticklabels": levels}
        lines = [[label, f"{100 * e['clean'].mean():.1f}", *cells(e[kind])] for label, e in pools.items()]
        print_table([f"{names['ylabel']} by {unit}", "clean", *levels], lines)
    content = {str(path): e for (_, path), e in zip(items, entries)}
    content |= {label: e for label, e in pools.items() if labels.count(label) > 1}
    for key, e in content.items():
        drop = {kind: zip(map(str, LEVELS[kind][0]), *spread(np.atleast_2d(e[kind]))) for kind in args.disturb}
        drop = {kind: {v: {"mean": m, "deviation": s} for v, m, s in levels} for kind, levels in drop.items()}
        content[key] = {k: e[k] for k in ("label", "taught", "score")} | {"clean": np.mean(e["clean"]), "drop": drop}
    save("robustness", content, draw(pools, panels), args.out)


# ------------------------------------------------------------------------------------------------ similarity, Table 6


def correlation(p, q):
    """The mean over clips of Pearson's r, over the classes, between two models' probabilities (N, C)"""
    p, q = (v - v.mean(1, keepdims=True) for v in (np.float64(p), np.float64(q)))
    return float(np.mean((p * q).sum(1) / np.sqrt((p**2).sum(1) * (q**2).sum(1))))


def leading(z, variance=VARIANCE):
    """Representations (N, d) -> (N, k), orthonormal: the leading left singular vectors of the centred z, as many as hold
    this share of its variance (sum of squares). From the (d, d) product: N is larger, and a whole SVD slower."""
    z = np.float64(z) - np.mean(z, 0, np.float64)
    power, directions = (v[..., ::-1] for v in np.linalg.eigh(z.T @ z))  # largest first
    k = 1 + np.searchsorted(np.cumsum(power) / power.sum(), variance - 1e-9)
    return z @ directions[:, :k] / np.sqrt(power[:k])


def svcca(u, v):
    """SVCCA (Raghu et al., 2017) of two models, from the `leading` directions (N, k) and (N, k') of the same clips: the
    mean canonical correlation. Of orthonormal bases these correlations are the singular values of u^T v."""
    return float(np.linalg.svd(u.T @ v, compute_uv=False).clip(max=1).mean())


def predict_with_features(model, meta, data, device, label):
    """-> probabilities (N, C), representations (N, d) as of model.features(x), in one pass: the mean of an AST's two tokens
    after its final norm, or of a CNN's or hybrid's map."""
    is_ast, seen = isinstance(model, models.AST), []
    look = lambda _, x, z: seen.append(z[:, :2].float().mean(1) if is_ast else z.float().mean((2, 3)))  # (b, d)
    with (model.v.norm if is_ast else model.backbone).register_forward_hook(look):
        p, _ = evaluate.predict(model, data, device, meta["mean"], meta["std"], label=label)
    return p, torch.cat(seen)[: len(data)].cpu().numpy()  # predict fills up the last batch


def similarity(args, device):
    """Matrices of prediction correlation and of SVCCA; in the figure a student and its teacher are boxed."""
    items, found, known, first = parse(args.ckpt), [], [], None
    for _, path in items:
        model, meta, data = evaluate.open_checkpoint(path, args.split, args.data, device)
        first = first or data
        if (data.classes, data.task, data.ids) != (first.classes, first.task, first.ids):
            raise ValueError(f"{path} and {items[0][1]} differ in classes or clips: give one data set's and fold's")
        p, z = predict_with_features(model, meta, data, device, str(path))
        if not (np.ptp(p, 1).all() and np.ptp(z, 0).any()):  # of one class, or of a dead model
            raise ValueError(f"{path} predicts the same for all classes or all clips: that correlates with nothing")
        found.append((p, leading(z)))
        known.append([os.path.realpath(t) for t in meta["args"].get("teacher", [])])
    taught = np.array([[os.path.realpath(path) in ours for _, path in items] for ours in known])
    matrices = {"correlation": np.array([[correlation(p, q) for q, _ in found] for p, _ in found])}
    matrices["svcca"] = np.array([[svcca(u, v) for _, v in found] for _, u in found])
    names = labels_of(items, by_setting=False)
    for key, matrix in matrices.items():
        lines = [[f"{i} {name}", *(f"{v:.3f}" for v in row)] for i, (name, row) in enumerate(zip(names, matrix), 1)]
        print_table([key, *range(1, len(names) + 1)], lines)
    content = {"checkpoints": [str(path) for _, path in items]} | {k: m.tolist() for k, m in matrices.items()}
    save("similarity", content, draw_matrices(matrices, names, taught | taught.T), args.out)


def draw_matrices(matrices, names, taught):
    """Heat maps with their numbers, those of a student and its teacher, taught (n, n), in a box"""
    n = len(names)
    fig, axes = evaluate.figure(3.5 + 1.3 * n, 1.8 + 0.6 * n, 1, 2, sharey=True)
    titles = "Prediction correlation (Pearson's r)", f"SVCCA ({VARIANCE:.0%} of the variance)"
    for ax, title, matrix in zip(axes, titles, matrices.values()):
        low = matrix.min()
        ax.imshow(matrix, cmap="Blues", vmin=low - 0.3 * (1 - low) - 1e-6, vmax=1)
        for i, j in np.ndindex(n, n):
            color = "w" if matrix[i, j] > (1 + low) / 2 else "k"
            ax.text(j, i, f"{matrix[i, j]:.3f}", ha="center", va="center", color=color)
            if taught[i, j]:
                ax.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, fill=False, ec="C3", lw=1.5))
        ax.set(title=title, yticks=range(n), yticklabels=names)
        ax.set_xticks(range(n), names, rotation=30, ha="right", rotation_mode="anchor")
    return fig


# ------------------------------------------------------------------------------------- attention distance, Figure 6


def attention_distance(model, meta, data, device, label):
    """Mean attention distance of each layer, in patches, (L, 2): in time, the mean over clips, heads and queries i of
    sum_j A_ij |t_i - t_j|, and in frequency.

    The class tokens have no place: they are no queries here, and a softmax over the patches alone is the row of A
    without their columns, renormalised. Fused attention returns no weights, so q and k are taken from qkv, in float32 and
    one clip at a time: a batch of AST-Base would be 3 GiB. Only sums are kept.
    """
    rows, columns = model.grid
    f, t = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")  # patches are frequency-major
    apart = torch.stack([(v.reshape(-1, 1) - v.reshape(1, -1)).abs() for v in (t, f)]).float().to(device)  # (2, N, N)
    layers = [block.attn for block in model.v.blocks]
    total, clips = torch.zeros(len(layers), 2, dtype=torch.float64, device=device), [0] * len(layers)

    def add(i, attn, qkv):
        qkv = qkv.float().unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, b, H, 2 + N, d / H)
        qkv = qkv[:, : len(data) - clips[i], :, 2:]  # predict fills up the last batch
        clips[i] += qkv.shape[1]
        with torch.autocast(device.type, enabled=False):
            for q, k in zip(attn.q_norm(qkv[0]), attn.k_norm(qkv[1])):
                a = (attn.scale * q @ k.mT).softmax(-1).mean(0)  # (N, N), of the heads' mean
                total[i] += (a * apart).sum((1, 2)) / len(a)

    hooks = [a.qkv.register_forward_hook(lambda _, x, qkv, i=i, a=a: add(i, a, qkv)) for i, a in enumerate(layers)]
    evaluate.predict(model, data, device, meta["mean"], meta["std"], label=label)
    for hook in hooks:
        hook.remove()
    return (total / len(data)).cpu().numpy()


def attention(args, device):
    """Mean attention distance of ASTs by layer"""
    items, entries, panels = parse(args.ckpt), [], {}
    for label, (_, path) in zip(labels_of(items), items):
        model, meta, data = evaluate.open_checkpoint(path, args.split, args.data, device)
        if models.family(meta["model"]["name"]) != "ast":
            raise ValueError(f"{path} is a {meta['model']['name']}, and attention distance is an AST's: give ASTs only")
        t, f = attention_distance(model, meta, data, device, str(path)).T
        entries.append({"label": label, "taught": bool(meta.get("teachers"))})
        entries[-1] |= {"time_patches": t.tolist(), "frequency_patches": f.tolist()}
        entries[-1] |= {"time_ms": (STRIDE * FRAME_MS * t).tolist(), "mel_bins": (STRIDE * f).tolist()}
    x, pools = range(1, len(t) + 1), pool(entries, ["mel_bins", "time_ms"])
    for key, title, unit in (("mel_bins", "Frequency", "mel bins"), ("time_ms", "Time", "ms")):
        names = {"title": title, "xlabel": "layer", "ylabel": f"mean attention distance ({unit})", "xticks": x}
        panels[key] = x, names
        header = [f"attention distance in {title.lower()} ({unit}), layer", *x]
        print_table(header, [[label, *cells(e[key])] for label, e in pools.items()])
    save("attention", {str(path): e for (_, path), e in zip(items, entries)}, draw(pools, panels), args.out)


# ------------------------------------------------------------------------------------------ learning curves, Figure 3


def score_epochs(run, entry, args, device, keep):
    """Score ep-NN.pt on train and --split into entry["scores"] {epoch: {"modified", "train", split}}, where they are not
    there yet; keep() after each. The training clips are as many as those of --split, as scores compare only at one size, and
    without augmentation."""
    splits = {}
    for epoch, known in entry["scores"].items():
        path = run / f"ep-{epoch:>02}.pt"
        if {"train", args.split} <= known.keys() and (not path.exists() or known["modified"] == path.stat().st_mtime):
            continue
        model, meta, data = evaluate.open_checkpoint(path, args.split, args.data, device)
        if not splits:
            name = "train-balanced" if meta["args"].get("recipe") == "audioset-bal" else "train"
            train = evaluate.open_for(meta, name, args.data)
            at = np.linspace(0, len(train) - 1, min(len(data), len(train))).round().astype(int)  # evenly spaced
            train.rows, train.frames, train.labels = train.rows[at], train.frames[at], train.labels[at]
            splits = {args.split: data, "train": train}
            print(f"{run}: scored on {len(data)} clips of {args.split} and {len(train)} of {name}")
        known.clear()
        for split, data in splits.items():
            label = f"{run}, epoch {epoch} of {len(entry['scores'])}, {split}"
            known[split] = evaluate.main_score(model, meta, data, device, label)
        known["modified"] = path.stat().st_mtime
        keep()


def curves(args, device):
    """Training loss (the one against the labels, Loss_g), and train and eval score by epoch; without ep-NN.pt the validation
    score of the log instead. A star marks the epoch that is best on validation, or in the panel where there is none.
    curves.json keeps the scores for a rerun."""
    items, path = parse(args.ckpt), args.out / "curves.json"
    old, data = dataset.read_json(path) if path.exists() else {}, args.data and str(args.data.resolve())
    content, pruned = {}, None
    for label, run in zip(labels_of(items), [path.parent for _, path in items]):
        log, before = evaluate.read_log(run, "loss", "loss_g", "loss_d", "val_score"), old.get(str(run), {})
        scores = before.get("scores", {}) if before.get("data") == data else {}
        scores = {str(e): scores.get(str(e), {}) for e in range(1, len(log["loss"]) + 1)}
        content[str(run)] = {"label": label, "taught": "loss_d" in log, "loss": log.get("loss_g", log["loss"])}
        content[str(run)] |= {"val": log.get("val_score", []), "data": data, "scores": scores}
        if any({"train", args.split} - scores[e].keys() and not (run / f"ep-{e:>02}.pt").exists() for e in scores):
            pruned = pruned or run
    if len(content) < len(items):
        raise ValueError("curves shows whole runs, and one of these is given twice: give each run once")
    has_val, entries = all(c["val"] for c in content.values()), []
    if pruned:
        print(f"{pruned} lacks ep-NN.pt (--keep-epochs keeps them): no score on train and {args.split} by epoch")
    for run, c in content.items():
        panels = {"training loss": c["loss"]}
        if not pruned:
            score_epochs(pathlib.Path(run), c, args, device, lambda: dataset.write_json(path, content))
            for split in ("train", args.split):
                panels[f"{split} score (%)"] = [100 * known[split] for known in c["scores"].values()]
        elif has_val:
            panels["validation score (%)"] = [100 * v for v in c["val"]]
        entries.append(c | panels)
    pools, x = pool(entries, [*panels, *["val"] * has_val]), range(1, max(len(c["loss"]) for c in entries) + 1)
    fig = draw(pools, {key: (x, {"xlabel": "epoch", "ylabel": key}) for key in panels})
    table = {label: [label, [e["label"] for e in entries].count(label)] for label in pools}
    for ax, key in zip(fig.axes, panels):
        ax.xaxis.get_major_locator().set_params(integer=True)
        for i, (label, e) in enumerate(pools.items()):
            mean, is_loss = e[key].mean(0), key == "training loss"
            best = int(mean.argmin() if is_loss else e["val" if has_val else key].mean(0).argmax())
            table[label] += [f"{mean[best]:.4g}", best + 1, f"{mean[-1]:.4g}"]
            if not is_loss:
                ax.plot(best + 1, mean[best], "*", color=f"C{i}", ms=12, mec="k", mew=0.6, zorder=3)
    limits = [v for ax in fig.axes[1:] for v in ax.get_ylim()]
    for ax in fig.axes[1:]:  # side by side: the same scale
        ax.set_ylim(min(limits), max(limits))
    header = [v for key in panels for v in (f"{key}: best", "epoch", "last")]
    print_table(["", "runs", *header], list(table.values()))
    save("curves", content, fig, args.out)


# ------------------------------------------------------------------------------------ teachers over epochs, Figure 2


def teachers(args, device):
    """Student against teacher score over the teacher's epochs; students without a teacher are the dashed baselines."""
    points, baselines = [], {}
    for label, path in parse(args.ckpt):
        model, meta, data = evaluate.open_checkpoint(path, args.split, args.data, device)
        student = evaluate.main_score(model, meta, data, device, str(path))
        name, known = meta["model"]["name"], meta["args"].get("teacher", [])
        if not known:
            baselines.setdefault(name, []).append(student)
            continue
        if len(known) > 1 or not os.path.isfile(known[0]):
            what = f"{path} was taught by {' and '.join(known)}"
            raise ValueError(f"{what}: give students of one checkpoint, in the folder of their training")
        model, theirs, data = evaluate.open_checkpoint(known[0], args.split, args.data, device)
        teacher = evaluate.main_score(model, theirs, data, device, known[0])
        label = label or f"{theirs['model']['name']} to {name}"
        points.append({"label": label, "model": name, "checkpoint": str(path), "student_score": student})
        points[-1] |= {"teacher": known[0], "teacher_score": teacher, "teacher_epoch": theirs["epoch"]}
    if not points:
        raise ValueError("none of these checkpoints has a teacher: give students that distill.py trained")
    what = evaluate.MAIN_SCORE[meta["task"]]
    content = {"score": what, "points": points, "no_kd": baselines}
    save("teachers", content, draw_teachers(points, baselines, what), args.out)


def draw_teachers(points, baselines, what):
    """The table and the figure; points of one label and one epoch of the teacher are pooled."""
    fig, (ax,) = evaluate.figure(4.8, 4.8, grid="both")
    table, colors = [], {}
    for i, label in enumerate(dict.fromkeys(p["label"] for p in points)):
        mine = [p for p in points if p["label"] == label]
        colors.setdefault(mine[0]["model"], f"C{i}")
        by_epoch = {}
        for p in sorted(mine, key=lambda p: p["teacher_epoch"]):
            by_epoch.setdefault(p["teacher_epoch"], []).append((100 * p["teacher_score"], 100 * p["student_score"]))
        (x, dx), (y, dy) = np.transpose([spread(np.array(rows)) for rows in by_epoch.values()])  # (epochs,) each
        ax.errorbar(x, y, dy, dx, "-o", color=f"C{i}", ms=4, lw=1.2, elinewidth=0.8, label=label)
        for (epoch, rows), *point in zip(by_epoch.items(), x, y):
            ax.annotate(epoch, point, (4, -10), textcoords="offset points", fontsize=7)
            table.append([label, epoch, len(rows), *cells(np.array(rows))])
    for name in [name for name in colors if name in baselines]:
        values = 100 * np.array(baselines[name])
        ax.axhline(values.mean(), ls="--", color=colors[name], lw=1, label=f"{name} without KD")
        table.append([f"{name} without KD", "", len(values), "", *cells(values[:, None])])
    ax.set(xlabel=f"teacher's {what} (%), its epoch beside the point", ylabel=f"student's {what} (%)")
    print_table(["", "teacher's epoch", "runs", f"teacher's {what}", f"student's {what}"], table)
    return fig


def main():
    verbs = {verb.__name__: verb for verb in (robustness, similarity, attention, curves, teachers)}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=verbs)
    p.add_argument("ckpt", nargs="+", metavar="[LABEL=]CKPT", help="checkpoints, or folders of runs")
    p.add_argument("--out", type=pathlib.Path, default="figures", help="folder of the results (default: %(default)s)")
    p.add_argument("--split", default="eval", choices=["val", "eval"], help="what to analyse on (default: %(default)s)")
    p.add_argument("--data", type=pathlib.Path, help="the prepared folder (default: the one the checkpoint names)")
    p.add_argument("--disturb", nargs="+", default=list(LEVELS), choices=LEVELS, help="robustness: default all four")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    args = p.parse_args()
    device = models.setup(args.device)
    if dataset.world() > 1 and args.what != "robustness":
        raise ValueError(f"{args.what} runs in one process: start it with python, not with torchrun")
    evaluate.check_writable(args.out)
    verbs[args.what](args, device)


if __name__ == "__main__":
    models.command_line(main)
