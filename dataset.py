"""data/<name>/ -> augmented batches: the prepared folder's format, its reader, mixup, masks, the order of an epoch (Section 3.2).

    python -c "import dataset; print(*dataset.FbankDataset('data/demo', 'train')[0])"

From a row on disk to the tensor that a model sees, everything is in this file. To change the augmentation, edit `augment`
(masks, noise, shift), `mix` (mixup) or `draw` (how much of each). prep_data.py writes what this file reads.
"""

import atexit
import collections
import concurrent.futures
import csv
import errno
import fcntl
import functools
import gc
import json
import math
import operator
import os
import pathlib
import signal
import sys
import time
import traceback
import zlib

import numpy as np
import torch
import torch.distributed as dist

SAMPLE_RATE, N_MELS, SHARD = 16000, 128, 512  # Hz, mel bins, clips in a shard
FLOOR = math.log(torch.finfo(torch.float32).eps)  # -15.9424: Kaldi's log-mel of silence
PATCH, STRIDE = 16, 10  # of an AST, in frames and mel bins
VERSION = 1  # of the prepared folder
READERS, AHEAD = 4, 8  # threads that read batches, and how many batches may wait


# --------------------------------------------------------------------------------------------- files and processes


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def atomic_write(path, write):
    """Call write(temporary path), flush it to disk, and rename it to `path`: a file that exists is complete."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        why = e if isinstance(e, OSError) else e.__context__  # torch.save may hide it behind an error of its own
        if not isinstance(why, OSError):
            raise
        raise OSError(f"{path} could not be written ({why.strerror or why}): free some disk or fix permissions") from e
    finally:
        if temporary.exists():  # unlink would raise on a read-only disk
            temporary.unlink()


def write_json(path, content):
    atomic_write(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def read_json(path, *keys):
    """The dictionary in a JSON file; ValueError if it is damaged or lacks one of these keys."""
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        return {k: content[k] for k in keys} | content
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path} is damaged: restore it, or remove it and make it again") from e


def write_csv(path, header, rows):
    """A table in UTF-8, whatever the locale."""

    def write(p):
        with open(p, "w", newline="", encoding="utf-8") as f:
            lines = csv.writer(f, lineterminator="\n")
            lines.writerow(header)
            lines.writerows(rows)

    atomic_write(path, write)


def crc32(path):
    with open(path, "rb") as f:
        return functools.reduce(lambda c, block: zlib.crc32(block, c), iter(lambda: f.read(1 << 22), b""), 0)


LOCKS = {}  # folder: descriptor; the system lifts a lock when its process ends, however it ends


def lock(folder):
    """ValueError if another process works in this folder; remove what a killed one left half-written."""
    descriptor, patience = os.open(folder, os.O_RDONLY), time.monotonic() + 2  # s: a killed one's workers end after it
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as e:
            if time.monotonic() > patience:
                os.close(descriptor)
                raise ValueError(f"{folder} is in use by another process: wait for it, or give another --out") from e
            time.sleep(0.05)
        except OSError:  # a file system without locks
            break
    LOCKS[os.path.realpath(folder)] = descriptor
    for old in pathlib.Path(folder).glob(".*.tmp*"):
        old.unlink()


def unlock(folder):
    os.close(LOCKS.pop(os.path.realpath(folder)))


def stopped(number, _):
    """What SIGTERM and Ctrl-C do. No exception: torch.save and a fork would swallow it."""
    os.write(2, f"stopped by {signal.Signals(number).name}; the same command resumes from the last save\n".encode())
    os._exit(128 + number)  # a file is whole or absent at any moment


def command_line(main):
    """Run a script's main(): an error that a user can fix is one sentence on stderr and exit code 1."""
    if sys.getfilesystemencoding() != "utf-8":  # LC_ALL=C with PYTHONUTF8=0: the names of files are UTF-8 all the same
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    signal.signal(signal.SIGTERM, stopped)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as run_all.sh has it
        signal.signal(signal.SIGINT, stopped)
    atexit.register(gc.freeze)  # or the interpreter spends a second or two on collecting all of torch as it ends
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a class name may have letters that a locale cannot print
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except torch.OutOfMemoryError:
        stop("error: the GPU's memory is full: use a smaller --batch-size or --cache disk to train")
    except (ValueError, OSError) as e:  # TRACEBACK=1 python ... shows where it came from
        way_out = ": free some disk, the same command resumes" if getattr(e, "errno", 0) == errno.ENOSPC else ""
        stop(traceback.format_exc() if os.environ.get("TRACEBACK") else f"error: {e}{way_out}")
    except Exception:
        if not dist.is_initialized():
            raise
        stop(traceback.format_exc())


