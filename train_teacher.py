"""Supervised training: every teacher, and the no-KD baseline of every student (Section 3.2, Table 2).

    python prep_data.py demo && python train_teacher.py --data data/demo --model efficientnet-b0     # CPU
    python train_teacher.py --data data/fsd50k --model ast-base                                      # one GPU
    torchrun --nproc_per_node=8 train_teacher.py --data data/fsd50k --model ast-base                 # 8 GPUs

Every flag that is not given is decided by RECIPES in this file, and the resolved settings are printed and saved. A run writes
best.pt (best on validation; the last epoch where there is none), ep-NN.pt, last.pt, log.jsonl and args.json to
exp/<data>/<model>[-fold<K>]-s<seed>/. Interrupted, the same command resumes it.
"""

import argparse
import json
import math
import os
import pathlib
import resource
import shutil
import signal
import sys
import time
import types

import torch
import torch.nn.functional as F

import dataset
import evaluate
import models

# Table 2 with the gaps filled; hybrids follow the CNNs. decay: "plateau" halves at the third epoch in a row without a better
# validation score (without such a split: training loss); (factor, every, after) multiplies by factor once `after` epochs are
# done and every `every` from there.
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
    "demo cnn":         (1e-3, 12, 6, 20, "plateau", 0.5, True, 12, "val"),  # ours, for minutes on two cores
    "demo ast":         (3e-4, 6, 5, 20, "plateau", 0.0, True, 12, "val"),
}  # fmt: skip
SAME_WEIGHTS = {"device", "compile", "cache", "keep_epochs", "average"}  # settings that two runs may differ in
BETAS, WEIGHT_DECAY, TIME_MASK = (0.95, 0.999), 5e-7, 0.192  # TIME_MASK: share of the frames
COLUMNS_OF_LOG = 8  # room for seven terms of the loss and the gradient norm
RESUME_SECONDS = 600  # last.pt is written at least this often
COMPILE_CLIPS = 100_000  # a run that sees fewer is not compiled: AST-Base compiles in 40 s, and gains a fifth (an H200)


# --------------------------------------------------------------------------------------------------------- settings


