"""Scores, ensembles, weight averaging and the table of results (Sections 3.2 and 4.6).

    python evaluate.py --ckpt exp/demo/efficientnet-b0-s0/best.pt            # scores on the eval split
    python evaluate.py --ckpt exp/x/a-s0/wa.pt exp/x/a-s1/wa.pt              # an ensemble: the mean of probabilities
    python evaluate.py --average exp/fsd50k/ast-base-s0                      # wa.pt from the run's epochs
    python evaluate.py --summary exp/fsd50k                                  # the table of every run
    torchrun --nproc_per_node=8 evaluate.py --ckpt ...                       # the same, sharded

A checkpoint knows its data, fold, classes and normalisation, so --ckpt alone is enough. Scores are written beside it as
metrics-<checkpoint>-<split>.json and per_class-<checkpoint>-<split>.csv; ensembles go to exp/<name>/ensemble-<run>/.
"""

import argparse
import json
import math
import os
import pathlib
import re
import statistics
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.special import ndtri
from sklearn.metrics import average_precision_score, roc_auc_score

import dataset
import models
from dataset import rank, world

MAIN_SCORE = {"multi-label": "mAP", "single-label": "accuracy"}  # the one that chooses and the one that tables show


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
    ap, auc = np.full(len(positives), np.nan), np.full(len(positives), np.nan)
    for c in np.flatnonzero(positives):
        ap[c] = average_precision_score(hot[:, c], predictions[:, c])
        if positives[c] < len(hot):
            auc[c] = roc_auc_score(hot[:, c], predictions[:, c])
    mean_auc = float(np.nanmean(auc)) if np.isfinite(auc).any() else math.nan
    return {
        "mAP": float(np.nanmean(ap)) if len(ap[positives > 0]) else math.nan,
        "mAUC": mean_auc,
        "d_prime": float(math.sqrt(2) * ndtri(mean_auc)),
        "accuracy": float(hot[np.arange(len(hot)), predictions.argmax(1)].mean()),
        "AP": ap,
        "AUC": auc,
        "positives": positives,
    }


@torch.no_grad()
def predict(model, data, device, mean, std, batch_size=48, label="predict", precision=None):
    """Probabilities (N, C) float32 and targets (N, C) of a data set, in its order, on every rank.

    The one place of sigmoid and softmax. Ranks take every world-th clip and gather once.
    """
    model.eval()
    mine, found = np.arange(rank(), len(data), world()), []
    on_gpu = device.type == "cuda"

    def host(at):
        x = data.batch(mine[at : at + batch_size])[0]
        return x.pin_memory() if on_gpu and not x.is_cuda else x

    with models.progress(len(mine), label) as bar:
        for x in dataset.prefetch(host, range(0, len(mine), batch_size), device):
            n = len(x)
            x = dataset.normalise(x.to(device, non_blocking=True).float(), mean, std)
            if on_gpu and n < batch_size:  # the last batch keeps the shape that was compiled
                x = F.pad(x, (0, 0, 0, 0, 0, batch_size - n))
            with models.autocast(device, precision):
                logits = model(x)[:n].float()
            found.append(logits.sigmoid() if data.task == "multi-label" else logits.softmax(1))
            bar.update(n)
    found = torch.cat(found) if found else torch.zeros(0, len(data.classes), device=device)
    if world() > 1:
        padded = found.new_zeros(math.ceil(len(data) / world()), found.shape[1])
        padded[: len(found)] = found
        parts = [torch.empty_like(padded) for _ in range(world())]
        dist.all_gather(parts, padded)
        found = torch.stack(parts, 1).flatten(0, 1)[: len(data)]  # clip i was row i // world of rank i % world
    y = dataset.targets(torch.from_numpy(data.labels), len(data.classes), data.task)
    return found.cpu().numpy(), y.numpy()


