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
import atexit
import concurrent.futures
import csv
import json
import math
import os
import pathlib
import re
import resource
import statistics
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.special import ndtri
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm import tqdm

import models
import prep_data

MAIN_SCORE = {"multi-label": "mAP", "single-label": "accuracy"}  # the one that chooses and the one that tables show


# -------------------------------------------------------------------------------------------- device and processes


def setup(device=None):
    """The device of this process; under torchrun also joins the group (NCCL on GPUs, gloo on CPU)."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU here: use --device cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    local, n_local = (int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    if n_local > 1:  # torchrun sets OMP_NUM_THREADS to 1, whatever the machine has
        torch.set_num_threads(max(1, prep_data.cores() // n_local))
    elif "OMP_NUM_THREADS" not in os.environ:  # torch does not see a container's quota
        torch.set_num_threads(min(prep_data.cores(), torch.get_num_threads()))
    if use_cuda:
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
        torch.backends.cudnn.benchmark = True  # shapes do not change
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo")
        atexit.register(dist.destroy_process_group)
        if ranks()[0]:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # rank 0 alone speaks
    return torch.device("cuda", local) if use_cuda else torch.device("cpu")


def peak_memory(device):
    """The most memory in use since the process began: of the GPU if there is one, else resident (GiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def ahead(work, steps, device):
    """Yield work(step) for each step; a thread makes the next one while this one is in use."""
    on_gpu = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
    with concurrent.futures.ThreadPoolExecutor(1, **on_gpu) as pool:
        coming = None
        for step in [*steps, None]:
            ready, coming = coming, None if step is None else pool.submit(work, step)
            if ready is not None:
                yield ready.result()


def ranks():
    """(this process's rank, number of processes)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(what, value):
    """ValueError unless every process has the same value: machines that differ would wait for each other for ever."""
    seen = [value] * ranks()[1]
    if len(seen) > 1:
        dist.all_gather_object(seen, value)
    if seen.count(value) < len(seen):
        raise ValueError(f"{what} is not the same for all processes: give every machine the same folders")


def autocast(device):
    """bfloat16 on a GPU. Not on a CPU: where it has AVX512-BF16 it makes AST-Tiny 1.7 times faster and EfficientNet-B0 slower, but
    the scores would then depend on the number of processes; `enabled=True` turns it on."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def progress(total, unit, label, initial=0):
    """A progress bar on rank 0: live on a terminal, a line every half minute in a log."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, unit=unit, desc=label, initial=initial, mininterval=interval, disable=ranks()[0] > 0, leave=False
    )


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
def predict(model, data, device, mean, std, batch_size=48, label="predict"):
    """Probabilities (N, C) float32 and targets (N, C) of a data set, in its order, on every rank.

    The one place of sigmoid and softmax. Ranks take every world-th clip and gather once.
    """
    rank, world = ranks()
    model.eval()
    mine, found = np.arange(rank, len(data), world), []
    on_gpu = device.type == "cuda"

    def host(at):
        x = data.fetch(mine[at : at + batch_size])[0]
        return x.pin_memory() if on_gpu and not x.is_cuda else x

    with progress(len(mine), "clip", label) as bar:
        for x in ahead(host, range(0, len(mine), batch_size), device):
            n = len(x)
            x = prep_data.normalise(x.to(device, non_blocking=True).float(), mean, std)
            if on_gpu and n < batch_size:  # the last batch keeps the shape that was compiled
                x = F.pad(x, (0, 0, 0, 0, 0, batch_size - n))
            with autocast(device):
                logits = model(x)[:n].float()
            found.append(logits.sigmoid() if data.task == "multi-label" else logits.softmax(1))
            bar.update(n)
    found = torch.cat(found) if found else torch.zeros(0, len(data.classes), device=device)
    if world > 1:
        padded = found.new_zeros(math.ceil(len(data) / world), found.shape[1])
        padded[: len(found)] = found
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        found = torch.stack(parts, 1).flatten(0, 1)[: len(data)]  # clip i was row i // world of rank i % world
    y = prep_data.targets(torch.from_numpy(data.labels), len(data.classes), data.task)
    return found.cpu().numpy(), y.numpy()


def check_same(what, meta, data):
    """ValueError unless a checkpoint's classes and task are those of a data set; another clip length is said."""
    if meta["classes"] != data.classes:
        pairs = zip([*meta["classes"], "(none)"], [*data.classes, "(none)"])  # a shorter list ends in (none)
        theirs, ours = next((a, b) for a, b in pairs if a != b)
        raise ValueError(
            f"{what} and {data.root} differ in classes ({len(meta['classes'])} and {len(data.classes)}), first: {theirs} and {ours}"
        )
    if meta["task"] != data.task:
        raise ValueError(f"{what} and {data.root} differ in task: {meta['task']} and {data.task}")
    if meta["n_frames"] != data.n_frames:
        print(
            f"{what} is for {meta['n_frames']} frames, {data.root} has {data.n_frames}: an AST's positions are resampled"
        )


def open_for(meta, split, root=None):
    """The data set that a checkpoint belongs to, or another one of the same classes and task."""
    data = prep_data.FbankDataset(root or meta["data"], split, meta["args"].get("fold"))
    check_same("the checkpoint", meta, data)
    return data


def say_absent(positives, data):
    names = [name for name, n in zip(data.classes, positives) if not n]
    if names:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        print(
            f"without a positive in {data.split}, left out of macro scores: {len(names)} of {len(positives)} classes ({some})"
        )


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
            raise ValueError(f"{path} has other classes or another fold than {paths[0]}: they make no ensemble")
        data = open_for(meta, split, root)
        if data.n_frames != meta["n_frames"]:
            model, _ = models.load_checkpoint(path, data.n_frames)
        label = f"{path.parent.name} on {split}"
        p, y = predict(model.to(device), data, device, meta["mean"], meta["std"], label=label)
        total = total + p / len(paths)
        n_params = sum(v.numel() for v in model.parameters())
    if ranks()[0]:
        return
    found = scores(total, y, data.task)
    ap, auc, positives = (found.pop(k) for k in ("AP", "AUC", "positives"))
    result = {
        **{k: v if math.isfinite(v) else None for k, v in found.items()},
        "task": data.task,
        "split": split,
        "clips": len(data),
        "classes_without_positives": int((positives == 0).sum()),
        "model": first["model"]["name"],
        "teachers": first.get("teachers", []),
        "params": n_params,
        "epoch": first["epoch"],
        "checkpoints": [str(p) for p in paths],
        "data": str(data.root),
        "fold": first["args"].get("fold"),
        "seed": first["args"]["seed"],
        "seconds": round(time.time() - start, 1),
    }
    metrics, per_class = out / f"metrics-{name}-{split}.json", out / f"per_class-{name}-{split}.csv"
    out.mkdir(exist_ok=True)
    prep_data.write_json(metrics, result)

    def write(p):
        with open(p, "w", newline="") as f:
            lines = csv.writer(f, lineterminator="\n")
            lines.writerow(["index", "class", "positives", "AP", "AUC"])
            lines.writerows(zip(range(len(ap)), data.classes, positives, ap, auc))

    models.atomic_write(per_class, write)
    say_absent(positives, data)
    print("  ".join(f"{k} {100 * found[k]:.2f}" for k in ("mAP", "mAUC", "accuracy")) + f"  d' {found['d_prime']:.3f}")
    print(f"{len(data)} clips of {data.root} ({split}) -> {metrics}, {per_class.name}")


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
    if ranks()[0] == 0:
        prep_data.lock(run)
    args = prep_data.read_json(run / "args.json")
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
            start, total, best = None, None, -1.0
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
            start = args["average"]
            state = average_weights([epochs[e] for e in range(start, args["epochs"] + 1)])
            print(f"{run}: epochs {start}-{args['epochs']}, as the recipe says")
        model.load_state_dict(state)
        if ranks()[0] == 0:
            meta.pop("format")
            meta.pop("model")
            models.save_checkpoint(run / "wa.pt", model, **(meta | {"averaged": [start, args["epochs"]]}))
            print(f"wrote {run / 'wa.pt'}")
    if ranks()[0] == 0 and not (keep_epochs or args["keep_epochs"]):
        for path in run.glob("ep-*.pt"):
            path.unlink()


# --------------------------------------------------------------------------------------------------------- summary


def summary(folder):
    """Print and write (summary.md) one line for each setting: mean and deviation over its folds and seeds, and draw it."""
    groups = {}  # setting -> checkpoint -> results
    for path in sorted(folder.glob("*/metrics-*-eval.json")):
        run = re.sub(r"(-fold\d+)?(-s\d+)?$", "", path.parent.name)
        groups.setdefault(run, {}).setdefault(path.stem.split("-")[1], []).append(prep_data.read_json(path))
    if not groups:
        raise ValueError(f"{folder} holds no metrics-*-eval.json: score its runs first with --ckpt")
    settings = {g: r for g, r in groups.items() if not g.startswith("ensemble-")}
    for run in groups.keys() - settings.keys():  # an ensemble stands in the line of its setting
        settings.setdefault(run.removeprefix("ensemble-"), {})["ensemble"] = [
            r for found in list(groups[run].values())[-1:] for r in found
        ]

    def cell(found, key):
        values = [100 * f[key] for f in found if f[key] is not None]
        if not values:
            return "-"
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    order = sorted(settings, key=lambda g: (len(next(iter(settings[g].values()))[0]["teachers"]) > 0, g))
    task = next(iter(settings[order[0]].values()))[0]["task"]
    main, other = ("mAP", "mAUC") if task == "multi-label" else ("accuracy", "mAP")
    columns = [c for c in ("best", "wa", "ensemble") if any(c in settings[g] for g in order)]
    title = {"best": f"best {main}", "wa": f"averaged {main}", "ensemble": f"ensemble {main}"}
    lines = [["run", "student", "M params", "teachers", "runs", *[title[c] for c in columns], other]]
    for g in order:
        found = settings[g]
        any_of = next(iter(found.values()))
        one = any_of[0]
        lines.append(
            [g, one["model"], f"{one['params'] / 1e6:.1f}", " + ".join(one["teachers"]) or "no KD", str(len(any_of))]
        )
        lines[-1] += [cell(found.get(c, []), main) for c in columns] + [cell(any_of, other)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(v.ljust(w) for v, w in zip(line, widths)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    clips = next(iter(settings[order[0]].values()))[0]["clips"]
    folds = sorted({f["fold"] for g in settings.values() for r in g.values() for f in r} - {None})
    what = (
        f"{folder.name}, eval split ({clips} clips)"
        if not folds
        else f"{folder.name}, fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}"
    )
    text = f"{what}; in percent, mean ± standard deviation over runs\n\n" + "\n".join(rows) + "\n"
    models.atomic_write(folder / "summary.md", lambda p: p.write_text(text, encoding="utf-8"))
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
    models.atomic_write(folder / "summary.png", lambda p: fig.savefig(p, dpi=130))
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
    device = setup(a.device)
    if a.ckpt:
        score_checkpoints(a.ckpt, a.split, a.data, device)
    elif not (a.average / "args.json").is_file():
        raise FileNotFoundError(f"--average {a.average}: no run here (args.json is missing)")
    else:
        average_run(a.average, device, a.keep_epochs)


if __name__ == "__main__":
    models.command_line(main)
