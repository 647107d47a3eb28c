"""Supervised training: every teacher, and the no-KD baseline of every student (Section 3.2, Table 2).

    python prep_data.py demo && python train_teacher.py --data data/demo --model efficientnet-b0     # CPU
    python train_teacher.py --data data/fsd50k --model ast-base                                      # one GPU
    torchrun --nproc_per_node=8 train_teacher.py --data data/fsd50k --model ast-base                 # 8 GPUs

Every flag that is not given is decided by the table below, and the resolved settings are printed and saved. A run writes
best.pt (best on validation; the last epoch where there is none), ep-NN.pt, last.pt, log.jsonl, curve.png and args.json to
exp/<data>/<model>[-fold<K>]-s<seed>/. Interrupted, the same command goes on; finished, it says so.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch.nn.parallel import DistributedDataParallel

import evaluate
import models
import prep_data

# Table 2 with the gaps filled; hybrids follow the CNNs. decay: "plateau" halves after 2 epochs without a better
# validation score; (factor, every, after) multiplies by factor once `after` epochs are done and every `every` from there.
# average: "val" chooses the first epoch on validation, a number is the first epoch, "off" is none.
COLUMNS = "lr", "batch_size", "epochs", "warmup", "decay", "mixup", "balanced", "freq_mask", "average"
RECIPES = {
    "fsd50k cnn":       (5e-4, 24, 50, 1000, "plateau", 0.5, True, 48, "val"),
    "fsd50k ast":       (5e-5, 12, 50, 1000, "plateau", 0.5, True, 48, "val"),
    "audioset cnn":     (1e-4, 120, 30, 1000, (0.5, 5, 10), 0.5, True, 48, 16),
    "audioset ast":     (1e-5, 12, 5, 1000, (0.5, 1, 2), 0.5, True, 48, 1),
    "audioset-bal cnn": (1e-3, 100, 60, 1000, (0.5, 5, 35), 0.5, False, 48, 41),
    "audioset-bal ast": (5e-5, 12, 25, 1000, (0.5, 5, 10), 0.5, False, 48, 6),
    "esc50 cnn":        (1e-4, 48, 25, 0, (0.85, 1, 5), 0.0, False, 24, "off"),
    "esc50 ast":        (1e-4, 48, 25, 0, (0.85, 1, 5), 0.0, False, 24, "off"),  # 1e-5 from audio weights, see resolve
    "demo cnn":         (1e-3, 12, 8, 20, "plateau", 0.5, True, 12, "val"),  # ours, for ten minutes on two cores
    "demo ast":         (3e-4, 6, 7, 20, "plateau", 0.0, True, 12, "val"),
}  # fmt: skip
BETAS, WEIGHT_DECAY, TIME_MASK = (0.95, 0.999), 5e-7, 0.192  # TIME_MASK: share of the frames
RESUME_SECONDS = 600  # last.pt is written at least this often


# --------------------------------------------------------------------------------------------------------- settings


def parser(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="a folder that prep_data.py wrote")
    p.add_argument("--model", required=True, help=f"{', '.join(models.MODELS)}, or timm:<any timm CNN>")
    p.add_argument("--pretrained", help="no, imagenet, or the path of a weight file (default: imagenet; demo: no)")
    p.add_argument("--fold", type=int, help="train on the other folds; this one is for scoring")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--recipe", choices=sorted({k.split()[0] for k in RECIPES}), help="a row of the table (default: the data set's)"
    )
    p.add_argument("--epochs", type=int)
    p.add_argument("--lr", type=float)
    p.add_argument("--batch-size", type=int, help="global: all processes together")
    p.add_argument("--warmup", type=int, help="steps of linear warmup")
    p.add_argument("--mixup", type=float, help="its probability")
    p.add_argument("--balanced", action=argparse.BooleanOptionalAction, default=None, help="class-balanced sampling")
    p.add_argument("--freq-mask", type=int, help="mel bins; a mask is narrower than this")
    p.add_argument("--time-mask", type=int, help="frames; a mask is narrower than this")
    p.add_argument("--label-smoothing", type=float, default=0.1)
    p.add_argument("--keep-epochs", action="store_true", help="keep ep-NN.pt after weight averaging")
    p.add_argument("--cache", choices=["device", "disk"], help="where clips are read from (default: a GPU if they fit)")
    p.add_argument("--no-compile", action="store_true", help="CUDA: do not torch.compile")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    p.add_argument("--out", type=pathlib.Path, help="the run's folder")
    return p


def resolve(args, data):
    """Fill in what the command line left open, in place, from RECIPES; check ranges; ValueError names the flag."""
    kind = "ast" if models.family(args.model) == "ast" else "cnn"
    name = {"esc10": "esc50"}.get(data.source, data.source)
    if f"{name} {kind}" not in RECIPES:
        name = {"multi-label": "fsd50k", "single-label": "esc50"}[data.task]
    args.recipe = args.recipe or name
    row = dict(zip(COLUMNS, RECIPES[f"{args.recipe} {kind}"]))
    if args.pretrained is None:
        args.pretrained = "no" if args.recipe == "demo" else "imagenet"
    if args.recipe == "esc50" and kind == "ast" and args.pretrained not in ("no", "imagenet"):
        image = pathlib.Path(args.pretrained).exists() and "cls_token" in models.read_weights(args.pretrained)
        row["lr"] = row["lr"] if image else 1e-5  # only timm's DeiT has that name at the top
    args.decay, args.average = row.pop("decay"), row.pop("average")
    for key, value in row.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.time_mask is None:
        args.time_mask = round(TIME_MASK * data.n_frames)
    if isinstance(args.average, int) and args.epochs != row["epochs"]:
        args.average = args.epochs // 3 + 1  # the last two thirds
    if args.average == "val" and not data.has_val:
        args.average = args.epochs // 3 + 1
    checks = [
        ("epochs", args.epochs >= 1), ("lr", 0 < args.lr < math.inf), ("batch_size", args.batch_size >= 1), ("warmup", args.warmup >= 0),
        ("mixup", 0 <= args.mixup <= 1), ("freq_mask", 0 <= args.freq_mask <= 128), ("time_mask", 0 <= args.time_mask <= data.n_frames),
        ("label_smoothing", 0 <= args.label_smoothing < 1), ("seed", args.seed >= 0),
    ]  # fmt: skip
    for key, good in checks:
        if not good:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} is out of range")
    world = evaluate.ranks()[1]
    if args.batch_size % world:
        args.batch_size += world - args.batch_size % world
        print(f"--batch-size rounded up to {args.batch_size}, a multiple of the {world} processes")
    args.batch_size = min(args.batch_size, max(1, len(data) // world * world))
    args.warmup = min(args.warmup, args.epochs * (len(data) // args.batch_size) // 10)
    return args


def start(args, data, suffix=""):
    """Name, create and claim the run's folder: writes args.json and prints the settings. A folder of other settings is
    refused. Returns the settings as a dictionary of plain types."""
    fold = "" if args.fold is None else f"-fold{args.fold}"
    if args.out is None:
        name = pathlib.Path(os.path.abspath(data.root)).name  # a link keeps its name
        args.out = pathlib.Path("exp", name, f"{args.model.replace(':', '-')}{suffix}{fold}-s{args.seed}")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "no_compile", "cache")}
    settings = json.loads(json.dumps(settings | {"data": str(data.root)}))  # tuples become lists
    evaluate.agree(data.root, data.stats["crc32"])
    if evaluate.ranks()[0] == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        prep_data.lock(args.out)
        file = args.out / "args.json"
        if file.exists():
            old = prep_data.read_json(file)
            other = [k for k in settings.keys() | old.keys() if settings.get(k) != old.get(k)]
            if other:
                changes = ", ".join(f"{k} {old.get(k)} -> {settings.get(k)}" for k in sorted(other))
                raise ValueError(
                    f"{args.out} is a run with other settings ({changes}): give another --out, or remove it"
                )
        prep_data.write_json(file, settings)
        print(" ".join(f"{k}={v}" for k, v in settings.items()))
    return settings


def meta_of(data, settings, **more):
    """What every weight file carries beside its weights."""
    return dict(
        classes=data.classes, mean=data.mean, std=data.std, n_frames=data.n_frames, sample_rate=data.stats["sample_rate"],
        task=data.task, data=str(data.root.resolve()), args=settings, **more,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- one epoch


def epoch_order(data, seed, epoch, balanced):
    """Which clips an epoch shows, in order: a permutation, or as many draws with class-balanced replacement."""
    rng = np.random.default_rng([seed, epoch])
    if not balanced:
        return rng.permutation(len(data))
    share = np.cumsum(data.weights())
    return np.searchsorted(share, rng.random(len(data)) * share[-1], side="right").clip(max=len(data) - 1)


def batches(data, args, epoch, device, first=0):
    """Yield (x, y, mixed) for the steps of an epoch from step `first` on, each this rank's share of the global batch:
    x (b, T, F) augmented and normalised, y (b, C) soft targets, mixed (b, T, F) the mixture before masks, noise and shift.

    All that is random follows from (seed, epoch, step) for the global batch, so it depends neither on the number of ranks
    nor on an interruption. A thread reads the next batch while this one trains.
    """
    rank, world = evaluate.ranks()
    order, share, C = epoch_order(data, args.seed, epoch, args.balanced), args.batch_size // world, len(data.classes)
    mine = slice(rank * share, (rank + 1) * share)

    def host(step):
        clips = order[step * args.batch_size : (step + 1) * args.batch_size]
        rng = np.random.default_rng([args.seed, epoch, step + 1])  # NumPy pads with zeros: 0 is epoch_order's stream
        d = prep_data.draw(rng, len(clips), len(data), args.mixup, args.freq_mask, args.time_mask, data.n_frames)
        partner = np.where(d["lam"] < 1, d.pop("partner"), clips)[mine]
        a = data.fetch(clips[mine])
        b = data.fetch(partner) if args.mixup > 0 else a
        tensors = [*a, *b, *(torch.from_numpy(v[mine]) for v in d.values())]
        if device.type == "cuda":
            tensors = [t if t.is_cuda else t.pin_memory() for t in tensors]
        return tensors, list(d), int(rng.integers(2**62))

    for tensors, names, noise_seed in evaluate.ahead(host, range(first, steps_of(data, args)), device):
        a, n_a, labels_a, b, n_b, labels_b, *rest = (t.to(device, non_blocking=True) for t in tensors)
        d = dict(zip(names, rest))
        mixed = prep_data.mix(a.float(), b.float(), d["lam"], n_a, n_b)
        noise_source = torch.Generator(device).manual_seed(noise_seed)
        noise = torch.rand((args.batch_size, *mixed.shape[1:]), device=device, generator=noise_source)[mine]
        x = prep_data.augment(mixed, d, noise, data.mean, data.std)
        y_a, y_b = (prep_data.targets(v, C, data.task, args.label_smoothing) for v in (labels_a, labels_b))
        lam = d["lam"].unsqueeze(1)
        yield x, lam * y_a + (1 - lam) * y_b, mixed


def steps_of(data, args):
    return max(1, len(data) // args.batch_size)  # the last, short batch is dropped


def truth_loss(logits, y, task):
    """Loss_g: BCE with logits (mean over batch and classes), or cross-entropy with soft targets (mean over the batch)."""
    return F.binary_cross_entropy_with_logits(logits, y) if task == "multi-label" else F.cross_entropy(logits, y)


# ---------------------------------------------------------------------------------------- the optimizer and the run


def make_optimizer(model, args):
    return torch.optim.Adam(model.parameters(), args.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def decay_factor(args, epoch, history):
    """What the decay leaves of --lr in an epoch (from 1), given the log of the epochs before it."""
    if args.decay != "plateau":
        gamma, every, after = args.decay
        return gamma ** max(0, (epoch - 1 - after) // every + 1)
    rate = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(rate, "max", factor=0.5, patience=2)
    for e in history:  # replayed, so that an interruption has no state to lose
        plateau.step(e.get("val_score", -e["loss"]))
    return rate.param_groups[0]["lr"]


def set_rate(optimizer, args, factor, done):
    """The rate of the step after `done` steps of the run: linear warmup times the epoch's decay."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr * factor * min(1.0, (done + 1) / max(1, args.warmup))