def check_labels(what, meta, data):
    """ValueError unless a checkpoint's classes and task are those of a data set; another clip length is printed."""
    if meta["classes"] != data.classes:
        pairs = zip([*meta["classes"], "(none)"], [*data.classes, "(none)"])  # a shorter list ends in (none)
        theirs, ours = next((a, b) for a, b in pairs if a != b)
        counts = f"{len(meta['classes'])} and {len(data.classes)}"
        raise ValueError(f"{what} and {data.root} differ in classes ({counts}), first: {theirs} and {ours}")
    if meta["task"] != data.task:
        raise ValueError(f"{what} and {data.root} differ in task: {meta['task']} and {data.task}")
    if meta["n_frames"] != data.n_frames:
        print(
            f"{what} is for {meta['n_frames']} frames, {data.root} has {data.n_frames}: an AST's positions are resampled"
        )


def open_for(meta, split, root=None):
    """The data set that a checkpoint belongs to, or another one of the same classes and task."""
    data = dataset.FbankDataset(root or meta["data"], split, meta["args"].get("fold"))
    check_labels("the checkpoint", meta, data)
    return data


def report_absent(positives, data):
    names = [name for name, n in zip(data.classes, positives) if not n]
    if names:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        count = f"{len(names)} of {len(positives)} classes"
        print(f"without a positive in {data.split}, left out of macro scores: {count} ({some})")


def score_checkpoints(paths, split, root, device):
    """Score one checkpoint, or the ensemble of several (mean of probabilities); write and print the scores."""
    total, first, start = 0, None, time.time()
    out, name = paths[0].parent, paths[0].stem
    if len(paths) > 1:
        runs = dict.fromkeys(re.sub(r"-s\d+$", "", p.parent.name) for p in paths)
        out = paths[0].parent.parent / ("ensemble-" + "+".join(runs))
    for path in paths:
        model, meta = models.load_checkpoint(path)
        if not os.access(out if out.exists() else out.parent, os.W_OK):
            raise ValueError(f"{out} is not writable, and the scores go there: copy the checkpoint elsewhere")
        first = first or meta
        if (meta["classes"], meta["args"].get("fold")) != (first["classes"], first["args"].get("fold")):
            raise ValueError(f"{path} and {paths[0]} differ in classes or fold: they cannot be an ensemble")
        data = open_for(meta, split, root)
        if data.n_frames != meta["n_frames"]:
            model, _ = models.load_checkpoint(path, data.n_frames)
        label = f"{path.parent.name} on {split}"
        p, y = predict(model.to(device), data, device, meta["mean"], meta["std"], label=label)
        total = total + p / len(paths)
        n_params = sum(v.numel() for v in model.parameters())
    if rank():
        return
    found = scores(total, y, data.task)
    ap, auc, positives = (found.pop(k) for k in ("AP", "AUC", "positives"))
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
    finite = {k: v if math.isfinite(v) else None for k, v in found.items()}
    dataset.write_json(metrics, finite | facts)  # last: a stage whose metrics are there is complete
    report_absent(positives, data)
    print("  ".join(f"{k} {100 * found[k]:.2f}" for k in ("mAP", "mAUC", "accuracy")) + f"  d' {found['d_prime']:.3f}")
    clips = f"{len(data)} clips" if data.listed in (None, len(data)) else f"{len(data)} of {data.listed} listed clips"
    print(f"{clips} of {data.root} ({split}) -> {metrics}, {per_class.name}")


# ------------------------------------------------------------------------------------------------ weight averaging


def average_weights(paths):
    """The mean of the weights in these checkpoint files, one file in memory at a time -> state dict.

    BatchNorm statistics are averaged like weights; integer counters come from the last file. Sums are in float64.
    """
    total = None
    for n, path in enumerate(reversed(paths), 1):
        total = running_mean(total, models.read_checkpoint(path)["state"], n)
    if total is None:
        raise ValueError("no files to average")
    return as_weights(total)


def running_mean(total, state, n):
    """The mean of n states from that of n - 1, in float64; integer counters stay those of the first that came."""
    if total is None:
        return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    if total.keys() != state.keys():
        raise ValueError("checkpoints of different models cannot be averaged")
    return {k: total[k] + (v.double() - total[k]) / n if v.is_floating_point() else total[k] for k, v in state.items()}


def as_weights(total):
    return {k: v.float() if v.is_floating_point() else v for k, v in total.items()}