def stop(message):
    """End the process with this message and exit code 1; under torchrun at once, or it might wait for the others."""
    if not dist.is_initialized():
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


# ------------------------------------------------------------------------------------------------------ the reader

CLIP_COLUMNS = ["row", "id", "path", "split", "fold", "labels", "n_frames", "mean", "var"]  # of clips.csv


class FbankDataset(torch.utils.data.Dataset):
    """One split ('train', 'val' or 'eval') of a prepared folder; with `fold`, 'train' is the other folds, 'eval' that one.
    None is all its clips.

    ds[i] -> (x (T, 128) float32 log-mel in nats, not normalised, zero after the clip's end; y (C,) float32 in {0, 1}).
    ds.batch(indices) -> the same for a batch, float16 and with the clips' own frame counts: what training uses.
    Also: classes (names), task, n_frames, ids, labels (n, L) filled up with -1, mean and std (nats) of this split's own
    frames, splits and has_val (of the whole folder), listed (clips of the split that the source lists). AudioSet's 'train'
    is both its lists, 'train-balanced' the small one. Files are opened for each batch and closed again: AudioSet has 4,100 of them.
    Raises FileNotFoundError or ValueError for a folder that is not complete, or a split or fold that it does not have.
    """

    def __init__(self, root, split, fold=None):
        self.root, self.split, self.fold, self.cache = pathlib.Path(root), split, fold, None
        if not (self.root / "stats.json").is_file():
            what = "is not complete (interrupted?)" if any(self.root.glob("fbank-*")) else "is not a prepared folder"
            raise FileNotFoundError(f"{self.root} {what}: run prep_data.py with --out {self.root}, or name another")
        self.stats = read_json(self.root / "stats.json", "source", "task", "n_frames", "sample_rate", "crc32", "tables")
        if (version := self.stats.get("version")) != VERSION:
            raise ValueError(f"{self.root} has format version {version}, not {VERSION}: prepare it again")
        for name, crc in self.stats["tables"].items():
            if crc32(self.root / name) != crc:
                print(f"{self.root / name} was edited after its preparation: the edited table is used")
        self.source, self.task, self.n_frames = (self.stats[k] for k in ("source", "task", "n_frames"))
        if self.task not in ("multi-label", "single-label"):
            raise ValueError(f"{self.root / 'stats.json'} has task '{self.task}': it is multi-label or single-label")
        self.listed = self.stats.get("listed", {}).get(split)
        try:
            with open(self.root / "classes.csv", newline="", encoding="utf-8-sig") as f:
                self.classes = [r["display_name"] for r in csv.DictReader(f)]
        except (KeyError, ValueError, csv.Error) as e:
            raise ValueError(f"{self.root / 'classes.csv'} is not a table with a column display_name ({e})") from e
        self._read_clips()
        self._check_shards()

    def _read_clips(self):
        """clips.csv -> arrays of the clips of this split"""
        path, split, fold = self.root / "clips.csv", self.split, self.fold
        columns, folds, splits = [[] for _ in range(6)], set(), set()  # columns: a tuple a clip would keep the GC busy
        C, T, single = len(self.classes), self.n_frames, self.task == "single-label"
        try:
            with open(path, newline="", encoding="utf-8-sig") as f:
                lines = csv.reader(f)
                in_order = operator.itemgetter(*map(next(lines).index, CLIP_COLUMNS))
                for row, id_, _, split_, fold_, labels, n, mean, var in map(in_order, filter(None, lines)):
                    folds.add(fold_)
                    splits.add(split_)
                    in_split = f"{split_}-".startswith(f"{split}-")  # 'train' is also train-balanced, -unbalanced
                    if split is None or (in_split if fold is None else (fold_ == str(fold)) == (split == "eval")):
                        own, n = [int(k) for k in labels.split(";")] if labels else [], int(n)
                        if any(not 0 <= k < C for k in own) or (single and len(own) != 1) or not 1 <= n <= T:
                            raise ValueError(f"labels {own} of {C} classes, {self.task}; {n} of {T} frames")
                        for column, value in zip(columns, (int(row), id_, own, n, float(mean), float(var))):
                            column.append(value)
        except (ValueError, IndexError, StopIteration, csv.Error) as e:
            raise ValueError(f"{path} line {lines.line_num} is not a clip's {','.join(CLIP_COLUMNS)} ({e})") from e
        rows, ids, labels, frames, mean, var = columns
        folds, splits = sorted(folds - {""}, key=lambda k: (len(k), k)), sorted(splits - {""})
        if not rows or (fold is not None and (str(fold) not in folds or split not in ("train", "eval"))):
            wanted = f"split '{split}'" + (f" of --fold {fold}" if fold is not None else "")
            by_fold = f"train and eval of --fold {', '.join(folds)} (run_all.sh: FOLDS='{' '.join(folds)}')"
            has = [f"splits {', '.join(splits)}"] * bool(splits) + [by_fold] * bool(folds)
            raise ValueError(f"{self.root} has no {wanted}: it has {'; '.join(has) or 'no clips'}")
        for odd in (s for s in splits if s.split("-")[0] not in ("train", "val", "eval")):
            print(f"{path} has clips of a split '{odd}', which is neither train nor val nor eval: nothing uses them")
        self.splits, self.has_val, self.ids = splits, fold is None and "val" in splits, tuple(ids)
        self.rows, self.frames = np.array(rows), np.array(frames)  # (n,): place in the shards, own frame count
        mean, var, share = np.array(mean), np.array(var), self.frames / self.frames.sum()
        self.mean = float(share @ mean)
        self.std = float(np.sqrt(max(0.0, share @ (var + mean**2) - self.mean**2)))
        most = max(1, *map(len, labels))  # labels of a clip
        self.labels = np.array([own + [-1] * (most - len(own)) for own in labels], np.int64)  # (n, most)

    def _check_shards(self):
        """Every file is there and as long as it should be; the place of its first row."""
        self.starts = []
        for s in range(len(self.stats["crc32"])):
            path = self.root / f"fbank-{s:05d}.npy"
            try:
                shard = np.load(path, mmap_mode="r")  # ValueError where it was cut short
                if shard.dtype != np.float16 or shard.shape[1:] != (self.n_frames, N_MELS):
                    raise ValueError("another shape")
            except (ValueError, EOFError, FileNotFoundError) as e:
                raise ValueError(f"{path} is damaged or missing: remove {self.root} and prepare it again") from e
            self.starts.append(shard.offset)
        if self.rows.max() >= s * SHARD + len(shard):
            raise ValueError(f"{self.root / 'clips.csv'} names row {self.rows.max()}, which the shards do not have")

    def __len__(self):
        return len(self.rows)

    def count(self):
        """'1,234', or '1,234 of 2,000 listed' where the source lists more than could be had"""
        return f"{len(self):,}" + (f" of {self.listed:,} listed" if self.listed not in (None, len(self)) else "")

    def __getitem__(self, i):
        x, _, y = self.batch([i])
        return x[0].float(), targets(y, len(self.classes), self.task)[0]

    def batch(self, indices):
        """Clips by index -> x (B, T, 128) float16, n (B,) own frames, labels (B, L) class indices filled up with -1."""
        indices = np.asarray(indices)
        n, labels = torch.from_numpy(self.frames[indices]), torch.from_numpy(self.labels[indices])
        if self.cache is not None:
            where = torch.from_numpy(indices)
            if self.cache.is_cuda:
                where = where.pin_memory().to(self.cache.device, non_blocking=True)
            return self.cache[where], n, labels
        x = torch.empty(len(indices), self.n_frames, N_MELS, dtype=torch.float16)
        for row, s, place in zip(x.numpy(), *np.divmod(self.rows[indices], SHARD)):
            with open(self.root / f"fbank-{s:05d}.npy", "rb", buffering=0) as f:
                f.seek(self.starts[s] + int(place) * row.nbytes)
                if f.readinto(row) != row.nbytes:  # straight into the batch: no copy, and no GIL held meanwhile
                    raise ValueError(f"{f.name} was cut short: prepare {self.root} again")
        return x, n, labels

    def keep_on(self, device):
        """Copy the split to a device's memory, 512 clips at a time: from then on `batch` indexes it there."""
        cache = torch.empty(len(self), self.n_frames, N_MELS, dtype=torch.float16, device=device)
        for i in range(0, len(self), SHARD):
            cache[i : i + SHARD] = self.batch(range(i, min(i + SHARD, len(self))))[0]
        self.cache = cache

    def weights(self):
        """Class-balanced sampling weights (n,): sum over a clip's labels of 1 / (count + 0.01), Section 3.2 and PSLA.
        Clips without a label count as one more class, or they would never be drawn."""
        labels = self.labels.copy()
        labels[labels[:, 0] < 0, 0] = len(self.classes)
        share = np.append(1 / (np.bincount(labels[labels >= 0], minlength=len(self.classes) + 1) + 0.01), 0.0)
        return share[labels].sum(1)  # -1 reads the last entry: 0