def faster(model, args, device):
    """channels_last for a CNN and torch.compile on CUDA, both in place; all that a frozen teacher needs."""
    if not isinstance(model, models.AST):
        model.to(memory_format=torch.channels_last)
    synced = any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())  # each would cut the graph in two
    if device.type == "cuda" and not args.no_compile and not synced:
        model.compile(dynamic=False)
    return model


def wrap(model, args, device):
    """The student as it trains: under torchrun in DDP, with SyncBatchNorm on GPUs."""
    if evaluate.ranks()[1] > 1 and device.type == "cuda":
        model = convert_sync_batchnorm(model)  # timm's: torch's would drop the activations inside timm's norms
    model = faster(model, args, device)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if evaluate.ranks()[1] > 1 else model


def resume(args, model, optimizer):
    """Go on from last.pt if there is one: -> (epoch, step, running totals, history of finished epochs)."""
    file = args.out / "last.pt"
    last = models.read_checkpoint(file) if file.exists() else None
    evaluate.agree(file, last and (last["epoch"], last["step"]))
    if last is None:
        return 1, 0, None, []
    model.load_state_dict(last["state"])
    optimizer.load_state_dict(last["optimizer"])
    history, step = last["history"], last["step"]
    if len(history) >= args.epochs:
        if not (args.out / "curve.png").exists():
            finish_run(args, history)
        print(f"{args.out} is trained already ({args.epochs} epochs); remove it to train again")
        sys.exit(0)
    print(f"going on from {file}: epoch {len(history) + 1}, step {step}")
    return len(history) + 1, step, last["totals"], history