def average_run(run, device, keep_epochs=False):
    """Write run/wa.pt by its recipe's protocol (Section 4.6): epochs s..last, s chosen on validation or by the table.

    The search walks from the last epoch to the first, adding one file at a time to a running mean and scoring every mean: each
    file is read once, and memory holds the mean, the best so far and the model. Prunes ep-*.pt unless told to keep them.
    """
    if rank() == 0:
        dataset.lock(run)
    args = dataset.read_json(run / "args.json")
    if not (run / "last.pt").exists() or models.read_checkpoint(run / "last.pt")["epoch"] < args["epochs"]:
        raise ValueError(
            f"{run} is not trained to its last epoch ({args['epochs']}): finish it with the command that began it"
        )
    epochs = {int(p.stem[3:]): p for p in run.glob("ep-*.pt") if int(p.stem[3:]) > 0}
    if args["average"] == "off":
        print(f"{run}: its recipe has no weight averaging")
    else:
        if sorted(epochs) != list(range(1, args["epochs"] + 1)):
            raise ValueError(
                f"{run} lacks some of ep-01.pt to ep-{args['epochs']:02d}.pt: they were pruned or never written"
            )
        model, meta = models.load_checkpoint(epochs[args["epochs"]])
        if args["average"] == "val":
            total, best = None, -1.0
            data = open_for(meta, "val")
            model.to(device)
            for n, epoch in enumerate(sorted(epochs, reverse=True), 1):
                total = running_mean(total, models.read_checkpoint(epochs[epoch])["state"], n)
                model.load_state_dict(as_weights(total))
                p, y = predict(
                    model, data, device, meta["mean"], meta["std"], label=f"average {epoch}-{args['epochs']}"
                )
                score = scores(p, y, data.task)[MAIN_SCORE[data.task]]
                if score > best:
                    start, best, state = epoch, score, as_weights(total)
            print(f"{run}: epochs {start}-{args['epochs']} are best on val, {MAIN_SCORE[data.task]} {100 * best:.2f}")
        else:
            start, best = args["average"], None
            state = average_weights([epochs[e] for e in range(start, args["epochs"] + 1)])
            print(f"{run}: epochs {start}-{args['epochs']}, as the recipe says")
        if rank() == 0:
            model.load_state_dict(state)
            meta = {k: v for k, v in meta.items() if k not in ("format", "model")}
            meta |= {"averaged": [start, args["epochs"]], "val_score": best}
            models.save_checkpoint(run / "wa.pt", model, **meta)
            print(f"wrote {run / 'wa.pt'}")
    if world() > 1:
        dist.barrier()  # every rank has read the epochs
    if rank() == 0 and not (keep_epochs or args["keep_epochs"]):
        for path in run.glob("ep-*.pt"):
            path.unlink()


# --------------------------------------------------------------------------------------------------------- summary


def mean_and_deviation(results, key):
    """In percent: mean, and the deviation over seeds, each a whole cross-validation where there are folds; over folds where
    there is one seed of several folds (the table's title says which)."""
    results = [r for r in results if r[key] is not None]
    seeds = [[100 * r[key] for r in results if r["seed"] == s] for s in sorted({r["seed"] for r in results})]
    values = [statistics.mean(v) for v in seeds]
    if not values:
        return "-"
    several = values if len(values) > 1 else seeds[0]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(several):.1f}" if len(several) > 1 else "")


def read_results(folder):
    """{setting: {checkpoint: [metrics]}} of an experiment; an ensemble stands in the line of its setting."""
    settings = {}
    for path in sorted(folder.glob("*/metrics-*-eval.json")):
        run = re.sub(r"(-fold\d+)?(-s\d+)?$", "", path.parent.name)
        name = path.stem.removeprefix("metrics-").removesuffix("-eval")
        if run.startswith("ensemble-"):
            run, name = run.removeprefix("ensemble-"), "ensemble"
        settings.setdefault(run, {}).setdefault(name, []).append(dataset.read_json(path))
    if not settings:
        raise ValueError(f"{folder} holds no metrics-*-eval.json: score its runs first with --ckpt")
    return settings


