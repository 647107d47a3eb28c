"""What a checkpoint does: scores, ensembles, weight averaging, the table of results (Sections 3.2 and 4.6), tags, export.

    python evaluate.py --ckpt exp/demo/efficientnet-b0-s0/best.pt            # scores on the eval split
    python evaluate.py --ckpt exp/x/a-s0/wa.pt exp/x/a-s1/wa.pt              # an ensemble: the mean of probabilities
    python evaluate.py --average exp/fsd50k/ast-base-s0                      # wa.pt from the run's epochs
    python evaluate.py --summary exp/fsd50k                                  # the table of every run
    torchrun --nproc_per_node=8 evaluate.py --ckpt ...                       # the same, sharded
    python evaluate.py --ckpt best.pt --audio dog.wav recordings/            # tags of files, by windows where they are long
    python evaluate.py --ckpt best.pt --export model.onnx                    # or a folder: an AST as Hugging Face holds it

A checkpoint knows its data, fold, classes and normalisation, so --ckpt alone is enough. Scores are written beside it as
metrics-<checkpoint>-<split>.json, per_class-<checkpoint>-<split>.csv and .png, and confusion-<checkpoint>-<split>.png for one
label a clip; ensembles go to exp/<name>/ensemble-<run>/. --ckpt also takes a run's folder, for its best.pt, and that of an AST as
Hugging Face holds it.
"""

import argparse
import collections
import itertools
import json
import math
import os
import pathlib
import re
import sys
import time
import warnings

import numpy as np
import safetensors.torch  # comes with timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.special import ndtri
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

import dataset
import models
from dataset import rank, world

MAIN_SCORE = {"multi-label": "mAP", "single-label": "accuracy"}  # the one that chooses and the one that tables show
SHORTEST = 32  # frames: a CNN's map then has one column


# ---------------------------------------------------------------------------------------------------------- scores


def scores(predictions, targets, task):
    """Scores of predictions (N, C) against targets (N, C) in {0, 1}, or (N,) class indices.

    mAP: macro average precision over the classes that have a positive; mAUC: macro ROC AUC over the classes that have both;
    d_prime = sqrt(2) Phi^-1(mAUC); accuracy: how often the highest class is the label, or for multi-label one of the labels.
    Also per class, (C,) with NaN where undefined: AP, AUC, positives. AP and AUC are scikit-learn's.
    """
    predictions, targets = np.asarray(predictions), np.asarray(targets)
    if targets.ndim == 1:
        targets = np.eye(predictions.shape[1], dtype=bool)[targets]
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {predictions.shape} and targets {targets.shape} differ in shape")
    if task not in MAIN_SCORE:
        raise ValueError(f"unknown task '{task}': use {' or '.join(MAIN_SCORE)}")
    if not np.isfinite(predictions).all():
        raise ValueError("predictions that are not finite: the weights that made them are broken")
    hot = targets > 0.5
    positives = hot.sum(0)
    with warnings.catch_warnings(action="ignore"):  # of classes without a positive, or without a negative
        ap = np.where(positives > 0, average_precision_score(hot, predictions, average=None), np.nan)
        auc = np.atleast_1d(roc_auc_score(hot, predictions, average=None))  # it gives a number for C = 1
        mean_ap, mean_auc = float(np.nanmean(ap)), float(np.nanmean(auc))
    accuracy = float(hot[np.arange(len(hot)), predictions.argmax(1)].mean())
    found = {"mAP": mean_ap, "mAUC": mean_auc, "d_prime": float(math.sqrt(2) * ndtri(mean_auc)), "accuracy": accuracy}
    return found | {"AP": ap, "AUC": auc, "positives": positives}


def plain_scores(found):
    """The single numbers of `scores`, NumPy's too, as JSON holds them: None where one is not finite"""
    return {k: float(v) if math.isfinite(v) else None for k, v in found.items() if np.ndim(v) == 0}


def probabilities(logits, task):
    """logits (..., C) -> probabilities: the one place of sigmoid and softmax"""
    return logits.sigmoid() if task == "multi-label" else logits.softmax(-1)


@torch.no_grad()
def predict(model, data, device, mean, std, batch_size=48, label="predict", precision=None, disturb=None):
    """Probabilities (N, C) float32 and targets (N, C) of a data set, in its order, on every rank: each takes every world-th
    clip. disturb(clips) gives the draws and the noise with which dataset.augment changes these clips (Section 4.3)."""
    model.eval()
    mine, on_gpu = np.arange(rank(), len(data), world()), device.type == "cuda"
    found = torch.zeros(len(data), len(data.classes), device=device)

    def host(at):
        clips = mine[at : at + batch_size]
        x = data.batch(clips)[0]
        return clips, x.pin_memory() if on_gpu and not x.is_cuda else x

    with models.progress(len(mine), label) as bar:
        for clips, x in dataset.prefetch(host, range(0, len(mine), batch_size), device):
            n, x = len(clips), x.to(device, non_blocking=True).float()
            x = dataset.augment(x, *disturb(clips), mean, std) if disturb else dataset.normalise(x, mean, std)
            if on_gpu and n < batch_size:  # the last batch keeps the shape that was compiled
                x = F.pad(x, (0, 0, 0, 0, 0, batch_size - n))
            with models.autocast(device, precision):
                logits = model(x)[:n].float()
            found[clips[0] : clips[-1] + 1 : world()] = probabilities(logits, data.task)
            bar.update(n)
    if world() > 1:
        dist.all_reduce(found)  # a row is 0 in all ranks but one
    y = dataset.targets(torch.from_numpy(data.labels), len(data.classes), data.task)
    return found.cpu().numpy(), y.numpy()