def first_fault(fault, step, loss, model):
    """The first step of the epoch whose loss or gradient was not finite, inf so far: stays on the device, unread."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return torch.where((loss + norm).isfinite(), fault, fault.clamp(max=step))


def check_fault(fault, args, data, epoch, optimizer):
    """Read that flag; ValueError that names the step's clips. The last checkpoint is older than the fault."""
    step = fault.item()
    if step < math.inf:
        at, order = int(step) * args.batch_size, epoch_order(data, args.seed, epoch, args.balanced)
        clips = ", ".join(data.ids[i] for i in order[at : at + args.batch_size])
        raise ValueError(
            f"loss or gradient was not finite in epoch {epoch}, step {int(step)}, at learning rate "
            f"{optimizer.param_groups[0]['lr']:.2e} (clips {clips}); {args.out} keeps what was good: "
            "try a lower --lr with another --out"
        )


def ask_to_stop():
    """From now on SIGTERM (a pre-emption) only sets this flag, which is read after each step."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return asked


def save_due(saved, asked):
    return evaluate.ranks()[0] == 0 and (asked.is_set() or time.monotonic() - saved > RESUME_SECONDS)


def stop_or_go_on(asked, args):
    """After a save in the middle of an epoch: end the process if it was asked to; -> the time of the save."""
    if asked.is_set():
        print(f"stopped by SIGTERM; the same command goes on from {args.out / 'last.pt'}", file=sys.stderr, flush=True)
        os._exit(143)  # other processes may be waiting for this one: torchrun ends them
    return time.monotonic()


def save_last(args, model, optimizer, meta, history, step=0, totals=None):
    totals = None if totals is None else totals.tolist()
    run = {"optimizer": optimizer.state_dict(), "history": history, "epoch": len(history), "step": step}
    models.save_checkpoint(args.out / "last.pt", model, **meta, **run, totals=totals)


def epoch_entry(epoch, optimizer, clips, began, device, **losses):
    """The epoch's line of the log; losses are averaged over the ranks."""
    seconds = time.monotonic() - began
    for value in losses.values():
        if evaluate.ranks()[1] > 1:
            torch.distributed.all_reduce(value)
    losses = {k: v.item() / evaluate.ranks()[1] for k, v in losses.items()}
    lr = optimizer.param_groups[0]["lr"]
    speed = {"seconds": round(seconds, 2), "clips_per_second": round(clips / seconds, 2)}
    return {"epoch": epoch, "lr": lr, **losses, **speed, "peak_gib": round(evaluate.peak_memory(device), 2)}