def parser(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", required=True, help="a folder that prep_data.py wrote")
    add("--model", required=True, help=f"{', '.join(models.MODELS)}, or timm:<any timm CNN>")
    add("--pretrained", help="no, imagenet, or the path of weights or of a run (default: imagenet; demo: no)")
    add("--fold", type=int, help="train on the other folds; this one is for scoring")
    add("--seed", type=int, default=0)
    add("--recipe", choices=sorted({k.split()[0] for k in RECIPES}), help="row of the table (default: the data set's)")
    add("--epochs", type=int)
    add("--lr", type=float)
    add("--batch-size", type=int, help="global: all processes together")
    add("--warmup", type=int, help="steps of linear warmup, at most a tenth of all")
    add("--mixup", type=float, help="its probability")
    add("--balanced", action=argparse.BooleanOptionalAction, default=None, help="class-balanced sampling")
    add("--freq-mask", type=int, help="mel bins; a mask is narrower than this")
    add("--time-mask", type=int, help="frames; a mask is narrower than this")
    add("--label-smoothing", type=float, default=0.1)
    add("--patchout", type=int, nargs=2, default=[0, 0], metavar=("ROWS", "COLUMNS"), help="patches that an AST drops")
    add("--precision", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32, as scores")
    add("--keep-epochs", action="store_true", help="keep ep-NN.pt after weight averaging")
    add("--cache", choices=["device", "disk"], help="where clips are read from (default: a GPU if they fit)")
    add("--compile", action=argparse.BooleanOptionalAction, help="CUDA: torch.compile (default: if the run is long)")
    add("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    add("--out", type=pathlib.Path, help="the run's folder")
    return p


def parse(p):
    """The command line, and in `given` the names of what it changed."""
    args = p.parse_args()
    args.given = [k for k, v in vars(args).items() if v != p.get_default(k)]
    return args


def resolve(args, data):
    """Fill in what the command line left open, in place, from RECIPES; check ranges; ValueError names the flag."""
    kind = "ast" if models.family(args.model) == "ast" else "cnn"
    like = {"multi-label": "fsd50k", "single-label": "esc50"}[data.task]  # of data that has no row
    args.recipe = args.recipe or (data.source if f"{data.source} {kind}" in RECIPES else like)
    row = dict(zip(COLUMNS, RECIPES[f"{args.recipe} {kind}"]), time_mask=round(TIME_MASK * data.n_frames))
    args.pretrained = args.pretrained or ("no" if args.recipe == "demo" else "imagenet")
    weights = args.pretrained if args.pretrained not in ("no", "imagenet") else None
    if args.recipe == "esc50" and kind == "ast" and weights and "cls_token" not in models.read_weights(weights):
        row["lr"] = 1e-5  # of audio: only timm's ViTs have that name at the top
    for key, value in row.items():
        if getattr(args, key, None) is None:  # decay and average have no flag
            setattr(args, key, value)
    if isinstance(args.average, int) and args.epochs != row["epochs"] or args.average == "val" and not data.has_val:
        args.average = args.epochs // 3 + 1  # the last two thirds
    check_ranges(args, data, kind)
    if len(data) < dataset.world():
        raise ValueError(f"{len(data)} training clips are too few for {dataset.world()} processes: start fewer")
    if args.batch_size % dataset.world():
        args.batch_size += dataset.world() - args.batch_size % dataset.world()
        print(f"--batch-size rounded up to {args.batch_size}, a multiple of the {dataset.world()} processes")
    args.batch_size = min(args.batch_size, len(data) // dataset.world() * dataset.world())
    args.warmup = min(args.warmup, args.epochs * (len(data) // args.batch_size) // 10)
    if args.compile is None:
        args.compile = args.epochs * len(data) >= COMPILE_CLIPS
    return args


def check_ranges(args, data, kind):
    checks = [
        ("epochs", args.epochs >= 1), ("lr", 0 < args.lr < math.inf), ("batch_size", args.batch_size >= 1), ("warmup", args.warmup >= 0),
        ("mixup", 0 <= args.mixup <= 1), ("freq_mask", 0 <= args.freq_mask <= 128), ("time_mask", 0 <= args.time_mask <= data.n_frames),
        ("label_smoothing", 0 <= args.label_smoothing < 1), ("seed", 0 <= args.seed < 2**63),
        ("patchout", all(0 <= p < n for p, n in zip(args.patchout, dataset.patch_grid(data.n_frames)))),
    ]  # fmt: skip
    for key, good in checks:
        if not good:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} is out of range")
    if kind == "cnn" and any(args.patchout):
        raise ValueError(f"--patchout drops an AST's patches, and {args.model} has none: leave it out")
    if (data.labels == data.labels[0]).all() and (len(data) > 1 or len(data.classes) == 1):
        raise ValueError(f"all training clips of {data.root} have the same labels: add clips that have others")


def differs(old, key, value, given):
    """Whether a setting gives other weights than args.json's: paths are compared resolved, and one that the file does not know
    (a flag that is younger than the run) only if the command line gave it."""
    if key not in old:
        return key in given
    plain = lambda v: [os.path.realpath(p) for p in ([v] if isinstance(v, str) else v)]
    return plain(old[key]) != plain(value) if key in ("data", "teacher", "pretrained") else old[key] != value


def claim(args, data, suffix=""):
    """Name, create and lock the run's folder; print and write its settings (args.json), and return them as plain types.
    ValueError for a folder whose weights come from other settings."""
    if args.out is None:
        name = pathlib.Path(os.path.abspath(data.root)).name  # a link keeps its name
        fold = "" if args.fold is None else f"-fold{args.fold}"
        args.out = pathlib.Path("exp", name, f"{args.model}{suffix}{fold}-s{args.seed}".replace(":", "-"))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "given")}
    settings |= {"data": str(data.root), "tables": [*data.stats["tables"].values()]}  # CRCs as prepared, not as edited
    settings = json.loads(json.dumps(settings))  # tuples become lists
    models.check_same(data.root, [data.stats["crc32"], len(data), data.mean, settings.get("teacher_args")])
    if dataset.rank():
        return settings
    args.out.mkdir(parents=True, exist_ok=True)
    dataset.lock(args.out)
    path = args.out / "args.json"
    old = dataset.read_json(path, "keep_epochs") if path.exists() else {}
    if not old and (found := sorted(args.out.glob("*.pt"))):
        raise ValueError(f"{args.out} is no run (it has no args.json), and holds {found[0].name}: give another --out")
    if old:
        other = sorted(k for k in settings.keys() - SAME_WEIGHTS if differs(old, k, settings[k], args.given))
        other += ["teacher"] * ("teacher" in old and "teacher" not in settings)  # was distilled, and now it is not
        if other and {p.name for p in args.out.glob("*.pt")} - {"ep-00.pt"}:  # else it ended before it had trained
            changes = ", ".join(f"{k} {old.get(k)} -> {settings.get(k)}" for k in other)
            raise ValueError(f"{args.out} is a run with other settings ({changes}): give another --out, or remove it")
        settings["keep_epochs"] |= old["keep_epochs"]
    if settings != old:  # a finished run is skipped on a full or read-only disk too
        dataset.write_json(path, settings)
    print(" ".join(f"{k}={v}" for k, v in settings.items()))
    return settings


# ------------------------------------------------------------------------------------------------------------ a run


def open_data(args):
    """The training split, and the validation split where there is one (folds and AudioSet have none: no choice is made)."""
    train = dataset.FbankDataset(args.data, "train-balanced" if args.recipe == "audioset-bal" else "train", args.fold)
    if train.source == "audioset" and args.recipe in (None, "audioset") and "train-unbalanced" not in train.splits:
        raise ValueError(f"{train.root} has AudioSet's balanced part only: use --recipe audioset-bal, or prepare all")
    if train.std < 1e-3:  # that of sound is several; rounding makes a hair of none
        raise ValueError(f"all training clips of {train.root} are silent or the same constant: add clips with sound")
    val = dataset.FbankDataset(args.data, "val") if train.has_val else None
    if val is not None and (val.labels < 0).all():
        raise ValueError(f"no validation clip of {val.root} has a label, so none could be chosen by: label some")
    for data in filter(None, (train, val)):
        evaluate.report_absent(data)
    if val is None:
        print("no validation split: best.pt is the last epoch")
    return train, val


def begin(args, data, val, device, suffix="", **meta):
    """Claim the folder, build the student and its optimizer, resume from last.pt if there is one -> the run: args, data, val,
    device, meta (what every weight file carries), model, optimizer, history (finished epochs), log and names of its columns
    (of the unfinished epoch), saved (when), stop (set by SIGTERM)."""
    settings = claim(args, data, suffix)  # which names args.out
    path = args.out / "last.pt"
    meta |= {"classes": data.classes, "mean": data.mean, "std": data.std, "n_frames": data.n_frames, "task": data.task}
    meta |= {"sample_rate": data.stats["sample_rate"], "data": str(data.root.resolve()), "args": settings}
    last = models.read_checkpoint(path) if path.exists() else {}
    history, log = last.get("history", []), last.get("log", torch.zeros(0, COLUMNS_OF_LOG))
    models.check_same(path, (len(history), len(log)))
    if len(history) >= args.epochs:
        print(f"{args.out} is trained already ({args.epochs} epochs); remove it to train again")
        sys.exit(0)
    torch.manual_seed(args.seed)
    pretrained = False if last else {"no": False, "imagenet": True}.get(args.pretrained, args.pretrained)
    kd_head = getattr(args, "kd_head", False)
    model = models.build_model(args.model, len(data.classes), data.n_frames, pretrained, kd_head).to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    run = types.SimpleNamespace(
        args=args, data=data, val=val, device=device, meta=meta, model=model, optimizer=optimizer,
        history=history, log=log, names=last.get("names", []), saved=time.monotonic(), stop=False,
    )  # fmt: skip
    if last:
        print(f"resuming from {path}: epoch {len(history) + 1}, step {len(log)}")
        model.load_state_dict(last["state"])
        optimizer.load_state_dict(last["optimizer"])
    place_clips(args, data, device)
    if dataset.rank() == 0:
        check_disk(run)
        if not last:
            models.save_checkpoint(args.out / "ep-00.pt", model, **meta, epoch=0)
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stop", True))  # a pre-emption: each step looks at it
    return run


def place_clips(args, data, device):
    """Copy the clips to a GPU where they fit in 40 % of what is free there, and print where they are."""
    need = len(data) * data.n_frames * dataset.N_MELS * 2
    fits = device.type == "cuda" and need < 0.4 * torch.cuda.mem_get_info(device)[0]
    if args.cache == "device" or (not args.cache and fits):
        data.keep_on(device)
    where = "disk, through the page cache" if data.cache is None else f"{device.type} memory"
    print(f"{data.count()} training clips, {need / 2**30:.2f} GiB, are read from {where}")
    print(f"training on {device} in {args.precision or models.PRECISION[device.type]}")


def check_disk(run):
    """Print what disk the run will take; ValueError if there is not enough."""
    out, free = run.args.out, shutil.disk_usage(run.args.out).free
    # besides the epochs: ep-00, best, wa, and last, which holds Adam's state too and is written beside itself
    need = (run.args.epochs + 9) * sum(v.nbytes for v in run.model.state_dict().values())
    need -= sum(p.stat().st_size for p in out.glob("*.pt"))  # of a run that resumes
    need, free = need / 2**30, free / 2**30
    print(f"checkpoints will take up to {need:.2f} GiB in {out} ({free:.0f} GiB free)")
    if need > free:
        raise ValueError(f"{out} has {free:.2f} GiB free, the checkpoints need {need:.2f}: free some, or give --out")


def decay_factor(args, epoch, history):
    """What the decay leaves of --lr in an epoch (from 1), given the log of the epochs before it."""
    if args.decay != "plateau":
        gamma, every, after = args.decay
        return gamma ** max(0, (epoch - 1 - after) // every + 1)
    rate = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(rate, "max", factor=0.5, patience=2)
    for e in history:  # replayed, so that an interruption has no state to lose
        plateau.step(e["val_score"] if "val_score" in e else 1 / e["loss"])
    return rate.param_groups[0]["lr"]


def truth_loss(logits, y, task):
    """Loss_g: BCE with logits (mean over batch and classes), or cross-entropy with soft targets (mean over the batch)."""
    return F.binary_cross_entropy_with_logits(logits, y) if task == "multi-label" else F.cross_entropy(logits, y)


def record(run, log, step, terms):
    """Write a step's terms and the norm of its gradient into its row of the log; nothing waits for the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
    row = torch.stack([*terms.values(), norm]).detach()
    if dataset.world() > 1:  # here, not when the epoch ends: one that was interrupted resumes with rank 0's log
        torch.distributed.all_reduce(row)
    log[step, : len(row)] = row / dataset.world()
    run.names = [*terms, "grad_norm"]


def means(run, log):
    """{name: mean over an epoch's steps so far} of its log; waits for the device. ValueError names the first step whose loss or
    gradient was not finite, and its clips."""
    finite = log.isfinite().all(1)
    if not finite.all():
        args, step, epoch = run.args, int(finite.int().argmin()), len(run.history) + 1
        order = dataset.epoch_order(run.data, args.seed, epoch, args.balanced)
        clips = ", ".join(run.data.ids[i] for i in order[step * args.batch_size : (step + 1) * args.batch_size])
        where = f"epoch {epoch}, step {step}, at --lr {run.optimizer.param_groups[0]['lr']:.2e} (clips {clips})"
        way_out = f"{args.out} keeps what was good: try a lower --lr with another --out"
        raise ValueError(f"loss or gradient was not finite in {where}; {way_out}")
    return dict(zip(run.names, log.mean(0).tolist()))


def save_last(run, log):
    """Write last.pt, from which the same command resumes, with the log of an unfinished epoch; the end of the process if
    SIGTERM asked for it."""
    if dataset.rank():
        return
    means(run, log)  # raises before weights that are not finite are saved
    state = {"optimizer": run.optimizer.state_dict(), "history": run.history, "epoch": len(run.history)}
    models.save_checkpoint(run.args.out / "last.pt", run.model, **run.meta, **state, log=log.cpu(), names=run.names)
    run.saved = time.monotonic()
    if run.stop:
        print(f"stopped by SIGTERM; the same command resumes from {run.args.out}/last.pt", file=sys.stderr, flush=True)
        os._exit(143)  # other processes may be waiting for this one: torchrun ends them


def finish_epoch(run, log, began, clips):
    """Validate, log, and save ep-NN.pt, best.pt and last.pt, in the order in which a kill at any moment loses nothing."""
    losses = means(run, log)
    seconds = time.monotonic() - began  # means waited for the last step
    if dataset.world() > 1:
        for buffer in run.model.buffers():  # on CPUs each rank's batch norms saw its own clips; rank 0's are saved
            torch.distributed.broadcast(buffer, 0)
    args, out, epoch, best, val = run.args, run.args.out, len(run.history) + 1, True, ""
    entry = {"epoch": epoch, "lr": run.optimizer.param_groups[0]["lr"], **losses, "seconds": round(seconds, 2)}
    entry |= {"clips_per_second": round(clips / seconds, 2), "peak_gib": peak_gib(run.device)}
    if run.val is not None:
        how, main = {"precision": args.precision, "label": "validation"}, evaluate.MAIN_SCORE[run.val.task]
        p, y = evaluate.predict(run.model, run.val, run.device, run.data.mean, run.data.std, **how)
        found = evaluate.scores(p, y, run.val.task)
        entry |= {f"val_{k}": v for k, v in evaluate.plain_scores(found).items()}
        entry["val_score"] = float(found[main])  # a NumPy scalar could not be loaded again
        best = not run.history or entry["val_score"] > max(e["val_score"] for e in run.history)
        val = f"  val {main} {100 * entry['val_score']:.2f}{' *' if best else ''}"
    run.history.append(entry)
    run.log = torch.zeros(0, COLUMNS_OF_LOG)
    if dataset.rank() == 0:
        meta = run.meta | {"epoch": epoch, "val_score": entry.get("val_score")}
        models.save_checkpoint(out / f"ep-{epoch:02d}.pt", run.model, **meta)
        if best:
            models.save_checkpoint(out / "best.pt", run.model, **meta)
        lines = "".join(json.dumps(e) + "\n" for e in run.history)
        dataset.atomic_write(out / "log.jsonl", lambda p: p.write_text(lines))
    save_last(run, run.log)  # last of all: until it is there, the epoch is done again
    speed = f"{seconds:.0f} s, {entry['clips_per_second']:.0f} clips/s, peak {entry['peak_gib']:.1f} GiB"
    print(f"epoch {epoch:2d}/{args.epochs}  loss {entry['loss']:.4f}{val}  lr {entry['lr']:.2e}  {speed}", flush=True)
    if epoch == args.epochs:
        print(f"wrote {out}: best.pt, last.pt, ep-NN.pt, log.jsonl")


def peak_gib(device):
    """The most memory in use since the process began: of the GPU if there is one, else resident (GiB)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    unit = 2 ** (30 if sys.platform == "darwin" else 20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


def main():
    args = parse(parser(__doc__))
    device = models.setup(args.device, args.precision)
    data, val = open_data(args)
    run = begin(resolve(args, data), data, val, device)
    net, n_steps = models.wrap(run.model, args, device), dataset.steps_in_epoch(data, args)
    for epoch in range(len(run.history) + 1, args.epochs + 1):
        net.train()
        began, first, decay = time.monotonic(), len(run.log), decay_factor(args, epoch, run.history)
        log = F.pad(run.log, (0, 0, 0, n_steps - first)).to(device)  # a row a step, first those before an interruption
        with models.progress(n_steps * args.batch_size, f"epoch {epoch}", first * args.batch_size) as bar:
            for step, (x, y, _, keep) in enumerate(dataset.batches(data, args, epoch, device, first), first):
                for group in run.optimizer.param_groups:  # linear warmup times the epoch's decay
                    group["lr"] = args.lr * decay * min(1, ((epoch - 1) * n_steps + step + 1) / max(1, args.warmup))
                with models.autocast(device, args.precision):
                    logits = net(x, keep=keep)  # (b, C)
                loss = truth_loss(logits.float(), y, data.task)
                terms = {"loss": loss}  # shown and logged; one more: add it to loss, name it here
                run.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                record(run, log, step, terms)
                run.optimizer.step()
                if bar.update(args.batch_size):  # now and then
                    bar.set_postfix(means(run, log[: step + 1]), refresh=False)
                if run.stop or time.monotonic() - run.saved > RESUME_SECONDS:
                    save_last(run, log[: step + 1])
        finish_epoch(run, log, began, (n_steps - first) * args.batch_size)


if __name__ == "__main__":
    models.command_line(main)