def main_score(model, meta, data, device, label, disturb=None):
    """The score that chooses and that tables show, in [0, 1], of a checkpoint's model on a data set"""
    p, y = predict(model, data, device, meta["mean"], meta["std"], label=label, disturb=disturb)
    return float(scores(p, y, data.task)[MAIN_SCORE[data.task]])


def check_labels(what, meta, data):
    """ValueError unless a checkpoint's classes and task are those of a data set; another clip length is printed."""
    if meta["classes"] != data.classes:
        pairs = itertools.zip_longest(meta["classes"], data.classes, fillvalue="(none)")
        theirs, ours = next((a, b) for a, b in pairs if a != b)
        counts = f"{len(meta['classes'])} and {len(data.classes)}"
        raise ValueError(f"{what} and {data.root} differ in classes ({counts}), first: {theirs} and {ours}")
    if meta["task"] != data.task:
        raise ValueError(f"{what} and {data.root} differ in task: {meta['task']} and {data.task}")
    if meta["n_frames"] != data.n_frames:
        frames = f"{meta['n_frames']} frames, {data.root} has {data.n_frames}"
        print(f"{what} is for {frames}: an AST's positions are resampled")
    tables = [*data.stats["tables"].values()]
    if meta["args"].get("tables", tables) != tables:
        print(f"{what} was trained on another preparation than {data.root}: its training clips may be among these")


def open_for(meta, split, root=None):
    """The data set that a checkpoint belongs to, or another one of the same classes and task."""
    if not (root or meta["data"]):
        raise ValueError("these weights do not name the data that they belong to: give --data, a prepared folder")
    data = dataset.FbankDataset(root or meta["data"], split, meta["args"].get("fold"))
    check_labels("the checkpoint", meta, data)
    return data


def open_checkpoint(path, split, root, device):
    """-> (model on the device, for clips of the data's length, meta, data): a checkpoint and what `open_for` opens for it"""
    model, meta = models.load_checkpoint(path)
    data = open_for(meta, split, root)
    if data.n_frames != meta["n_frames"]:
        model, _ = models.load_checkpoint(path, data.n_frames)
    return model.to(device), meta, data


def report_absent(data):
    """Print the classes that no clip of this split has."""
    names = [data.classes[c] for c in np.setdiff1d(np.arange(len(data.classes)), data.labels)]
    if names:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        count = f"{len(names)} of {len(data.classes)} classes"
        print(f"without a positive in {data.split}, neither learned nor scored there: {count} ({some})")