def finish_epoch(args, model, optimizer, val, device, meta, history, entry):
    """Validate, log, and save ep-NN.pt, best.pt and last.pt, in the order in which a kill at any moment loses nothing."""
    if val is not None:
        p, y = evaluate.predict(model, val, device, meta["mean"], meta["std"], label="validation")
        found = evaluate.scores(p, y, val.task)
        entry |= {f"val_{k}": found[k] for k in ("mAP", "mAUC", "d_prime", "accuracy")}
        entry["val_score"] = found[evaluate.MAIN_SCORE[val.task]]
        if not history:
            evaluate.say_absent(found["positives"], val)
    best = val is None or entry["val_score"] > max((e["val_score"] for e in history), default=-1.0)
    history.append(entry)
    if evaluate.ranks()[0]:
        return
    meta = meta | {"epoch": entry["epoch"]}
    models.save_checkpoint(args.out / f"ep-{entry['epoch']:02d}.pt", model, **meta)
    if best:
        models.save_checkpoint(args.out / "best.pt", model, **meta)
    meta.pop("epoch")
    models.atomic_write(args.out / "log.jsonl", lambda p: p.write_text("".join(json.dumps(e) + "\n" for e in history)))
    save_last(args, model, optimizer, meta, history)  # last of all: until it is there, the epoch is done again
    score = ""
    if val is not None:
        score = f"  val {evaluate.MAIN_SCORE[val.task]} {100 * entry['val_score']:.2f}{' *' if best else ''}"
    print(
        f"epoch {entry['epoch']:2d}/{args.epochs}  loss {entry['loss']:.4f}{score}  lr {entry['lr']:.2e}  "
        f"{entry['seconds']:.0f} s, {entry['clips_per_second']:.0f} clips/s, peak {entry['peak_gib']:.1f} GiB",
        flush=True,
    )