def targets(labels, n_classes, task, smoothing=0.0):
    """Label indices (B, L), filled with -1 -> soft targets (B, C). Smoothing e: multi-label e/C and 1 - e; single-label
    e/C and 1 - e + e/C, which sums to 1 (UAVM; the paper smooths before mixing)."""
    hot = torch.zeros(len(labels), n_classes + 1, device=labels.device)
    hot = hot.scatter_(1, labels % (n_classes + 1), 1.0)[:, :-1]  # -1 falls into a column of its own
    if not smoothing:
        return hot
    off = smoothing / n_classes
    return off + hot * (1 - smoothing - (off if task == "multi-label" else 0))


# ------------------------------------------------------------------------------------------------ the augmentations


def mix(a, b, lam, n_a, n_b):
    """Mixup of sounds, on their log-mel (Section 3.2): a, b (B, T, F) in nats; lam, n_a, n_b (B,) -> (B, T, F).

    log-mel is the log of power, so lam * a + (1 - lam) * b of waveforms is, up to the cross term of two unrelated sounds,
    logaddexp(a + 2 ln lam, b + 2 ln(1 - lam)). Past b's n_b frames it is silent: a + 2 ln lam; past a's n_a frames the
    result is padding, 0. Never below Kaldi's floor. lam = 1 is no mixup in the same arithmetic.
    """
    t = torch.arange(a.shape[1], device=a.device).view(1, -1, 1)
    lam, n_a, n_b = (v.view(-1, 1, 1) for v in (lam, n_a, n_b))
    weak = (b + 2 * torch.log1p(-lam)).masked_fill(t >= n_b, -torch.inf)
    return torch.logaddexp(a + 2 * lam.log(), weak).clamp(min=FLOOR).masked_fill(t >= n_a, 0.0)