def check_writable(folder):
    """Make the folder of the results; ValueError, before the work and not after it, if nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}, where the results go, is not writable: name another, or copy the checkpoint")


def score_checkpoints(paths, split, root, device):
    """Score one checkpoint, or the ensemble of several (mean of probabilities); write and print the scores."""
    total, first, start = 0, None, time.time()
    homes = [p if p.is_dir() else p.parent for p in paths]
    out, name = homes[0], "model" if paths[0].is_dir() else paths[0].stem
    if len(paths) > 1:
        runs = dict.fromkeys(re.sub(r"-s\d+$", "", home.absolute().name) for home in homes)
        out = pathlib.Path(os.path.normpath(out / ".." / ("ensemble-" + "+".join(runs))))
    for path, home in zip(paths, homes):
        model, meta, data = open_checkpoint(path, split, root, device)
        check_writable(out if out.exists() else out.parent)
        if first is None:
            first, clips, n_params = meta, (data.classes, data.ids), sum(v.numel() for v in model.parameters())
        if (data.classes, data.ids) != clips:
            raise ValueError(f"{path} and {paths[0]} differ in classes or clips: they cannot be an ensemble")
        label = f"{home.absolute().name} on {split}"
        p, y = predict(model, data, device, meta["mean"], meta["std"], label=label)
        total = total + p / len(paths)
    if rank():
        return
    found = scores(total, y, data.task)
    ap, auc, positives = (found[k] for k in ("AP", "AUC", "positives"))
    facts = {
        "task": data.task, "split": split, "clips": len(data), "listed": data.listed,
        "classes_without_positives": int((positives == 0).sum()), "model": first["model"]["name"],
        "teachers": first.get("teachers", []), "params": n_params, "epoch": first["epoch"],
        "val_score": first.get("val_score"), "checkpoints": [str(p) for p in paths], "data": str(data.root),
        "fold": first["args"].get("fold"), "seed": first["args"]["seed"], "seconds": round(time.time() - start, 1),
    }  # fmt: skip
    metrics, per_class = out / f"metrics-{name}-{split}.json", out / f"per_class-{name}-{split}.csv"
    rows = zip(range(len(ap)), data.classes, positives, ap, auc)
    dataset.write_csv(per_class, ["index", "class", "positives", "AP", "AUC"], rows)
    draw_classes(per_class.with_suffix(".png"), data.classes, ap, positives)
    if data.task == "single-label":
        draw_confusion(out / f"confusion-{name}-{split}.png", data.classes, y.argmax(1), total.argmax(1))
    dataset.write_json(metrics, plain_scores(found) | facts)  # last: a stage whose metrics are there is complete
    report_absent(data)
    print_scores(found, data.classes, ap, positives)
    print(f"{data.count()} clips of {data.root} ({split}) -> {metrics}, {per_class.name}")


def short(name):
    """A class name as it fits into a table or a figure: in one line, and cut"""
    name = " ".join(name.split())
    return name if len(name) <= 40 else name[:39] + "…"


def print_scores(found, classes, ap, positives):
    """The scores in percent (d' is none), and the five best and the five worst classes by AP."""
    values = {k: f"{100 * v:.2f}" for k, v in found.items() if np.ndim(v) == 0 and k != "d_prime"}
    values["d'"] = f"{found['d_prime']:.3f}"
    print("  ".join(f"{k:>8}" for k in values) + "\n" + "  ".join(f"{v:>8}" for v in values.values()))
    order = np.argsort(-ap, kind="stable")[: np.count_nonzero(positives)]  # NaN, of no positives, comes last
    for title, chosen in (("best", order[:5]), ("worst", order[5:][-5:])):
        for c in chosen:
            print(f"{title:>8}  {100 * ap[c]:8.2f}  {short(classes[c])} ({positives[c]} clips)")
            title = ""


def figure(width, height, rows=1, columns=1, grid=None, **options):
    """A matplotlib figure of this size in inches, with a grid along 'x', 'y' or 'both' -> (figure, [axes])"""
    import matplotlib.figure

    style = {"axes.grid": bool(grid), "axes.grid.axis": grid or "both", "grid.alpha": 0.3, "pdf.fonttype": 42}
    matplotlib.rcParams.update(style | {"font.size": 9, "text.parse_math": False})  # a $ in a class name is a $
    fig = matplotlib.figure.Figure((width, height), layout="constrained")
    return fig, list(fig.subplots(rows, columns, squeeze=False, **options).flat)


def save_figure(fig, *paths, dpi=130):
    """Write a figure; the legend, if its lines have labels, in room of its own below it."""
    handles, labels = fig.axes[0].get_legend_handles_labels()
    if labels:
        fits = max(1, int(14 * fig.get_figwidth() / (max(map(len, labels)) + 6)))  # 14 letters an inch, 6 for the line
        rows = math.ceil(len(labels) / fits)
        fig.set_figheight(fig.get_figheight() + 0.19 * rows)
        fig.legend(handles, labels, loc="outside lower center", ncols=math.ceil(len(labels) / rows), frameon=False)
    for path in paths:  # a canvas of 2^16 dots is matplotlib's limit
        dataset.atomic_write(path, lambda p: fig.savefig(p, dpi=min(dpi, 8000 / max(fig.get_size_inches()))))


def draw_classes(path, classes, ap, positives):
    """The AP of every class that has a positive, from the best to the worst, up to a hundred in a column."""
    order = np.argsort(-ap, kind="stable")[: np.count_nonzero(positives)]
    parts = np.array_split(order, max(1, math.ceil(len(order) / 100)))  # the first is as long as any
    fig, axes = figure(1 + 4.5 * len(parts), 1 + 0.16 * len(parts[0]), 1, len(parts), grid="x")
    for ax, part in zip(axes, parts):
        ax.barh(range(len(part)), 100 * ap[part], height=0.7)
        ax.set_yticks(range(len(part)), [f"{short(classes[c])} ({positives[c]})" for c in part], fontsize=7)
        ax.set(xlim=(0, 100), ylim=(len(parts[0]) - 0.5, -0.5), xlabel="AP (%)")
    fig.suptitle(f"mean {100 * np.nanmean(ap):.1f} %, in brackets the clips of a class", fontsize=9)
    save_figure(fig, path)


def draw_confusion(path, classes, true, predicted):
    """What the clips of a class (a row, in shares of it) were taken for; where there is room, with their number."""
    C = len(classes)
    counts = confusion_matrix(true, predicted, labels=np.arange(C))
    fig, (ax,) = figure(3 + 0.18 * C, 3 + 0.18 * C)
    ax.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    names = [short(name) for name in classes]
    ax.set_xticks(range(C), names, fontsize=7, rotation=90)
    ax.set_yticks(range(C), names, fontsize=7)
    ax.set(xlabel="predicted", ylabel="true")
    for i, j in np.argwhere(counts) if C <= 50 else []:
        dark = counts[i, j] > counts[i].sum() / 2
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=6, color="white" if dark else "black")
    save_figure(fig, path)


# ------------------------------------------------------------------------------------------------ weight averaging


def running_means(paths):
    """Yield, from the last of these checkpoint files to the first, the mean of the weights from it to the last: a state
    dict. BatchNorm statistics are averaged like weights; integer counters are the last file's. Sums are in float64."""
    mean = {}
    for n, path in enumerate(reversed(paths), 1):
        state = models.read_checkpoint(path)["state"]
        mean = mean or state
        mean |= {k: (m := mean[k].double()) + (v - m) / n for k, v in state.items() if v.is_floating_point()}
        yield {k: v.float() if v.is_floating_point() else v for k, v in mean.items()}


def average_weights(paths):
    """The mean of the weights in these checkpoint files -> state dict; see running_means"""
    return collections.deque(running_means(paths), maxlen=1).pop()