def finish_run(args, history):
    """curve.png, and where everything is."""
    if evaluate.ranks()[0]:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    epochs = [e["epoch"] for e in history]
    ax.plot(epochs, [e["loss"] for e in history], "C0", label="training loss")
    ax.set(xlabel="epoch", ylabel="training loss", title=args.out.name)
    if "val_score" in history[0]:
        right = ax.twinx()
        right.plot(epochs, [100 * e["val_score"] for e in history], "C1", label="validation")
        right.set_ylabel("validation score (%)", color="C1")
    models.atomic_write(args.out / "curve.png", lambda p: fig.savefig(p, dpi=120))
    plt.close(fig)
    print(f"wrote {args.out}: best.pt, last.pt, ep-NN.pt, log.jsonl, curve.png")


def open_data(args):
    """The training split, and the validation split where there is one (folds and AudioSet have none: no choice is made)."""
    train = prep_data.FbankDataset(args.data, "train-balanced" if args.recipe == "audioset-bal" else "train", args.fold)
    val = prep_data.FbankDataset(args.data, "val") if train.has_val else None
    if val is None:
        print("no validation split: best.pt is the last epoch")
    return train, val


def begin_run(args, model, meta, history, data, device):
    """Put the clips on a GPU where they fit in 40 % of what is free there, and say so. Say what disk the run will take,
    ValueError if there is not enough. Write ep-00.pt, the model before training."""
    need, on_gpu = len(data) * data.n_frames * prep_data.N_MELS * 2, device.type == "cuda"
    if args.cache == "device" or (not args.cache and on_gpu and need < 0.4 * torch.cuda.mem_get_info(device)[0]):
        data.keep_on(device)
    if evaluate.ranks()[0]:
        return
    where = "disk, through the page cache" if data.cache is None else f"{device.type} memory"
    print(f"{len(data)} training clips, {need / 2**30:.2f} GiB, are read from {where}")
    # besides the epochs: ep-00, best, wa, and last, which holds Adam's state too and is written beside itself
    need = (args.epochs - len(history) + 9) * sum(v.nbytes for v in model.state_dict().values())
    free = shutil.disk_usage(args.out).free
    print(f"checkpoints will take up to {need / 2**30:.2f} GiB in {args.out} ({free / 2**30:.0f} GiB free)")
    if need > free:
        raise ValueError(
            f"{args.out} has {free / 2**30:.2f} GiB free, the checkpoints need {need / 2**30:.2f}: make room or give --out"
        )
    if not history and not (args.out / "ep-00.pt").exists():  # later in its first epoch the model is another
        models.save_checkpoint(args.out / "ep-00.pt", model, **meta, epoch=0)