def draw(rng, size, n_clips, mixup=0.5, freq_mask=48, time_mask=192, n_frames=1000):
    """Everything random about one global batch but its clips, drawn on the host: {name: (size,) array}.

    partner: uniform over the n_clips training clips, with probability `mixup`; otherwise lam is 1. lam ~ Beta(10, 10).
    f0, f1, t0, t1: masked bins [f0, f1) and frames [t0, t1), widths uniform in [0, freq_mask) and [0, time_mask).
    shift: frames, uniform in [-10, 10]. noise: the clip's amplitude u / 10, u ~ U(0, 1).
    """
    below = lambda limit: np.floor(rng.random(size) * limit).astype(np.int64)
    f, t = below(freq_mask), below(time_mask)
    f0, t0 = below(N_MELS - f), below(n_frames - t)
    partner = rng.integers(n_clips, size=size)
    lam = np.where(rng.random(size) < mixup, rng.beta(10, 10, size), 1.0).astype(np.float32)
    shift, noise = rng.integers(-10, 11, size), rng.random(size, dtype=np.float32) / 10
    masks = {"f0": f0, "f1": f0 + f, "t0": t0, "t1": t0 + t}
    return {"partner": partner, "lam": lam, **masks, "shift": shift, "noise": noise}


def augment(mixed, d, noise, mean, std):
    """The paper's augmentations after mixup, in its order, in one vectorised call on the device (Section 3.2).

    mixed (B, T, F) log-mel in nats; d: tensors (B,) named as in `draw`; noise (B, T, F) uniform in [0, 1). Frequency mask,
    time mask (both 0.0, before normalisation, as AST does), normalisation, noise, circular time shift -> (B, T, F).
    """
    B, T, F = mixed.shape
    f, t = torch.arange(F, device=mixed.device), torch.arange(T, device=mixed.device)
    d = {k: v.view(-1, 1) for k, v in d.items()}
    masked_f = (f >= d["f0"]) & (f < d["f1"])  # (B, F)
    masked_t = (t >= d["t0"]) & (t < d["t1"])  # (B, T)
    x = mixed.masked_fill(masked_f[:, None, :] | masked_t[:, :, None], 0.0)
    x = normalise(x, mean, std) + noise * d["noise"][:, :, None]
    rolled = (t - d["shift"]) % T  # (B, T): frame t comes from t - shift
    return x.gather(1, rolled[:, :, None].expand(B, T, F))