def average_run(run, device, keep_epochs=False, root=None):
    """Write run/wa.pt by its recipe's protocol (Section 4.6): epochs s..last, s chosen on validation, where every running
    mean is scored, or by the table. Prunes ep-*.pt unless told to keep them."""
    if not (run / "args.json").is_file():
        raise ValueError(f"--average {run}: no run's folder (it has no args.json)")
    args = dataset.read_json(run / "args.json", "epochs", "average", "keep_epochs")
    if rank() == 0:
        dataset.lock(run)
    if not (run / "last.pt").exists() or models.read_checkpoint(run / "last.pt")["epoch"] < args["epochs"]:
        raise ValueError(f"{run} is not trained to its last epoch ({args['epochs']}): run its training command again")
    paths = [run / f"ep-{epoch:02d}.pt" for epoch in range(1, args["epochs"] + 1)]
    pruned = not all(path.exists() for path in paths)
    if args["average"] == "off":
        print(f"{run}: its recipe has no weight averaging")
    elif pruned and (run / "wa.pt").exists():
        print(f"{run} is averaged already")  # and was killed while it pruned
    elif pruned:
        raise ValueError(f"{run} lacks some of ep-01.pt to ep-{args['epochs']:02d}.pt: pruned, or never written")
    else:
        model, meta = models.load_checkpoint(paths[-1])
        if args["average"] == "val":
            best, data = None, open_for(meta, "val", root)
            model.to(device)
            for epoch, mean in zip(range(len(paths), 0, -1), running_means(paths)):
                model.load_state_dict(mean)
                score = main_score(model, meta, data, device, f"average {epoch}-{len(paths)}")
                if best is None or score > best:
                    start, best, state = epoch, score, mean
            print(f"{run}: epochs {start}-{args['epochs']} are best on val, {MAIN_SCORE[data.task]} {100 * best:.2f}")
        else:
            start, best = args["average"], None
            state = average_weights(paths[start - 1 :])
            print(f"{run}: epochs {start}-{args['epochs']}, as the recipe says")
        if rank() == 0:
            model.load_state_dict(state)
            meta |= {"averaged": [start, args["epochs"]], "val_score": best}
            models.save_checkpoint(run / "wa.pt", model, **meta)
            print(f"wrote {run / 'wa.pt'}")
    if world() > 1:
        dist.barrier()  # every rank has read the epochs
    if rank() == 0 and not (keep_epochs or args["keep_epochs"]):
        for path in (found := sorted(run.glob("ep-*.pt"))):  # ep-00 first: run_all.sh sees an interruption
            path.unlink()
        if found:
            print(f"removed {len(found)} ep-NN.pt of {run}: --keep-epochs would have kept them")


# --------------------------------------------------------------------------------------------------------- summary


def whole_seeds(results, key):
    """[the values of a seed, in percent], without seeds that have fewer folds than another"""
    by_seed = {}
    for r in results:
        if r.get(key) is not None:
            by_seed.setdefault(r["seed"], []).append(100 * r[key])
    return [v for v in by_seed.values() if len(v) == max(map(len, by_seed.values()))]


def mean_and_deviation(results, key, one_seed):
    """In percent: mean, and the deviation over seeds, each a whole cross-validation where there are folds; in a table of one
    seed, over its folds."""
    whole = whole_seeds(results, key)
    if not whole:
        return "-"
    values = whole[0] if one_seed else [np.mean(v) for v in whole]
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def setting(run):
    """The name of a run, or of an ensemble of them, without folds and seeds"""
    return re.sub(r"(-fold\d+)?(-s\d+)?(?=\+|$)", "", run)


def read_results(folder):
    """{setting: {checkpoint: [metrics]}} of an experiment; an ensemble stands in the line of its setting."""
    settings, facts = {}, ("task", "model", "params", "teachers", "clips", "seed", "fold")
    for path in sorted(folder.glob("*/metrics-*-eval.json")):
        run = setting(path.parent.name)
        name = path.stem.removeprefix("metrics-").removesuffix("-eval")
        if run.startswith("ensemble-"):
            others = [path.with_name(f"metrics-{c}-eval.json") for c in ("wa", "best")]
            if path != next((p for p in others if p.exists()), path):
                continue  # of one setting's ensembles that of the averaged weights counts, else of the best
            run, name = run.removeprefix("ensemble-"), "ensemble"
        metrics, same = dataset.read_json(path, *facts), settings.setdefault(run, {}).setdefault(name, [])
        check_current(path, name, metrics)
        if any((m["seed"], m["fold"]) == (metrics["seed"], metrics["fold"]) for m in same):
            print(f"{path.parent} has the seed and fold of another run of the row '{run}': rename it if they differ")
        same.append(metrics)
    if not settings:
        raise ValueError(f"{folder} holds no metrics-*-eval.json: score its runs first with --ckpt")
    return settings


def check_current(path, name, metrics):
    """Print it if a run trained on after this file of scores was written."""
    if name in ("best", "last") and (path.parent / "log.jsonl").exists():
        log = read_log(path.parent, "epoch", "val_score")
        by = log["val_score" if name == "best" and "val_score" in log else "epoch"]
        if (now := by.index(max(by)) + 1) != metrics.get("epoch", now):
            print(f"{path} is of epoch {metrics['epoch']}, and {name}.pt now of {now}: score it again")