def main():
    args = parser(__doc__).parse_args()
    device = evaluate.setup(args.device)
    data, val = open_data(args)
    settings = start(resolve(args, data), data)
    meta = meta_of(data, settings)

    torch.manual_seed(args.seed)
    pretrained = {"no": False, "imagenet": True}.get(args.pretrained, args.pretrained)
    model = models.build_model(args.model, len(data.classes), data.n_frames, pretrained).to(device)
    optimizer = make_optimizer(model, args)
    start_epoch, first, totals, history = resume(args, model, optimizer)
    begin_run(args, model, meta, history, data, device)
    net = wrap(model, args, device)

    n_steps, saved, asked = steps_of(data, args), time.monotonic(), ask_to_stop()
    for epoch in range(start_epoch, args.epochs + 1):
        began, factor = time.monotonic(), decay_factor(args, epoch, history)
        net.train()
        total = torch.zeros((), device=device) if totals is None else torch.tensor(totals, device=device)
        fault = torch.full((), math.inf, device=device)
        with evaluate.progress(n_steps * args.batch_size, "clip", f"epoch {epoch}", first * args.batch_size) as bar:
            for step, (x, y, _) in enumerate(batches(data, args, epoch, device, first), first):
                set_rate(optimizer, args, factor, (epoch - 1) * n_steps + step)
                with evaluate.autocast(device):
                    logits = net(x)
                loss = truth_loss(logits.float(), y, data.task)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                fault = first_fault(fault, step, loss, model)
                optimizer.step()
                total += loss.detach()
                if bar.update(args.batch_size):
                    check_fault(fault, args, data, epoch, optimizer)
                    bar.set_postfix(loss=f"{total.item() / (step + 1):.4f}", refresh=False)
                if save_due(saved, asked):
                    check_fault(fault, args, data, epoch, optimizer)
                    save_last(args, model, optimizer, meta, history, step + 1, total)
                    saved = stop_or_go_on(asked, args)
        check_fault(fault, args, data, epoch, optimizer)
        clips = (n_steps - first) * args.batch_size
        entry = epoch_entry(epoch, optimizer, clips, began, device, loss=total / n_steps)
        finish_epoch(args, model, optimizer, val, device, meta, history, entry)
        first, totals, saved = 0, None, time.monotonic()
    finish_run(args, history)


if __name__ == "__main__":
    models.command_line(main)