def summary(folder):
    """Print and write (summary.md) one line for each setting: mean and deviation over its folds and seeds, and draw it."""
    settings = read_results(folder)
    order = sorted(settings, key=lambda g: (len(next(iter(settings[g].values()))[0]["teachers"]) > 0, g))
    every = [r for g in order for found in settings[g].values() for r in found]
    main, other = ("mAP", "mAUC") if every[0]["task"] == "multi-label" else ("accuracy", "mAP")
    names = {"best": "best", "wa": "averaged", "ensemble": "ensemble"}
    names |= {c: c for g in order for c in sorted(settings[g]) if c not in names}  # last, ep-05, ...
    names = {c: title for c, title in names.items() if any(c in settings[g] for g in order)}
    val = ["val"] * any(r.get("val_score") for r in every)  # of the best epoch: what chooses between settings
    lines = [["run", "student", "M params", "teachers", "runs", *val, *[f"{t} {main}" for t in names.values()], other]]
    for g in order:
        first = next(settings[g][c] for c in names if c in settings[g])
        one = first[0]
        line = [g, one["model"], f"{one['params'] / 1e6:.1f}", " + ".join(one["teachers"]) or "no KD", str(len(first))]
        line += [mean_and_deviation([r | {"val_score": r.get("val_score")} for r in first], "val_score") for _ in val]
        line += [mean_and_deviation(settings[g].get(c, []), main) for c in names]
        lines.append([*line, mean_and_deviation(first, other)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(v.ljust(w) for v, w in zip(line, widths)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    folds, seeds = (sorted({r[k] for r in every} - {None}) for k in ("fold", "seed"))
    over = "seeds" + (", each a mean over its folds" if folds else "")
    over = "folds of the one seed" if folds and len(seeds) == 1 else over
    what = f"fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}" if folds else "eval split"
    clips = sorted({r["clips"] for r in every})
    what += f" ({'-'.join(map(str, clips[:: len(clips) - 1 or 1]))} clips)"
    text = f"{folder.name}, {what}; in percent, mean ± standard deviation over {over}\n\n" + "\n".join(rows) + "\n"
    dataset.atomic_write(folder / "summary.md", lambda p: p.write_text(text, encoding="utf-8"))
    print(text)
    drawn = draw_curves(folder, main)
    print(f"wrote {folder / 'summary.md'}" + (f" and {drawn}" if drawn else ""))


def draw_curves(folder, score):
    """summary.png: this score on validation, of every run by epoch, with and without KD (as Figure 3)."""
    curves = {}
    for path in sorted(folder.glob("*/log.jsonl")):
        try:
            log = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if log and f"val_{score}" in log[0]:
                curves[path.parent.name] = [100 * e[f"val_{score}"] for e in log]
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is damaged: remove it, the same table is made without its curve") from e
    if not curves:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, values in curves.items():
        ax.plot(range(1, len(values) + 1), values, "-" if "-from-" in name else "--", label=name)
    ax.set(xlabel="epoch", ylabel=f"validation {score} (%)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    dataset.atomic_write(folder / "summary.png", lambda p: fig.savefig(p, dpi=130))
    plt.close(fig)
    return folder / "summary.png"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--ckpt", type=pathlib.Path, nargs="+", metavar="FILE", help="score this checkpoint, or the ensemble of several"
    )
    what.add_argument(
        "--average", type=pathlib.Path, metavar="RUN", help="average the weights of a run's epochs into RUN/wa.pt"
    )
    what.add_argument(
        "--summary", type=pathlib.Path, metavar="EXP", help="print the table of all runs of a folder exp/NAME"
    )
    p.add_argument("--split", default="eval", choices=["train", "val", "eval"], help="what to score (default: eval)")
    p.add_argument(
        "--data", type=pathlib.Path, help="the prepared folder, where it is not at the place the checkpoint names"
    )
    p.add_argument("--keep-epochs", action="store_true", help="with --average: do not delete ep-*.pt afterwards")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    a = p.parse_args()
    if a.summary:
        return summary(a.summary)
    device = models.setup(a.device)
    if a.ckpt:
        score_checkpoints(a.ckpt, a.split, a.data, device)
    elif not (a.average / "args.json").is_file():
        raise FileNotFoundError(f"--average {a.average}: no run here (args.json is missing)")
    else:
        average_run(a.average, device, a.keep_epochs)


if __name__ == "__main__":
    models.command_line(main)