def summary(folder):
    """Print and write (summary.md) one line for each setting: mean and deviation over its folds and seeds, and draw it."""
    settings = read_results(folder)
    order = sorted(settings, key=lambda g: (len(next(iter(settings[g].values()))[0]["teachers"]) > 0, g))
    every = [r for g in order for found in settings[g].values() for r in found]
    main = MAIN_SCORE.get(every[0]["task"], "mAP")
    other = "mAUC" if main == "mAP" else "mAP"
    titles, found = {"best": "best", "wa": "averaged", "ensemble": "ensemble"}, set().union(*settings.values())
    ckpts = [c for c in titles if c in found] + sorted(found - titles.keys())  # those without a title: last, ep-05, ...
    folds, seeds = (sorted({r[k] for r in every} - {None}) for k in ("fold", "seed"))
    val = ["val"] * any(r.get("val_score") is not None for r in every)  # of the best epoch: it chooses between settings
    columns = [*val, *(f"{titles.get(c, c)} {main}" for c in ckpts), other]
    lines = [["run", "student", "M params", "teachers", "runs", *columns]]
    for g in order:
        first = next(settings[g][c] for c in ckpts if c in settings[g])
        one = first[0]
        runs = str(sum(map(len, whole_seeds(first, main))))
        line = [g, one["model"], f"{one['params'] / 1e6:.1f}", " + ".join(one["teachers"]) or "no KD", runs]
        cells = [(first, "val_score") for _ in val] + [(settings[g].get(c, []), main) for c in ckpts] + [(first, other)]
        lines.append(line + [mean_and_deviation(results, key, len(seeds) == 1) for results, key in cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["| " + " | ".join(v.ljust(w) for v, w in zip(line, widths)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    over = "seeds" + (", each a mean over its folds" if folds else "")
    over = "folds of the one seed" if folds and len(seeds) == 1 else over
    what = f"fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}" if folds else "eval split"
    clips = {r["clips"] for r in every}
    what += f" ({'-'.join(map(str, sorted({min(clips), max(clips)})))} clips)"
    text = f"{folder.name}, {what}; in percent, mean ± standard deviation over {over}\n\n" + "\n".join(rows) + "\n"
    dataset.atomic_write(folder / "summary.md", lambda p: p.write_text(text, "utf-8", "backslashreplace"))
    print(f"{text}\nwrote {folder / 'summary.md'}")
    draw_curves(folder, main)


def read_log(run, *keys):
    """{key: its values by epoch} of a run's log.jsonl, for those of the keys that its first epoch has"""
    path = run / "log.jsonl"
    try:
        log = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {k: [e[k] for e in log] for k in keys if k in log[0]}
    except (OSError, IndexError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is missing or damaged: leave its run out (remove it), or train it again") from e


def draw_curves(folder, main):
    """summary.png: the main score on validation, of every run by epoch, with and without KD (as Figure 3)."""
    fig, (ax,) = figure(7, 4.2, grid="both")
    for path in sorted(folder.glob("*/log.jsonl")):
        log = read_log(path.parent, "val_score", "loss_d")
        if values := [100 * v for v in log.get("val_score", [])]:
            style = "-o" if "loss_d" in log else "--o"
            ax.plot(range(1, len(values) + 1), values, style, ms=3, label=path.parent.name)
    ax.set(xlabel="epoch", ylabel=f"validation {main} (%)")
    if ax.lines:
        save_figure(fig, folder / "summary.png")
        print(f"wrote {folder / 'summary.png'}")


# ------------------------------------------------------------------------------------------------------------ tags


def stream_audio(path, window, hop):
    """Yield (start in s, (samples,) float32 at 16 kHz): `window` s of an audio file every `hop` s, read blockwise from disk.

    Each window equals prep_data.load_audio of the whole file cut there. The last one ends at the file's end and may be shorter; an
    end of less than one frame (25 ms) is left out. A file shorter than the window comes once, at its own length.
    Raises what load_audio raises, also in the middle of the file, and ValueError for a file shorter than one frame.
    """
    import prep_data

    Hz = dataset.SAMPLE_RATE
    n, x, second = round(window * Hz), torch.empty(0), 0  # x: in memory, from this second of the file on
    with prep_data.open_audio(path) as f:
        rate = prep_data.usable_rate(f.samplerate)
        for i in itertools.count():
            start = round(i * hop * Hz)
            done = min(max(0, start // Hz - 1 - second), len(x) // rate)
            second, x = second + done, x[done * rate :]  # for the filter a second before the window, and one after it
            lacking = ((start + n) // Hz + 2 - second) * rate - len(x)
            x = torch.cat([x, prep_data.read_mono(f, max(0, lacking))])
            y = prep_data.resampler(f.samplerate)(x)[start - second * Hz :] if len(x) else x
            if len(y) >= 400:
                yield start / Hz, y[:n]
            elif i == 0:
                raise ValueError("shorter than one frame of 25 ms" if len(x) else "no samples")
            if len(y) <= n:  # the file's end
                return


def open_taggers(a, device):
    """The checkpoints of --ckpt, window and hop in s, whether to tag frames; ValueError for flags that do not fit them."""
    loaded = [(model.to(device), meta) for model, meta in map(models.load_checkpoint, a.ckpt)]
    first = loaded[0][1]
    limit = min([m.n_frames / 100 for m, _ in loaded if isinstance(m, models.AST)], default=math.inf)  # s
    for path, (_, meta) in zip(a.ckpt, loaded):
        if (meta["classes"], meta["task"]) != (first["classes"], first["task"]):
            raise ValueError(f"{path} and {a.ckpt[0]} differ in classes or task: they cannot be an ensemble")
    window = min(meta["n_frames"] for _, meta in loaded) / 100 if a.window is None else a.window
    hop = window / 2 if a.hop is None else a.hop
    frames = bool(a.frames or a.plot) and len(loaded) == 1 and models.family(first["model"]["name"]) == "cnn"
    for wrong, fault in (
        (not 0.1 <= window <= 3600, f"--window {window:g} is out of range: it must be 0.1 to 3600 s"),
        (not 0.01 <= hop <= window, f"--hop {hop:g} is out of range: it must be 0.01 s to one window, {window:g} s"),
        (window > limit, f"--window {window:g} is longer than the {limit:g} s that this AST takes"),
        (a.frames and not frames, "--frames works with one CNN, no AST, hybrid or ensemble: --json has tags by window"),
        (a.embed and len(loaded) > 1, "--embed writes the features of one checkpoint: give one --ckpt"),
        (a.embed and a.embed.suffix != ".npy", f"--embed {a.embed} must end in .npy"),
        (a.plot and a.plot.suffix not in (".png", ".pdf", ".svg"), f"--plot {a.plot} must end in .png, .pdf or .svg"),
        (a.top < 1, f"--top {a.top} is out of range: it must be at least 1"),
    ):
        if wrong:
            raise ValueError(fault)
    for out in filter(None, (a.json, a.frames, a.embed, a.plot)):
        if out.is_dir():
            raise ValueError(f"{out} is a folder: name a file to write")
        check_writable(out.parent)
    if limit < math.inf:
        print(f"an AST takes {limit:g} s: shorter clips are padded with 0.0 log-mel, as in training")
    return loaded, window, hop, frames


@torch.no_grad()
def tag_file(path, loaded, window, hop, device, bar, frames, embed):
    """-> windows [(start, end, probabilities (C,))] in s, frame tags of the same form that follow each other, features
    (d,); the last two where they are wanted. CNNs and hybrids take a window at its own length, an AST pads it to its own.
    Errors are those of stream_audio."""
    import prep_data

    windows, tags, features = [], [], []
    for start, samples in stream_audio(path, window, hop):
        mel = prep_data.fbank(samples).half().float().to(device)  # (n, F), rounded as a prepared clip
        end, p = start + len(samples) / dataset.SAMPLE_RATE, 0
        for model, meta in loaded:
            T = max(SHORTEST, round(100 * (end - start)))  # as prepared: 998 frames and 2 of 0.0 for 10 s
            T = model.n_frames if isinstance(model, models.AST) else T
            x = dataset.normalise(F.pad(mel, (0, 0, 0, T - len(mel)))[None], meta["mean"], meta["std"])  # (1, T, F)
            with models.autocast(device):
                logits = (model.frame_logits(x) if frames else model(x)[:, None]).float()  # (1, T', C)
                if embed:
                    features.append(model.features(x)[0].float().cpu().numpy())
            p = p + probabilities(logits.mean(1), meta["task"])[0].cpu().numpy() / len(loaded)
        windows.append((start, end, p))
        step = model.backbone.feature_info[-1]["reduction"] / 100 if frames else None  # s
        columns = probabilities(logits[0], meta["task"]).cpu().numpy() if frames else []
        for i, q in enumerate(columns, 1):
            since = tags[-1][1] if tags else 0.0
            till = end if i == len(columns) else start + i * step  # DenseNet drops a part of one
            if till - since > 0.005:  # the next window begins before this one ends
                tags.append((since, till, q))
        bar.update()
    return windows, tags, np.mean(features, 0) if embed else None


def tag(a, device):
    """Print the tags of files, and write what --json, --frames, --embed and --plot ask for. A file that cannot be read is named,
    and the others are tagged before a ValueError ends the command."""
    try:
        import prep_data
    except ImportError as e:
        raise ValueError(f"--audio needs soundfile and torchaudio, and {e.name} is missing: install {e.name}") from e
    loaded, window, hop, frames = open_taggers(a, device)
    files = []
    for path in a.audio:
        below = sorted(map(pathlib.Path, prep_data.files_below(path))) if path.is_dir() else [path]
        if not below:
            raise ValueError(f"--audio {path}: this folder holds no audio ({' '.join(sorted(prep_data.AUDIO))})")
        files += below
    outputs = [a.json, a.frames, a.plot, a.embed, a.embed and a.embed.with_suffix(".txt")]
    outputs = [out.resolve() for out in outputs if out]
    if len({*outputs}) < len(outputs) or {*outputs} & {path.resolve() for path in files}:
        raise ValueError("an output would overwrite a file of --audio or another output (--embed's .txt): rename it")
    classes = loaded[0][1]["classes"]
    best = lambda p: [{"class": classes[c], "probability": round(float(p[c]), 6)} for c in (-p).argsort()[: a.top]]
    found, rows, features, failed = [], [], [], []
    with models.progress(None, "tags", unit="window") as bar:
        for n, path in enumerate(files, 1):
            try:
                windows, tags, z = tag_file(path, loaded, window, hop, device, bar, frames, a.embed)
            except (prep_data.soundfile.SoundFileError, ValueError, OSError) as e:
                why = "its name is not UTF-8: rename it" if isinstance(e, UnicodeEncodeError) else str(e)
                failed.append(f"{path}: {' '.join(why.split())}")
                bar.write(f"skipped {failed[-1]}", file=sys.stderr)
                continue
            p = np.mean([q for *_, q in windows], 0)
            one = {"file": str(path), "seconds": round(windows[-1][1], 3), "tags": best(p)}
            one["windows"] = [{"start": s, "end": round(e, 3), "tags": best(q)} for s, e, q in windows]
            bar.write(as_text(one))
            found.append(one)
            features.append(z)
            name = " ".join(str(path).splitlines())  # in a line of a table
            rows += [(name, f"{s:.2f}", f"{e:.2f}", q) for s, e, q in tags] if a.frames else []
            if a.plot:
                out = a.plot if len(files) == 1 else a.plot.with_stem(f"{a.plot.stem}-{n}")
                draw_tags(out, path, (-p).argsort()[: a.top], classes, tags or windows)
    if a.json and found:
        dataset.write_json(a.json, found)
    if a.frames and found:
        lines = ((*row[:3], *(f"{v:.5f}" for v in row[3])) for row in rows)
        dataset.write_csv(a.frames, ["file", "start", "end", *classes], lines)
    if a.embed and found:
        dataset.atomic_write(a.embed, lambda p: np.save(p, np.stack(features)))
        names = "".join(" ".join(one["file"].splitlines()) + "\n" for one in found)
        dataset.atomic_write(a.embed.with_suffix(".txt"), lambda p: p.write_text(names, encoding="utf-8"))
    if failed:
        raise ValueError(f"{len(failed)} of {len(files)} files could not be tagged, the first is {failed[0]}")


def as_text(one):
    """A file's tags, and below them those of its windows, a line each"""
    lines = [f"{one['file']}  {one['seconds']:.1f} s"]
    lines += [f"    {t['probability']:.3f}  {short(t['class'])}" for t in one["tags"]]
    for w in one["windows"] if len(one["windows"]) > 1 else []:
        tags = ", ".join(f"{short(t['class'])} {t['probability']:.2f}" for t in w["tags"])
        lines.append(f"    {w['start']:.1f} - {w['end']:.1f} s: {tags}")
    return "\n".join(lines)


def draw_tags(out, path, chosen, classes, tags):
    """The log-mel of a file, and under it the probabilities of the chosen classes over time: tags [(start, end, (C,))]."""
    import prep_data

    seconds = tags[-1][1]
    every = max(1, round(seconds * 100 / 4000))  # of so many frames one is drawn
    mel = torch.zeros(0, dataset.N_MELS)
    for _, samples in stream_audio(path, 10, 10):  # one tensor: many small ones fragment the heap
        mel = torch.cat([mel, prep_data.fbank(samples)[::every]])
    height = 0.6 + 0.24 * len(chosen)
    fig, (top, low) = figure(9, 3 + height, 2, sharex=True, height_ratios=(2.4, height))
    top.imshow(mel.T.numpy(), origin="lower", aspect="auto", extent=(0, seconds, 0, dataset.N_MELS), cmap="magma")
    top.set(ylabel="mel bin", title=short(path.name))
    edges = [start for start, _, _ in tags] + [seconds]
    p = np.stack([q[chosen] for *_, q in tags], 1)  # (chosen, W)
    drawn = low.pcolormesh(edges, range(len(chosen) + 1), p, vmin=0, vmax=1, cmap="Greens")
    low.set_yticks(np.arange(len(chosen)) + 0.5, [short(classes[c]) for c in chosen], fontsize=8)
    low.set(xlabel="time (s)", ylim=(len(chosen), 0), xlim=(0, seconds))
    fig.colorbar(drawn, ax=low, label="probability")
    save_figure(fig, out)


# ---------------------------------------------------------------------------------------------------------- export


@torch.no_grad()
def export_onnx(path, model, meta):
    """Write a model as ONNX: `log_mel` (batch, T, 128), normalised, T the checkpoint's frames -> `logits` (batch, C).

    The metadata holds what is needed to use it. Logits and probabilities must equal ours in onnxruntime, or it is not written.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as e:
        raise ValueError(f"--export {path} needs onnx and onnxruntime: pip install onnx onnxruntime") from e
    facts = {k: str(meta[k]) for k in ("mean", "std", "sample_rate", "task", "n_frames")} | {
        "classes": json.dumps(meta["classes"]),
        "model": meta["model"]["name"],
        "input": "log-mel in nats of Kaldi's fbank (16 kHz mono in [-1, 1], 25 ms Hanning windows every 10 ms, DC removed, preemphasis "
        "0.97, 128 bins from 20 Hz, no dither), 0.0 after the end of a clip, then normalised: (x - mean) / (2 std)",
        "output": f"logits: {'sigmoid' if meta['task'] == 'multi-label' else 'softmax'} makes them probabilities",
    }
    x = torch.randn(3, meta["n_frames"], dataset.N_MELS) / 2  # of the spread of normalised log-mel
    names = {"input_names": ["log_mel"], "output_names": ["logits"]}
    names["dynamic_axes"] = {"log_mel": {0: "batch"}, "logits": {0: "batch"}}

    def write(p):
        with warnings.catch_warnings(action="ignore"):  # TorchScript's exporter is the old one, and ten times faster
            torch.onnx.export(model, (x[:2],), p, dynamo=False, **names)
        graph = onnx.load(p)
        onnx.helper.set_model_props(graph, facts)
        onnx.save(graph, p)
        session = onnxruntime.InferenceSession(p, providers=["CPUExecutionProvider"])
        theirs, ours = torch.from_numpy(session.run(None, {"log_mel": x.numpy()})[0]), model(x)
        if not torch.allclose(ours, theirs, 1e-4, 1e-4):
            error = (ours - theirs).abs().max().item()
            raise ValueError(f"{path} was not written: onnxruntime's logits differ from PyTorch's by up to {error:.2g}")

    dataset.atomic_write(path, write)


def export_hugging_face(folder, model, meta):
    """Write an AST as transformers.ASTForAudioClassification and its ASTFeatureExtractor read it: 0.0 log-mel after the end of a
    clip, (x - mean) / (2 std). ValueError for what Hugging Face's AST does not have."""
    if not isinstance(model, models.AST) or model.kd_head is not None:
        what = "an AST with a distillation head" if isinstance(model, models.AST) else meta["model"]["name"]
        raise ValueError(f"--export {folder}: Hugging Face's format has no place for {what}: use --export model.onnx")
    d, blocks, classes = model.v.embed_dim, model.v.blocks, meta["classes"]
    shape = {"num_mel_bins": dataset.N_MELS, "max_length": model.n_frames}
    config = models.AST_CONFIG | shape | {
        "architectures": ["ASTForAudioClassification"], "model_type": "audio-spectrogram-transformer", "dtype": "float32",
        "hidden_size": d, "num_hidden_layers": len(blocks), "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features, "layer_norm_eps": model.v.norm.eps, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "id2label": {str(i): c for i, c in enumerate(classes)},
        "label2id": {c: i for i, c in enumerate(classes)}, "fold": meta["args"].get("fold"),
        "problem_type": meta["task"].replace("-", "_") + "_classification",
    }  # fmt: skip
    audio = {"feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1, "padding_value": 0.0}
    audio |= {"mean": meta["mean"], "std": meta["std"], "do_normalize": True, "return_attention_mask": False}
    state = models.to_hugging_face(model.state_dict())
    write = lambda p: safetensors.torch.save_file(state, p, metadata={"format": "pt"})
    dataset.atomic_write(folder / "model.safetensors", write)
    dataset.write_json(folder / "preprocessor_config.json", audio | shape | {"sampling_rate": meta["sample_rate"]})
    dataset.write_json(folder / "config.json", config)


def export(ckpt, out):
    if len(ckpt) > 1:
        raise ValueError("--export writes one checkpoint: give one --ckpt")
    model, meta = models.load_checkpoint(ckpt[0])
    if out.suffix.lower() in (".pt", ".pth", ".bin", ".safetensors"):
        raise ValueError(f"--export {out}: name a .onnx file, or a folder for an AST as Hugging Face holds it")
    (export_onnx if out.suffix.lower() == ".onnx" else export_hugging_face)(out, model, meta)
    print(f"wrote {out}: {meta['model']['name']}, {len(meta['classes'])} classes, {meta['n_frames']} frames")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path, one_of = pathlib.Path, p.add_mutually_exclusive_group
    add = one_of(required=True).add_argument
    add("--ckpt", type=models.best_of, nargs="+", metavar="FILE", help="score a checkpoint, or the ensemble of several")
    add("--average", type=path, metavar="RUN", help="average the weights of a run's epochs into RUN/wa.pt")
    add("--summary", type=path, metavar="EXP", help="print the table of all runs of a folder exp/NAME")
    add = p.add_argument
    add("--split", default="eval", choices=["train", "val", "eval"], help="what to score (default: eval)")
    add("--data", type=path, help="the prepared folder, where it is not at the place the checkpoint names")
    add("--keep-epochs", action="store_true", help="with --average: do not delete ep-*.pt afterwards")
    add("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    add = one_of().add_argument
    add("--export", type=path, metavar="OUT", help="write model.onnx, or an AST's Hugging Face folder")
    add("--audio", type=path, nargs="+", metavar="PATH", help="files, or folders of them: tag these")
    add = p.add_argument_group("tags of audio files").add_argument
    add("--top", type=int, default=5, help="how many tags (default: 5)")
    add("--window", type=float, help="seconds (default: the clip length of the checkpoint)")
    add("--hop", type=float, help="seconds between the starts of windows (default: half a window)")
    add("--json", type=path, metavar="OUT", help="file, seconds, tags and windows of each file")
    add("--plot", type=path, metavar="OUT", help="log-mel and tags over time; OUT-1, OUT-2, ... of several files")
    add("--frames", type=path, metavar="OUT", help="CSV of a CNN's probabilities every 0.32 s")
    add("--embed", type=path, metavar="OUT", help=".npy of the features (files, d), their names in .txt")
    a = p.parse_args()
    outputs = [f"--{k}" for k in ("window", "hop", "json", "plot", "frames", "embed") if getattr(a, k) is not None]
    if outputs and not a.audio or (a.audio or a.export) and not a.ckpt:
        what = " ".join(outputs) or "--audio and --export"
        raise ValueError(f"{what}: give --ckpt{' and --audio' * bool(outputs)} too")
    if a.summary:
        return summary(a.summary)
    device = models.setup(a.device)
    if a.audio or a.export:
        if rank() == 0:
            tag(a, device) if a.audio else export(a.ckpt, a.export)
    elif a.ckpt:
        score_checkpoints(a.ckpt, a.split, a.data, device)
    else:
        average_run(a.average, device, a.keep_epochs, a.data)


if __name__ == "__main__":
    models.command_line(main)