def normalise(x, mean, std):
    """(x - mean) / (2 std), Section 3.2: one convention for both families, because the teacher sees the student's tensor."""
    return (x - mean) / (2 * std)


def patch_grid(n_frames):
    """(rows, columns) of an AST's patches: (12, 99) for 10 s"""
    return (N_MELS - PATCH) // STRIDE + 1, (n_frames - PATCH) // STRIDE + 1


def draw_patches(rng, n_frames, drop_rows, drop_columns):
    """Patchout (PaSST): the patches (N',) that are left of an AST's grid without so many rows and columns, in order."""
    n_rows, n_columns = patch_grid(n_frames)
    rows, columns = (np.sort(rng.permutation(n)[k:]) for n, k in ((n_rows, drop_rows), (n_columns, drop_columns)))
    return (rows[:, None] * n_columns + columns).ravel()


# -------------------------------------------------------------------------------------------------------- an epoch


def epoch_order(data, seed, epoch, balanced):
    """Which clips an epoch shows, in order: a permutation, or as many draws with class-balanced replacement."""
    rng = np.random.default_rng([seed, epoch])
    if not balanced:
        return rng.permutation(len(data))
    weights = data.weights()
    return rng.choice(len(data), len(data), p=weights / weights.sum())


def steps_in_epoch(data, args):
    return max(1, len(data) // args.batch_size)  # the last, short batch is dropped


def prefetch(work, steps, device):
    """Yield work(step) for each step, in order; READERS threads prepare up to AHEAD of them meanwhile."""
    on_gpu = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
    pool, coming = concurrent.futures.ThreadPoolExecutor(READERS, **on_gpu), collections.deque()
    try:
        for step in steps:
            coming.append(pool.submit(work, step))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(data, args, epoch, device, first=0):
    """Yield (x, y, mixed, keep) for the steps of an epoch from step `first` on, each this rank's share of the global batch:
    x (b, T, F) augmented and normalised, y (b, C) soft targets, mixed (b, T, F) the mixture before masks, noise and shift,
    keep (N',) the patches that an AST attends to, None without --patchout.

    All that is random follows from (seed, epoch, step) for the global batch, so it depends neither on the number of ranks
    nor on an interruption. torch's own stream (stochastic depth) is seeded for each step and rank.
    """
    order, share, C = epoch_order(data, args.seed, epoch, args.balanced), args.batch_size // world(), len(data.classes)
    mine = slice(rank() * share, (rank() + 1) * share)

    def host(step):
        clips = order[step * args.batch_size : (step + 1) * args.batch_size]
        rng = np.random.default_rng([args.seed, epoch, step + 1])  # NumPy pads with zeros: 0 is epoch_order's stream
        d = draw(rng, len(clips), len(data), args.mixup, args.freq_mask, args.time_mask, data.n_frames)
        step_seed, d = int(rng.integers(2**62)), {k: v[mine] for k, v in d.items()}
        clips, partners, mixed = clips[mine], d.pop("partner"), d["lam"] < 1  # only partners that are mixed in are read
        d["place"] = np.where(mixed, len(clips) + np.cumsum(mixed) - 1, np.arange(len(clips)))  # of it; else one's own
        if any(args.patchout):
            d["keep"] = draw_patches(rng, data.n_frames, *args.patchout)
        d = {k: torch.from_numpy(v) for k, v in d.items()}
        d["x"], d["n"], d["labels"] = data.batch(np.concatenate([clips, partners[mixed]]))
        if device.type == "cuda":
            d = {k: t if t.is_cuda else t.pin_memory() for k, t in d.items()}
        return d, step_seed

    for d, step_seed in prefetch(host, range(first, steps_in_epoch(data, args)), device):
        d = {k: t.to(device, non_blocking=True) for k, t in d.items()}
        x, n, labels, place = (d.pop(k) for k in ("x", "n", "labels", "place"))
        b, y, keep = len(place), targets(labels, C, data.task, args.label_smoothing), d.pop("keep", None)
        mixed = mix(x[:b].float(), x[place].float(), d["lam"], n[:b], n[place])
        noise_source = torch.Generator(device).manual_seed(step_seed)
        noise = torch.rand((args.batch_size, *mixed.shape[1:]), device=device, generator=noise_source)[mine]
        x, lam = augment(mixed, d, noise, data.mean, data.std), d["lam"].unsqueeze(1)
        torch.manual_seed(step_seed + rank())
        yield x, lam * y[:b] + (1 - lam) * y[place], mixed, keep
