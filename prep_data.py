"""Audio -> data/<name>/: a cache of log-mel spectrograms; and its reader and the augmentations (Sections 3.1 and 3.2).

    python prep_data.py demo                                             # synthetic, no download, seconds
    python prep_data.py esc50                                            # downloads it; esc10: its ESC-10 part
    python prep_data.py fsd50k                                           # downloads it, says first what disk it needs
    python prep_data.py fsd50k --root /path/with/FSD50K.dev_audio        # or a copy that you have
    python prep_data.py csv --root clips.csv --out data/machines         # your own: path,labels[,split][,fold]

The table of `csv` has one clip a row: `path` (absolute, or relative to the table), `labels` joined by ';', and if you
have them `split` (train, val, eval) and `fold` (a number). Any rate, any channels; wav, flac, ogg, mp3.

data/<name>/ then holds clips.csv, classes.csv, stats.json, skipped.csv and fbank-*.npy: float16 (clips, frames, 128),
512 clips a file, zero after a clip's own frames. Interrupted, the same command goes on where it was.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import errno
import fcntl
import functools
import hashlib
import http.client
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib

import numpy as np
import soundfile
import stream_unzip
import torch
import torchaudio
from torchaudio.compliance import kaldi
from tqdm import tqdm

SAMPLE_RATE, N_MELS, SHARD, CHUNK = 16000, 128, 512, 16
FLOOR = math.log(torch.finfo(torch.float32).eps)  # -15.9424: Kaldi's log-mel of silence
VERSION = 1  # of the prepared folder
AUDIO = {
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".m4a", ".mp4", ".webm",
}  # fmt: skip
SECOND = 44100 * 2  # bytes of 44.1 kHz 16-bit mono
DOWNLOADS = {  # facts: place, clips, top folder of its archives, {folder: (the archive that fills it, bytes unpacked)}
    "esc50": (
        "https://github.com/karolpiczak/ESC-50/archive/",
        2000,
        "ESC-50-master",
        {"audio": (["master.zip"], 2000 * 5 * SECOND)},
    ),
    "fsd50k": (
        "https://zenodo.org/records/4060432/files/",
        51197,
        None,
        {
            "FSD50K.ground_truth": (["FSD50K.ground_truth.zip"], 4_000_000),
            "FSD50K.dev_audio": (
                [f"FSD50K.dev_audio.{part}" for part in ("z01", "z02", "z03", "z04", "z05", "zip")],
                round(80.4 * 3600 * SECOND),
            ),
            "FSD50K.eval_audio": (["FSD50K.eval_audio.z01", "FSD50K.eval_audio.zip"], round(27.9 * 3600 * SECOND)),
        },
    ),
}
MD5 = {  # of what the Zenodo record holds; GitHub makes its archive anew, so it has no stable sum
    "FSD50K.ground_truth.zip": "ca27382c195e37d2269c4c866dd73485",
    "FSD50K.dev_audio.z01": "faa7cf4cc076fc34a44a479a5ed862a3",
    "FSD50K.dev_audio.z02": "8f9b66153e68571164fb1315d00bc7bc",
    "FSD50K.dev_audio.z03": "1196ef47d267a993d30fa98af54b7159",
    "FSD50K.dev_audio.z04": "d088ac4e11ba53daf9f7574c11cccac9",
    "FSD50K.dev_audio.z05": "81356521aa159accd3c35de22da28c7f",
    "FSD50K.dev_audio.zip": "c480d119b8f7a7e32fdb58f3ea4d6c5a",
    "FSD50K.eval_audio.z01": "3090670eaeecc013ca1ff84fe4442aeb",
    "FSD50K.eval_audio.zip": "6fa47636c3a3ad5c7dfeba99f2637982",
}
TIMEOUT, WAITS = 60, (1, 2, 4, 8, 16)  # s: of a silent connection, and before the next attempt while nothing new comes
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "eval": "eval", "test": "eval", "": ""}


# ------------------------------------------------------------------------------------------------------------ features


def bands(matrix, width=32):
    """A mostly zero (rows, columns) matrix as [(first row, block)]: `width` columns each, the zero rows around them cut."""
    found = []
    for block in matrix.split(width, 1):
        used = block.any(1).nonzero()
        found.append((used[0].item(), block[used[0] : used[-1] + 1].contiguous()))
    return found


def times(x, bands):
    """x @ matrix, of bands(matrix)."""
    return torch.cat([x[:, row : row + len(block)] @ block for row, block in bands], 1)


@functools.cache
def mel_banks():
    banks, _ = kaldi.get_mel_banks(N_MELS, 512, float(SAMPLE_RATE), 20.0, 0.0, 100.0, -500.0, 1.0)
    return bands(banks.T)  # (256, 128)


def usable_rate(rate):
    """A rate that shares no useful divisor with 16000 would need a filter of gigabytes: the nearest multiple of 25 Hz."""
    odd = rate * SAMPLE_RATE / math.gcd(rate, SAMPLE_RATE) ** 2 > 2e7
    return max(25, round(rate / 25) * 25) if odd else rate


@functools.cache
def resampler(rate):
    """(samples,) at `rate` Hz -> at 16 kHz: torchaudio's Resample, its filter made once and, where it is long, without
    most of its zeros (from 44.1 kHz two times faster, to the same bits).

    A rate that shares no useful divisor with 16000 would need a filter of gigabytes, so it is taken for the nearest
    multiple of 25 Hz (0.03 % of pitch at 44.1 kHz).
    """
    rate = usable_rate(rate)
    whole = torchaudio.transforms.Resample(rate, SAMPLE_RATE)
    old, new, width = rate // whole.gcd, SAMPLE_RATE // whole.gcd, whole.width
    if new < 32:
        return whole
    phases = bands(whole.kernel[:, 0].T)  # (old + 2 width, new): a block of old samples and what is around it -> new

    def resample(x):
        blocks = torch.nn.functional.pad(x, (width, width + old)).unfold(0, old + 2 * width, old)
        return times(blocks, phases).flatten()[: math.ceil(new * len(x) / old)]

    return resample


def fbank(waveform, sample_rate=SAMPLE_RATE):
    """Kaldi log-mel filterbank (Section 2.1): (samples,) floats in [-1, 1] -> (frames, 128), natural log (nats).

    25 ms Hanning window every 10 ms, snip edges, DC removed in each frame, preemphasis 0.97, power, 20 Hz low cut. Equals
    torchaudio.compliance.kaldi.fbank(htk_compat=True, window_type='hanning', num_mel_bins=128, dither=0) at 16 kHz, and is
    faster because its tables are made once. Fewer than 400 samples at 16 kHz give 0 frames.
    """
    x = torch.as_tensor(waveform, dtype=torch.float32)
    if sample_rate != SAMPLE_RATE:
        x = resampler(sample_rate)(x)
    if len(x) < 400:
        return x.new_zeros(0, N_MELS)
    window = torch.nn.functional.pad(torch.hann_window(400, periodic=False), (0, 112))
    mels = []
    for frames in x.unfold(0, 400, 160).split(512):  # (512, 400) at a time: it stays in the processor's cache
        frames = frames - frames.mean(1, keepdim=True)
        sharp = torch.zeros(len(frames), 512)
        torch.sub(frames[:, 1:], 0.97 * frames[:, :-1], out=sharp[:, 1:400])
        sharp[:, 0] = frames[:, 0] - 0.97 * frames[:, 0]
        spectrum = torch.fft.rfft(sharp.mul_(window))[:, :256]
        power = spectrum.real.square() + spectrum.imag.square()  # (512, 256)
        mels.append(times(power, mel_banks()).clamp_(min=torch.finfo(torch.float32).eps).log_())
    return torch.cat(mels)


def open_audio(path):
    """An open soundfile.SoundFile. Raises soundfile.LibsndfileError, FileNotFoundError, ValueError for an absurd rate."""
    if not os.path.exists(path):
        raise FileNotFoundError("no such file")
    f = soundfile.SoundFile(path)
    if not 1000 <= f.samplerate <= 768000:
        f.close()
        raise ValueError(f"a sample rate of {f.samplerate} Hz")
    return f


def read_mono(f, n):
    """The next n samples of an open file, or what is left of it: (n,) float32, channels averaged."""
    kind = "int16" if f.subtype == "PCM_16" else "float32"  # torch converts faster, to the same bits
    x = f.read(n, dtype=kind)
    if kind == "float32" and not np.isfinite(x).all():
        raise ValueError("samples that are not finite")
    x = torch.from_numpy(x) if kind == "float32" else torch.from_numpy(x).float() / 32768
    return x if x.ndim == 1 else x.mean(1)


def load_audio(path, seconds):
    """The first `seconds` of an audio file as (samples,) float32 at 16 kHz: channels averaged, then resampled.

    Raises soundfile.LibsndfileError for what it cannot decode, FileNotFoundError, ValueError for no or non-finite samples.
    """
    with open_audio(path) as f:
        rate = f.samplerate
        x = read_mono(f, math.ceil((seconds + 0.1) * rate))  # with a margin for the filter
    if not len(x):
        raise ValueError("no samples")
    return (x if rate == SAMPLE_RATE else resampler(rate)(x))[: round(seconds * SAMPLE_RATE)]


def blocks_at_16k(path, seconds=60):
    """Yield an audio file as blocks (samples,) float32 at 16 kHz of `seconds`: together what load_audio gives of the whole.

    Each block is resampled with one second of its neighbours on either side, many times the filter's length.
    """
    with open_audio(path) as f:
        rate = f.samplerate
        second = usable_rate(rate) if rate != SAMPLE_RATE else rate  # samples that become 16000
        before, x, first = torch.empty(0), read_mono(f, (seconds + 1) * second), True
        while len(x):
            coming = read_mono(f, seconds * second)
            own = min(len(x), seconds * second) if len(coming) else len(x)
            y = torch.cat([before, x])
            y = y if rate == SAMPLE_RATE else resampler(rate)(y)
            skip = 0 if first else SAMPLE_RATE
            yield y[skip : skip + seconds * SAMPLE_RATE] if len(coming) else y[skip:]
            before, x, first = x[own - second : own], torch.cat([x[own:], coming]), False


def stream_audio(path, window, hop):
    """Yield (start in s, (samples,) float32 at 16 kHz) of windows of `window` s every `hop` s, reading blockwise from disk.

    Each window equals load_audio of the whole file cut there. The last one ends at the file's end and may be shorter; a
    rest without a single new frame (25 ms) is left out. A file shorter than the window comes once, at its own length.
    Raises what load_audio raises (in the middle of the file too), and ValueError if it is shorter than one frame.
    """
    n, at, left = round(window * SAMPLE_RATE), 0, torch.empty(0)  # left: samples from `offset` on
    blocks, offset, done = blocks_at_16k(path), 0, False
    while True:
        start = round(at * hop * SAMPLE_RATE)
        while not done and offset + len(left) <= start + n:  # one sample more than the window tells that it is not the last
            block = next(blocks, None)
            done = block is None
            if not done:
                keep = left[max(0, start - offset) :]
                offset, left = offset + len(left) - len(keep), torch.cat([keep, block])
        x = left[max(0, start - offset) : max(0, start - offset) + n]
        if len(x) < 400:
            if not at:
                raise ValueError("shorter than one frame of 25 ms" if len(x) else "no samples")
            return
        yield start / SAMPLE_RATE, x
        if done and start + n >= offset + len(left):
            return
        at += 1


# ------------------------------------------------------------------------------------------------------------ datasets
# Each returns (classes [(mid, name)], clips [(id, path, split, fold, label indices)]): what is there, before any is read.


def read_table(path, columns):
    """The rows of a CSV file with at least these columns, as dictionaries."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is --root the right folder?")
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = csv.DictReader(f)
            lacking = [c for c in columns if c not in (rows.fieldnames or [])]
            if lacking:
                raise ValueError(f"{path} has no column '{lacking[0]}': its first line must name {', '.join(columns)}")
            whole = []
            for row in rows:
                if None in row or None in row.values():
                    cells = len(rows.fieldnames)
                    raise ValueError(f"{path} line {rows.line_num} does not have the {cells} cells of the first line")
                whole.append(row)
            return whole
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not text in UTF-8: save it as such") from e


def whole_number(table, line, column, text):
    if not text.strip().isdecimal():
        raise ValueError(f"{table} line {line}: {column} '{text}' is not a whole number")
    return int(text)


def esc(root, ten):
    """ESC-50's official layout; ESC-10 is the rows whose esc10 column is True."""
    table = root / "meta" / "esc50.csv"
    names, clips = {}, []
    for n, r in enumerate(read_table(table, ["filename", "fold", "target", "category", "esc10"]), 2):
        if not ten or r["esc10"] == "True":
            target, fold = (whole_number(table, n, c, r[c]) for c in ("target", "fold"))
            names[target] = r["category"]
            clips.append((r["filename"], root / "audio" / r["filename"], "", fold, [target]))
    index = {target: i for i, target in enumerate(sorted(names))}
    return [("", names[t]) for t in index], [(*c[:4], [index[c[4][0]]]) for c in clips]


def fsd50k(root):
    """FSD50K's official layout and its official split of the dev part into train and val."""
    truth = root / "FSD50K.ground_truth"
    read_table(truth / "dev.csv", ["fname", "labels", "mids", "split"])  # names what is missing before the rest is read
    with open(truth / "vocabulary.csv", newline="") as f:
        vocabulary = [(mid, name) for _, name, mid in csv.reader(f)]
    index = {mid: i for i, (mid, _) in enumerate(vocabulary)}
    clips = []
    for part in ("dev", "eval"):
        for n, r in enumerate(read_table(truth / f"{part}.csv", ["fname", "mids"]), 2):
            labels = [index.get(mid) for mid in r["mids"].split(",")]
            if None in labels:
                raise ValueError(f"{truth / part}.csv line {n}: a class of '{r['mids']}' is not in vocabulary.csv")
            path = root / f"FSD50K.{part}_audio" / f"{r['fname']}.wav"
            clips.append((r["fname"], path, r.get("split", "eval"), "", sorted(labels)))
    return vocabulary, clips


def audioset(root):
    """AudioSet's official lists and class_labels_indices.csv in root, the audio anywhere below it, by id.

    Names of files: ID, YID, ID_30.000, ID_30000_40000, any ending. Splits train-balanced, train-unbalanced and eval: split
    'train' is both training lists. Missing videos are normal: they have no path here and a line in skipped.csv.
    """
    classes = [
        (r["mid"], r["display_name"]) for r in read_table(root / "class_labels_indices.csv", ["mid", "display_name"])
    ]
    index = {mid: i for i, (mid, _) in enumerate(classes)}
    wanted = {}  # id -> (split, labels)
    for split in ("train-balanced", "train-unbalanced", "eval"):
        table = root / f"{split.removeprefix('train-')}{'_train' if split != 'eval' else ''}_segments.csv"
        if not table.is_file():
            if split != "train-unbalanced":
                raise FileNotFoundError(f"{table} is missing: is --root the right folder?")
            print(f"{table.name} is not there: preparing the balanced part only")
            continue
        with open(table, newline="") as f:
            for n, r in enumerate(csv.reader(f, skipinitialspace=True), 1):
                if r and not r[0].startswith("#"):
                    labels = [index.get(mid) for mid in r[3].split(",")] if len(r) == 4 else [None]
                    if None in labels:
                        raise ValueError(
                            f"{table} line {n}: not 'id, start, end, \"classes of class_labels_indices.csv\"'"
                        )
                    if r[0] in wanted:
                        raise ValueError(f"{table} line {n}: '{r[0]}' is listed already")
                    wanted[r[0]] = split, sorted(labels)
    found = {}
    for folder, _, files in os.walk(root):
        for file in files:
            stem, ending = os.path.splitext(file)
            if ending.lower() in AUDIO:
                once = re.sub(r"_[\d.]+$", "", stem)
                names = [stem, once, re.sub(r"_[\d.]+$", "", once)]
                name = next((k for n in names for k in (n, n.removeprefix("Y")) if k in wanted), None)
                path = os.path.join(folder, file)
                if name is not None and path < found.get(name, "\U0010ffff"):  # of several copies the first in order
                    found[name] = path
    counts = collections.Counter(split for split, _ in wanted.values())
    have = collections.Counter(wanted[name][0] for name in found)
    print("; ".join(f"{s}: {have[s]} of {n} listed videos are there" for s, n in counts.items()))
    return classes, [(k, found.get(k), split, "", labels) for k, (split, labels) in wanted.items()]


def class_folders(root):
    """A folder of class-named folders, audio at any depth below them; above them may stand train, val and eval folders."""
    tops = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    split_of = {p: SPLITS[p.name.lower()] for p in tops if p.name.lower() in SPLITS}
    if split_of and len(split_of) < len(tops):
        raise ValueError(
            f"{root} holds folders of splits ({next(iter(split_of)).name}) beside others: sort them one way"
        )
    groups = [(split, p) for top, split in split_of.items() for p in sorted(top.iterdir()) if p.is_dir()] or [
        ("", p) for p in tops
    ]
    names = sorted({p.name for _, p in groups})
    index = {name: i for i, name in enumerate(names)}
    clips, other = [], 0
    for split, folder in groups:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
            if path.suffix.lower() in AUDIO:
                clips.append([path.relative_to(root).as_posix(), path, split, "", [index[folder.name]]])
            else:
                other += 1
    if len(names) < 2 or not clips:
        raise ValueError(
            f"{root} holds no class folders with audio: expected {root}/CLASS/*.wav, or a table (--root clips.csv)"
        )
    print(
        f"{root}: {len(clips)} clips in {len(names)} class folders" + (f"; {other} files are no audio" if other else "")
    )
    if not split_of:
        make_split(clips, len(names), root)
    return [("", name) for name in names], [tuple(c) for c in clips]


def make_split(clips, n_classes, source, seed=0):
    """Give clips without split or fold a stratified 80/10/10 split, and say so."""
    for clip, split in zip(clips, stratify([c[4] for c in clips], n_classes, seed)):
        clip[2] = split
    print(
        f"{source} has neither split nor fold: made a stratified 80/10/10 split from seed {seed} (written to clips.csv)"
    )


def own_table(table):
    """Anybody's table: path,labels[,split][,fold]; a missing split is made, stratified 80/10/10, and said."""
    rows = read_table(table, ["path", "labels"])
    labels = [sorted({v.strip() for v in (r["labels"] or "").split(";") if v.strip()}) for r in rows]
    names = sorted({v for row in labels for v in row})
    if not names:
        raise ValueError(f"{table} has no {'labels' if rows else 'rows'}")
    index = {v: i for i, v in enumerate(names)}
    labels = [[index[v] for v in row] for row in labels]
    clips, seen = [], {}
    for n, (r, own) in enumerate(zip(rows, labels), 2):
        if r["path"] in seen:
            raise ValueError(f"{table} line {n}: '{r['path']}' stands in line {seen[r['path']]} already")
        seen[r["path"]] = n
        split, fold = (r.get("split") or "").strip().lower(), (r.get("fold") or "").strip()
        if split not in SPLITS:
            raise ValueError(f"{table} line {n}: unknown split '{split}': use train, val or eval")
        if fold and not fold.isdecimal():
            raise ValueError(f"{table} line {n}: fold '{fold}' is not a whole number")
        clips.append([r["path"], table.parent / r["path"], SPLITS[split], int(fold) if fold else "", own])
    for column, i in (("split", 2), ("fold", 3)):
        empty = [n for n, c in enumerate(clips, 2) if c[i] == ""]
        if 0 < len(empty) < len(clips):
            raise ValueError(f"{table} line {empty[0]}: no {column}, though other lines have one")
    if clips[0][2] == "" and clips[0][3] == "":
        make_split(clips, len(names), table)
    return [("", name) for name in names], [tuple(c) for c in clips]


def stratify(labels, n_classes, seed, shares=(("train", 0.8), ("val", 0.1), ("eval", 0.1))):
    """Iterative stratification (Sechidis et al., 2011): rare classes first, each clip to the split that lacks it most."""
    members = collections.defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(labels)):
        for c in labels[i] or [n_classes]:  # no label is a class of its own here
            members[c].append(int(i))
    split, room = [None] * len(labels), {name: share * len(labels) for name, share in shares}
    want = {c: {name: share * len(m) for name, share in shares} for c, m in members.items()}
    for c in sorted(members, key=lambda c: (len(members[c]), c)):
        for i in members[c]:
            if split[i] is None:
                split[i] = max(room, key=lambda s: (want[c][s], room[s]))
                room[split[i]] -= 1
                for k in labels[i] or [n_classes]:
                    want[k][split[i]] -= 1
    return split


DEMO_CLASSES = [
    "am_tone", "bell", "chirp_down", "chirp_up", "clicks", "fm_tone", "harmonic_stack", "noise_band", "noise_burst", "tone",
]  # fmt: skip


def demo_sound(rng, kind, n):
    """One synthetic event of n samples at 16 kHz, peak near 1."""
    t = np.arange(n) / SAMPLE_RATE
    centre = 8 + 3 * DEMO_CLASSES.index(kind) / (len(DEMO_CLASSES) - 1)
    f = 2 ** (centre + rng.uniform(-0.5, 0.5))  # a class has its octave, between 181 and 2896 Hz, which others overlap
    phase = 2 * np.pi * f * t
    if kind == "tone":
        return np.sin(phase)
    if kind == "am_tone":
        return np.sin(phase) * (0.55 + 0.45 * np.sin(2 * np.pi * rng.uniform(4, 12) * t))
    if kind == "fm_tone":
        rate = rng.uniform(4, 12)
        return np.sin(phase + 0.06 * f / rate * np.sin(2 * np.pi * rate * t))
    if kind in ("chirp_up", "chirp_down"):
        slide = 2 ** np.linspace(0, rng.uniform(0.5, 1.2), n)
        return np.sin(2 * np.pi * f * np.cumsum(slide if kind == "chirp_up" else slide[::-1]) / SAMPLE_RATE)
    if kind == "harmonic_stack":
        return sum(np.sin(k * phase / 3) / k for k in range(1, 7)) / 2
    if kind == "bell":
        return sum(np.sin(r * phase) * np.exp(-t * r * 3) for r in (1, 2.76, 5.4)) / 2
    if kind == "clicks":
        x = np.zeros(n)
        x[np.arange(int(rng.integers(400)), n, int(SAMPLE_RATE / rng.uniform(5, 20)))] = 1
        return np.convolve(x, rng.standard_normal(64) * np.exp(-np.arange(64) / 12), "same") / 2
    white = np.fft.rfft(rng.standard_normal(n))  # noise_band is steady, noise_burst comes in short gusts
    hz = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
    white[(hz < f) | (hz > f * rng.uniform(1.3, 2))] = 0
    x = np.fft.irfft(white, n)
    x /= np.abs(x).max() + 1e-9
    return x if kind == "noise_band" else x * (np.sin(2 * np.pi * rng.uniform(2, 5) * t) > 0.3)


def demo(root, counts=(("train", 240), ("val", 60), ("eval", 120))):
    """Write the demo's audio and its table to root: clips of 2 s, 1 to 3 of ten synthetic sounds over a noise floor."""
    (root / "audio").mkdir(parents=True, exist_ok=True)
    rows, n = [], 2 * SAMPLE_RATE
    for s, (split, count) in enumerate(counts):
        for i in range(count):
            rng = np.random.default_rng([2022, s, i])
            x = rng.standard_normal(n) * 10 ** rng.uniform(-2.8, -2.0)
            kinds = rng.choice(len(DEMO_CLASSES), rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]), replace=False)
            for k in sorted(kinds):
                length = int(rng.uniform(0.6, 1.8) * SAMPLE_RATE)
                at = rng.integers(n - length)
                fade = np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / 160)
                x[at : at + length] += demo_sound(rng, DEMO_CLASSES[k], length) * fade * 10 ** rng.uniform(-1.1, -0.5)
            name = f"audio/{split}-{i:03d}.wav"
            soundfile.write(root / name, x / max(1, np.abs(x).max()), SAMPLE_RATE, subtype="PCM_16")
            rows.append([name, ";".join(DEMO_CLASSES[k] for k in sorted(kinds)), split])
    write_csv(root / "clips.csv", ["path", "labels", "split"], rows)
    return own_table(root / "clips.csv")


DATASETS = {  # facts: seconds kept of a clip, how to list the clips
    "demo": (2, demo),
    "esc10": (5, functools.partial(esc, ten=True)),
    "esc50": (5, functools.partial(esc, ten=False)),
    "fsd50k": (10, fsd50k),
    "audioset": (10, audioset),
    "csv": (10, lambda root: class_folders(root) if root.is_dir() else own_table(root)),
}
ROOTS = {  # what --root must be where nothing can be downloaded
    "audioset": "AudioSet cannot be downloaded: a folder with balanced_train_segments.csv, unbalanced_train_segments.csv, "
    "eval_segments.csv and class_labels_indices.csv of research.google.com/audioset, and anywhere below it the audio that "
    "you have, named by id: ID.wav, YID.wav, ID_30.000.flac, ID_30000_40000.wav",
    "csv": "a table, or a folder of class-named folders",
}


# ----------------------------------------------------------------------------------------------------------- downloads


def ask(url, method="GET", have=0):
    """The server's reply to url, from byte `have` on. Zenodo refuses Python's own name (403), so this gives another."""
    headers = {"User-Agent": "cmkd-prep-data/1.0"} | ({"Range": f"bytes={have}-"} if have else {})
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=TIMEOUT)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def content_length(url):
    """The bytes that the server announces for url; 0 if it does not tell, and then the download will say why."""
    try:
        with ask(url, "HEAD") as reply:
            return int(reply.headers.get("Content-Length") or 0)
    except NETWORK:
        return 0


def transfer(url, part):
    """Go on with the file `part` until all of url is in it. Raises one of NETWORK if that fails."""
    have = size_of(part)
    try:
        with ask(url, have=have) as reply:
            goes_on = reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")  # else all of it comes
            length = int(reply.headers.get("Content-Length") or 0)
            with open(part, "ab" if goes_on else "wb") as f:
                start, total = f.tell(), length and f.tell() + length
                with tqdm(desc=part.stem, initial=start, total=total or None, unit="B", unit_scale=True) as bar:
                    while block := reply.read(1 << 16):
                        bar.update(f.write(block))
                if f.tell() < total:
                    raise ConnectionError(f"cut after {f.tell()} of {total} bytes")
    except urllib.error.HTTPError as e:
        if e.code != 416:  # 416: nothing is left to send
            raise


def fetch(url, path):
    """Download url to path through path.part, going on with what is there: a file named path is whole and verified.

    Raises ValueError for another MD5 (the file is removed), ConnectionError if the server or the network does not give it.
    """
    part, md5 = path.with_name(f"{path.name}.part"), MD5.get(path.name)
    best, failures = size_of(part), 0
    while not path.exists():
        try:
            transfer(url, part)
            with open(part, "rb") as f:
                found = hashlib.file_digest(f, "md5").hexdigest() if md5 else zipfile.is_zipfile(f)
            if found == (md5 or True):
                return os.replace(part, path)
            part.unlink()
            if not md5:
                raise ConnectionError("what came is no whole zip archive")
            way_out = "run the same command again, or, if that does not help, give --root a copy of the data"
            raise ValueError(f"{url} came with MD5 {found}, not {md5}, and was removed: {way_out}")
        except NETWORK as e:
            reason = str(e) or type(e).__name__
            best, failures = (size_of(part), 0) if size_of(part) > best else (best, failures)
            refused = isinstance(e, urllib.error.HTTPError) and e.code < 500 and e.code != 429
            if refused or failures == len(WAITS):
                way_out = "run the same command again, it goes on where it was, or give --root a copy of the data"
                raise ConnectionError(f"{url} cannot be fetched ({reason}): {way_out}") from e
            print(f"{path.name}: {reason}; trying again in {WAITS[failures]} s")
            time.sleep(WAITS[failures])
            failures += 1


def members(parts):
    """(name, blocks of bytes) of each member of a zip archive, its CRC checked; a split archive is z01, z02, ..., zip."""

    def joined():
        for path in parts:
            with open(path, "rb") as f:
                if path == parts[0] and f.read(4) not in (b"PK\7\10", b"PK00"):  # a split archive begins with a mark
                    f.seek(0)
                yield from iter(lambda: f.read(1 << 20), b"")

    if len(parts) > 1:
        for name, _, blocks in stream_unzip.stream_unzip(joined()):
            yield name.decode("utf-8", "replace"), blocks
        return
    with zipfile.ZipFile(parts[0]) as archive:
        for info in archive.infolist():
            with archive.open(info) as f:
                yield info.filename, iter(lambda: f.read(1 << 20), b"")


def unpack(parts, root, top, size):
    """Unpack a zip archive below root without its folder `top`, about `size` bytes: each file is whole or absent, a link
    is a plain file. ValueError for a damaged archive, or for a member that would leave root."""
    temporary = root / ".unpacking"
    try:
        with tqdm(desc=f"unpacking {parts[-1].name}", total=size, unit="B", unit_scale=True) as bar:
            for name, blocks in members(parts):
                steps = name.replace("\\", "/").split("/")
                if not steps[0] or any(step == ".." or ":" in step for step in steps):
                    raise ValueError(f"{parts[-1]} holds '{name}', which would leave {root}: do not trust this archive")
                with open(temporary, "wb") as f:
                    for block in blocks:
                        bar.update(f.write(block))
                if steps[-1]:  # else a folder
                    target = root.joinpath(*steps[steps[0] == top :])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(temporary, target)
    except (stream_unzip.UnzipError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
        reason = str(e) or type(e).__name__
        raise ValueError(f"{parts[-1]} is damaged ({reason}): remove all its parts, run the same command again") from e
    temporary.unlink(missing_ok=True)


def check_disk(source, root, todo, seconds):
    """Print what the archives in `todo` and the prepared clips need of the disk; OSError if it has less."""
    url, n_clips = DOWNLOADS[source][:2]
    need = held = coming = 0
    for folder, (parts, size) in todo.items():
        here = archive = 0
        for path in (root / name for name in parts):
            whole, half = size_of(path), size_of(path.with_name(f"{path.name}.part"))
            here += whole or half
            archive += whole or max(half, content_length(url + path.name) or size // len(parts))
        unpacked = sum(p.stat().st_size for p in (root / folder).rglob("*") if p.is_file())
        coming += archive - here
        held += archive - here + max(0, size - unpacked)
        need = max(need, held)
        held -= archive  # removed before the next comes
    need = max(need, held + n_clips * round(seconds * 100) * N_MELS * 2)
    free = shutil.disk_usage(root).free
    has = f"{need / 1e9:.1f} GB of free disk in {root}, which has {free / 1e9:.1f} GB"
    print(f"{source}: {coming / 1e9:.1f} GB to fetch from {url}; unpacked and prepared it needs {has}")
    if need > free:
        raise OSError(f"{source} needs {has}: free some, or give --out on a larger disk")


def download(source, root, seconds):
    """Fetch a data set from its official place, unpack it into root and remove the archives; what is done is kept.

    NAME.part is a part of an archive, NAME a whole and verified one; FOLDER.unpacked says that its archive is done.
    Raises OSError if disk, network or server do not allow it, ValueError if what came is not what it should be.
    """
    url, n_clips, top, archives = DOWNLOADS[source]
    root.mkdir(parents=True, exist_ok=True)
    done = {folder: root / f"{folder}.unpacked" for folder in archives}
    todo = {folder: archive for folder, archive in archives.items() if not done[folder].exists()}
    if todo:
        check_disk(source, root, todo, seconds)
    with room(root):
        for folder, (parts, size) in archives.items():
            paths = [root / name for name in parts]
            if folder in todo:
                for path in paths:
                    fetch(url + path.name, path)
                unpack(paths, root, top, size)
                os.sync()
                replace(done[folder], lambda f: f.write("unpacked, its archive removed\n"))
                print(f"{root / folder} is unpacked, its archive is removed")
            for path in paths:
                path.unlink(missing_ok=True)
    _, clips = DATASETS[source][1](root)
    absent = [c[1] for c in clips if not c[1].is_file()]
    if absent or len(clips) != n_clips:
        what = f"{absent[0]} is missing" if absent else f"its tables name {len(clips)} clips, not {n_clips}"
        raise ValueError(f"{root} is not all of {source} ({what}): remove it, and run the same command again")
    return root


# ------------------------------------------------------------------------------------------------------- preparation


@contextlib.contextmanager
def room(folder):
    """Names the disk if there is no room on it."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"the disk of {folder} is full: free some, the same command goes on where it was") from e
        raise


def replace(path, write):
    """Call write(open text file) and put the result in place: `path` is whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    with room(path.parent), open(temporary, "w", newline="", encoding="utf-8") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_csv(path, header, rows):
    replace(path, lambda f: csv.writer(f, lineterminator="\n").writerows(itertools.chain([header], rows)))


def checksum(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def write_json(path, content):
    """A dictionary and its checksum, in place atomically; read_json verifies it."""
    replace(path, lambda f: json.dump(content | {"checksum": checksum(content)}, f, indent=1))


def read_json(path, version=None):
    """What write_json wrote; ValueError if it is of another version, or a byte of it has changed since."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content.pop("checksum", None)
    except (ValueError, AttributeError, TypeError):
        content = known = None
    if version is not None and content is not None and content.get("version") != version:
        raise ValueError(
            f"{path.parent} is of version {content.get('version')}, this code reads {version}: prepare it again"
        )
    if content is None or known not in (None, checksum(content)):
        raise ValueError(f"{path} is damaged or was edited: put it back, or remove {path.parent} and make it again")
    return content


LOCKS = {}  # folder: descriptor; the system lifts a lock when its process ends, however it ends


def lock(folder):
    """Refuse a folder in which another process works; remove what a killed one left half-written."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(descriptor)
        raise ValueError(f"{folder} is in use by another process: wait for its end, or give another --out") from e
    except OSError:  # a file system without locks
        pass
    LOCKS[os.path.realpath(folder)] = descriptor
    for old in pathlib.Path(folder).glob(".*.tmp*"):
        old.unlink()


def unlock(folder):
    os.close(LOCKS.pop(os.path.realpath(folder)))


def cores():
    """The cores that this process may use: those of its affinity, fewer where a container's quota says so."""
    n, quota = os.cpu_count(), pathlib.Path("/sys/fs/cgroup/cpu.max")
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        n = len(os.sched_getaffinity(0))
    if quota.exists():
        limit, period = quota.read_text().split()
        n = n if limit == "max" else min(n, math.ceil(int(limit) / int(period)))
    return n


def begin_worker():
    """Runs first in each worker: ends it when the preparation is killed, or it would wait for work for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in LOCKS.values():  # the lock is the parent's
        os.close(descriptor)
    torch.set_num_threads(1)
    np.empty(31 << 20, np.uint8)  # one large block, freed at once: from here glibc keeps the memory that a clip frees
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work(shard, rows, paths, n_frames, seconds):
    """Fill rows of a shard under construction from these files; [(frames, mean, var) or the reason it cannot]."""
    out = np.lib.format.open_memmap(shard, mode="r+")
    found = []
    for row, path in zip(rows, paths):
        try:
            x = fbank(load_audio(path, seconds))[:n_frames].half()
            if not len(x):
                raise ValueError("shorter than one frame of 25 ms")
        except (soundfile.SoundFileError, ValueError, OSError) as e:
            found.append(" ".join(str(e).split()))
            continue
        out[row, : len(x)] = x.numpy()
        wide = x.double()
        found.append((len(x), wide.mean().item(), wide.var(correction=0).item()))
    return found


def check_clips(source, clips, task):
    """The task of a list of clips, given or found; ValueError for a list that cannot be trained on and scored."""
    if not clips:
        raise ValueError(f"{source}: no clips, the tables are empty or no audio was found")
    ids = collections.Counter(c[0] for c in clips)
    if len(ids) < len(clips):
        raise ValueError(f"{source}: clip '{max(ids, key=ids.get)}' is listed {max(ids.values())} times")
    many = next((c for c in clips if len(c[4]) != 1), None)
    if task == "single-label" and many:
        raise ValueError(f"--task single-label, but clip '{many[0]}' has {len(many[4])} labels")
    splits, folds = collections.Counter(c[2].split("-")[0] for c in clips), collections.Counter(c[3] for c in clips)
    if "" not in splits and not (splits["train"] and splits["eval"]):
        lacking = "eval" if splits["train"] else "train"
        raise ValueError(f"no clip has split '{lacking}': training and scoring need both")
    if "" not in folds and len(folds) < 2:
        raise ValueError(f"all clips are in fold {clips[0][3]}: two or more folds are needed")
    return task or ("multi-label" if many else "single-label")


def known(path, clips):
    """What an earlier run found of a shard's clips, as `work` says it; '' of each where there is no shard."""
    return read_json(path.with_suffix(".json"))["found"] if path.exists() else [""] * len(clips)


def unread(found):
    """The places of the clips that are still to be read."""
    return [n for n, what in enumerate(found) if isinstance(what, str)]


def make_shard(pool, path, clips, n_frames, seconds, strict):
    """Give the pool a shard's clips; -> a function that waits for them and puts shard and its notes in place. `strict`:
    ValueError for the first that cannot be read, and no shard."""
    temporary, found = path.with_name(f".{path.name}"), known(path, clips)
    rows = unread(found)
    if path.exists():
        shutil.copyfile(path, temporary)
    else:
        np.lib.format.open_memmap(temporary, "w+", np.float16, (len(clips), n_frames, N_MELS))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a bus error in a worker
            with open(temporary, "rb+") as f:
                os.posix_fallocate(f.fileno(), 0, temporary.stat().st_size)
    parts = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    jobs = [(temporary, part, [str(clips[n][1]) for n in part], n_frames, seconds) for part in parts]
    futures = [pool.submit(work, *job) for job in jobs]

    def finish(bar):
        for part, future in zip(parts, futures):
            for n, what in zip(part, future.result()):
                found[n] = what
                if strict and isinstance(what, str):
                    reason = f"{clips[n][1]} could not be read ({what}), and --strict stops there"
                    raise ValueError(f"{reason}: mend it or take it out, the same command goes on")
            bar.update(len(part))
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        path.unlink(missing_ok=True)  # notes never speak of another shard than the one beside them
        write_json(path.with_suffix(".json"), {"crc": crc32(temporary), "found": found})
        os.replace(temporary, path)  # last: a shard that exists is complete

    return finish


def prepare(out, source, classes, clips, task=None, seconds=10, workers=None, strict=False):
    """Write data/<name>/: shards from `workers` processes, then the tables. What is finished already is kept.

    The list of clips fixes every clip's row, so the bytes depend neither on the workers nor on an interruption. Raises
    ValueError if `out` holds another preparation or is in use, or if more than 5 % of the clips (`strict`: any) could not
    be read; what could is kept.
    """
    out, n_frames, workers = pathlib.Path(out), round(seconds * 100), workers or cores()
    missing, clips = [c for c in clips if c[1] is None], [c for c in clips if c[1] is not None]
    task = check_clips(source, clips, task)
    facts = {"version": VERSION, "source": source, "task": task, "sample_rate": SAMPLE_RATE, "n_mels": N_MELS}
    facts |= {"n_frames": n_frames, "shard": SHARD}
    digest = hashlib.sha256(repr([facts, classes]).encode())
    for clip in clips:
        digest.update(repr((clip[0], str(clip[1]), *clip[2:])).encode())
    facts["fingerprint"] = digest.hexdigest()[:16]
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    try:
        for name in ("stats.json", "unfinished.json"):
            if (out / name).exists() and read_json(out / name, VERSION).get("fingerprint") != facts["fingerprint"]:
                what = "another preparation (other clips or settings)"
                raise ValueError(f"{out} holds {what}: give another --out, or remove it")
        if (out / "stats.json").exists():
            remove_notes(out)
            return print(f"{out} is complete: nothing to do")
        write_json(out / "unfinished.json", facts)
        for old in out.glob(".fbank-*"):
            old.unlink()
        starts = range(0, len(clips), SHARD)
        shards = {out / f"fbank-{s:05d}.npy": clips[at : at + SHARD] for s, at in enumerate(starts)}
        todo = {path: n for path in shards if (n := len(unread(known(path, shards[path]))))}
        print(
            f"{source}: {len(clips)} clips of {seconds:g} s, {len(classes)} classes, {task}; {workers} workers -> {out}"
        )
        # fork, as torch's own DataLoader does on Linux: a worker starts at once, without importing torch again
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, begin_worker)
        waiting = collections.deque()
        with room(out), pool, tqdm(total=len(clips), initial=len(clips) - sum(todo.values()), unit="clip") as bar:
            try:
                for path in todo:
                    waiting.append(make_shard(pool, path, shards[path], n_frames, seconds, strict))
                    if len(waiting) > 1 + workers // 8:
                        waiting.popleft()(bar)
                while waiting:
                    waiting.popleft()(bar)
            except concurrent.futures.process.BrokenProcessPool as e:
                way_out = "run the same command again, with fewer --workers if memory was short"
                raise ValueError(f"a worker process was killed: {way_out}") from e
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        write_tables(out, facts, classes, shards, missing, strict)
    finally:
        unlock(out)


def remove_notes(out):
    """What a finished folder does not need; killed just before, the next run does it."""
    for path in (out / "unfinished.json", *out.glob("fbank-*.json")):
        path.unlink(missing_ok=True)


def write_tables(out, facts, classes, shards, missing, strict):
    """The last pass: skipped.csv, classes.csv, clips.csv and stats.json from the notes beside each shard."""

    def noted():  # read twice, so that memory holds one shard's notes
        for s, (path, clips) in enumerate(shards.items()):
            yield from zip(range(s * SHARD, (s + 1) * SHARD), clips, read_json(path.with_suffix(".json"))["found"])

    broken = [(clip, found) for _, clip, found in noted() if isinstance(found, str)]
    skipped = [[clip[0], clip[1], found] for clip, found in broken]
    absent = [[c[0], "", f"not there ({c[2]})"] for c in missing]  # of AudioSet, where that is normal
    write_csv(out / "skipped.csv", ["id", "path", "reason"], skipped + absent)
    first = f"the first: {skipped[0][1]}: {skipped[0][2]}" if skipped else ""
    n_clips = sum(map(len, shards.values()))
    if len(skipped) > (0 if strict else 0.05 * n_clips):
        raise ValueError(
            f"{len(skipped)} of {n_clips} clips could not be read, {first}; all are named in {out / 'skipped.csv'}. "
            "The rest is kept: mend the files, and the same command reads them again"
        )
    write_csv(out / "classes.csv", ["index", "mid", "display_name"], ([i, *c] for i, c in enumerate(classes)))
    kept = ((row, clip, found) for row, clip, found in noted() if not isinstance(found, str))
    columns = ["row", "id", "path", "split", "fold", "labels", "n_frames", "mean", "var"]
    write_csv(out / "clips.csv", columns, ([row, *c[:4], ";".join(map(str, c[4])), *found] for row, c, found in kept))
    facts |= {"clips": n_clips - len(skipped), "skipped": len(skipped)}
    facts["crc32"] = [read_json(path.with_suffix(".json"))["crc"] for path in shards]
    facts["tables"] = {name: crc32(out / name) for name in ("classes.csv", "clips.csv")}
    write_json(out / "stats.json", facts)
    remove_notes(out)
    if skipped:
        print(f"skipped {len(skipped)}, named with the reason in {out / 'skipped.csv'}; {first}")
    group = lambda c: f"fold {c[3]}" if c[3] != "" else c[2]
    counts = collections.Counter(group(c) for clips in shards.values() for c in clips)
    counts.subtract(group(c) for c, _ in broken)
    print(f"wrote {out}: " + ", ".join(f"{k} {v}" for k, v in counts.items()))


# --------------------------------------------------------------------------------------------------------- the reader


class FbankDataset(torch.utils.data.Dataset):
    """One split ('train', 'val' or 'eval') of a prepared folder; with `fold`, 'train' is the other folds, 'eval' that one.

    ds[i] -> (x (T, 128) float32 log-mel in nats, not normalised, zero after the clip's end; y (C,) float32 in {0, 1}).
    ds.fetch(indices) -> the same for a batch, float16 and with the clips' own frame counts: what training uses.
    Also: classes (names), task, n_frames, ids, mean and std (nats) of this split's own frames, has_val. AudioSet's 'train'
    is both its lists, 'train-balanced' the small one.
    Raises FileNotFoundError or ValueError for a folder that is not complete, or a split or fold that it does not have.
    """

    def __init__(self, root, split, fold=None):
        self.root, self.split, self.fold = pathlib.Path(root), split, fold
        if not (self.root / "stats.json").is_file():
            half = (self.root / "unfinished.json").exists()
            what = "is not complete (interrupted?)" if half else "is no prepared folder"
            raise FileNotFoundError(f"{self.root} {what}: run prep_data.py with --out {self.root}")
        self.stats, self.cache = read_stats(self.root), None
        self.source, self.task, self.n_frames = (self.stats[k] for k in ("source", "task", "n_frames"))
        self.classes = [r["display_name"] for r in read_table(self.root / "classes.csv", ["display_name"])]
        with open(self.root / "clips.csv", newline="", encoding="utf-8") as f:
            lines = csv.reader(f)
            next(lines)
            columns, folds, splits = [[] for _ in range(6)], set(), set()  # a tuple a clip would keep the GC busy
            for r in lines:
                folds.add(r[4])
                splits.add(r[3])
                if fold is None:  # 'train' is also train-balanced and train-unbalanced
                    chosen = r[3] == split or r[3].startswith(f"{split}-")
                else:
                    chosen = (r[4] == str(fold)) == (split == "eval")
                if chosen:
                    for column, value in zip(columns, (int(r[0]), r[1], r[5], int(r[6]), float(r[7]), float(r[8]))):
                        column.append(value)
        rows, ids, labels, frames, mean, var = columns
        folds, splits = sorted(folds - {""}, key=int), sorted(splits - {""})
        if fold is None and not splits:
            raise ValueError(f"{self.root} has folds, not splits: give --fold, one of {', '.join(folds)}")
        if fold is not None and str(fold) not in folds:
            has = f"folds {', '.join(folds)}" if folds else "splits, not folds"
            raise ValueError(f"{self.root} has no fold {fold}: it has {has}")
        if not rows or (fold is not None and split not in ("train", "eval")):
            have = splits if fold is None else ["train", "eval"]
            raise ValueError(f"{self.root} has no split '{split}': it has {', '.join(have)}")
        self.has_val, self.ids = fold is None and "val" in splits, tuple(ids)
        self.rows, self.frames = (np.array(rows), np.array(frames))  # (n,): place in the shards, own frame count
        mean, var, share = np.array(mean), np.array(var), self.frames / self.frames.sum()
        self.mean = float(share @ mean)
        self.std = float(np.sqrt(share @ (var + mean**2) - self.mean**2))
        most = 1 + max(own.count(";") for own in labels)
        self.labels = np.full((len(rows), most), -1, np.int64)  # (n, most labels of a clip), filled with -1
        for i, own in enumerate(labels):
            if own:
                self.labels[i, : own.count(";") + 1] = [int(k) for k in own.split(";")]
        n_shards = len(self.stats["crc32"])
        missing = [f"fbank-{s:05d}.npy" for s in range(n_shards) if not (self.root / f"fbank-{s:05d}.npy").is_file()]
        if missing:
            raise FileNotFoundError(f"{self.root} is not complete: {missing[0]} is missing; prepare it again")
        self.shards = [self._open(s) for s in range(n_shards)]

    def _open(self, s):
        path = self.root / f"fbank-{s:05d}.npy"
        try:
            shard = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as e:
            raise ValueError(f"{path} is damaged: remove {self.root} and prepare it again") from e
        if shard.dtype != np.float16 or shard.shape[1:] != (self.n_frames, N_MELS):
            raise ValueError(f"{path} holds {shard.dtype} {shard.shape}, not float16 clips of {self.n_frames} frames")
        return shard

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        x, _, y = self.fetch([i])
        return x[0].float(), targets(y, len(self.classes), self.task)[0]

    def fetch(self, indices):
        """Clips by index -> x (B, T, 128) float16, n (B,) own frames, labels (B, L) class indices filled up with -1."""
        indices = np.asarray(indices)
        rows = self.rows[indices]
        if self.cache is not None:
            where = torch.from_numpy(indices)
            if self.cache.is_cuda:
                where = where.pin_memory().to(self.cache.device, non_blocking=True)
            x = self.cache[where]
        else:
            x = torch.empty(len(rows), self.n_frames, N_MELS, dtype=torch.float16)
            shard, place = rows // self.stats["shard"], rows % self.stats["shard"]
            for s in np.unique(shard):
                here = shard == s
                x.numpy()[here] = self.shards[s][place[here]]
        return x, torch.from_numpy(self.frames[indices]), torch.from_numpy(self.labels[indices])

    def keep_on(self, device):
        """Copy the split to a device's memory, 512 clips at a time: from then on `fetch` indexes it there."""
        cache = torch.empty(len(self), self.n_frames, N_MELS, dtype=torch.float16, device=device)
        for i in tqdm(range(0, len(self), SHARD), desc=f"clips to {device}", unit="shard", leave=False):
            cache[i : i + SHARD] = self.fetch(range(i, min(i + SHARD, len(self))))[0]
        self.cache = cache

    def weights(self):
        """Class-balanced sampling weights (n,): sum over a clip's labels of 1 / (count + 0.01), Section 3.2 and PSLA.
        Clips without a label count as one more class, or they would never be drawn."""
        labels = np.where(self.labels[:, :1] + np.arange(self.labels.shape[1]) == -1, len(self.classes), self.labels)
        share = np.append(1 / (np.bincount(labels[labels >= 0], minlength=len(self.classes) + 1) + 0.01), 0.0)
        return share[labels].sum(1)  # -1 reads the last entry: 0


def targets(labels, n_classes, task, smoothing=0.0):
    """Label indices (B, L), filled with -1 -> soft targets (B, C). Smoothing e: multi-label e/C and 1 - e; single-label
    e/C and 1 - e + e/C, which sums to 1 (UAVM; the paper smooths before mixing)."""
    hot = torch.zeros(len(labels), n_classes + 1, device=labels.device).scatter_(1, labels % (n_classes + 1), 1.0)[
        :, :-1
    ]
    if not smoothing:
        return hot
    off = smoothing / n_classes
    return off + hot * (1 - smoothing - (off if task == "multi-label" else 0))


# --------------------------------------------------------------------------------------------------- the augmentations


def mix(a, b, lam, n_a, n_b):
    """Mixup of sounds, on their log-mel (Section 3.2): a, b (B, T, F) in nats; lam, n_a, n_b (B,) -> (B, T, F).

    log-mel is the log of power, so lam * a + (1 - lam) * b of waveforms is, up to the cross term of two unrelated sounds,
    logaddexp(a + 2 ln lam, b + 2 ln(1 - lam)). Past b's n_b frames it is silent: a + 2 ln lam; past a's n_a frames the
    result is padding, 0. Never below Kaldi's floor. lam = 1 is no mixup in the same arithmetic.
    """
    t = torch.arange(a.shape[1], device=a.device)
    lam, n_a, n_b = (v.view(-1, 1, 1) for v in (lam, n_a, n_b))
    t = t.view(1, -1, 1)
    weak = (b + 2 * torch.log1p(-lam)).masked_fill(t >= n_b, -torch.inf)
    return torch.logaddexp(a + 2 * lam.log(), weak).clamp(min=FLOOR).masked_fill(t >= n_a, 0.0)


def draw(rng, size, n_clips, mixup=0.5, freq_mask=48, time_mask=192, n_frames=1000):
    """Everything random about one global batch but its clips, drawn on the host: {name: (size,) array}.

    partner: uniform over the n_clips training clips, with probability `mixup`; otherwise lam is 1. lam ~ Beta(10, 10).
    f0, f1, t0, t1: masked bins [f0, f1) and frames [t0, t1), widths uniform in [0, freq_mask) and [0, time_mask).
    shift: frames, uniform in [-10, 10]. noise: the clip's amplitude u / 10, u ~ U(0, 1).
    """
    f, t = (np.floor(rng.random(size) * w).astype(np.int64) for w in (freq_mask, time_mask))
    f0, t0 = (
        np.floor(rng.random(size) * (N_MELS - f)).astype(np.int64),
        np.floor(rng.random(size) * (n_frames - t)).astype(np.int64),
    )
    return {
        "partner": rng.integers(n_clips, size=size),
        "lam": np.where(rng.random(size) < mixup, rng.beta(10, 10, size), 1.0).astype(np.float32),
        "f0": f0,
        "f1": f0 + f,
        "t0": t0,
        "t1": t0 + t,
        "shift": rng.integers(-10, 11, size),
        "noise": rng.random(size, dtype=np.float32) / 10,
    }


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


def read_stats(root):
    """stats.json of a prepared folder; ValueError for one of another version, or if a table was changed since."""
    stats = read_json(root / "stats.json", VERSION)
    for name, crc in stats.get("tables", {}).items():
        if not (root / name).is_file() or crc32(root / name) != crc:
            keep = "to keep an edit, take 'tables' and 'checksum' out of stats.json"
            raise ValueError(f"{root / name} is damaged or was edited: remove {root} and prepare it again ({keep})")
    return stats


def check(out):
    """Verify a prepared folder: every byte of its shards, every row of its table. ValueError says what to do."""
    again = f"remove {out} and prepare it again"
    if not (out / "stats.json").is_file():
        raise FileNotFoundError(f"{out} is not complete: run prep_data.py with --out {out}")
    stats = read_stats(out)
    rows = read_table(out / "clips.csv", ["row", "id", "path", "split", "fold", "labels", "n_frames", "mean", "var"])
    n_classes = len(read_table(out / "classes.csv", ["index", "mid", "display_name"]))
    of_shard = collections.defaultdict(list)
    for r in rows:
        of_shard[int(r["row"]) // SHARD].append(r)
    for s, crc in enumerate(tqdm(stats["crc32"], unit="shard")):
        path = out / f"fbank-{s:05d}.npy"
        if not path.is_file() or crc32(path) != crc:
            raise ValueError(f"{path} is {'damaged' if path.is_file() else 'missing'}: {again}")
        shard = np.load(path, mmap_mode="r")
        if shard.dtype != np.float16 or shard.shape[1:] != (stats["n_frames"], N_MELS) or not np.isfinite(shard).all():
            raise ValueError(f"{path} does not hold finite float16 (clips, {stats['n_frames']}, {N_MELS}): {again}")
        for r in of_shard.pop(s, []):
            place, n, labels = int(r["row"]) % SHARD, int(r["n_frames"]), r["labels"].split(";") if r["labels"] else []
            if place >= len(shard) or not 0 < n <= stats["n_frames"] or shard[place, n:].any():
                raise ValueError(
                    f"{out / 'clips.csv'}: clip '{r['id']}' does not match its row {r['row']} of {path.name}: {again}"
                )
            if (
                any(not 0 <= int(k) < n_classes for k in labels)
                or abs(shard[place, :n].mean(dtype=float) - float(r["mean"])) > 1e-6
            ):
                raise ValueError(f"{out / 'clips.csv'}: clip '{r['id']}' has wrong labels or a wrong mean: {again}")
    if of_shard:
        raise ValueError(
            f"{out / 'clips.csv'} names rows of fbank-{min(of_shard):05d}.npy, which is not there: {again}"
        )
    print(f"{out} is sound: {len(rows)} clips, {len(stats['crc32'])} shards, {n_classes} classes, {stats['task']}")


def crc32(path):
    with open(path, "rb") as f:
        return functools.reduce(lambda c, block: zlib.crc32(block, c), iter(lambda: f.read(1 << 22), b""), 0)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dataset", nargs="?", choices=DATASETS)
    p.add_argument(
        "--root",
        type=pathlib.Path,
        help="the raw data (default: esc10, esc50, fsd50k are downloaded next to --out); csv: a table or class folders",
    )
    p.add_argument("--out", type=pathlib.Path, help="the prepared folder (default: data/DATASET)")
    p.add_argument("--workers", type=int, help="processes (default: one for each core it may use)")
    p.add_argument(
        "--clip-seconds", type=float, help="kept of each clip, shorter ones are padded (default: 10; ESC: 5; demo: 2)"
    )
    p.add_argument(
        "--task",
        choices=["multi-label", "single-label"],
        help="csv: default multi-label if any clip has several labels",
    )
    p.add_argument(
        "--strict", action="store_true", help="an unreadable clip is an error (default: more than 5 percent are)"
    )
    p.add_argument("--check", type=pathlib.Path, metavar="DIR", help="verify a prepared folder, prepare nothing")
    a = p.parse_args()
    if (a.dataset is None) == (a.check is None):
        p.error(f"name a dataset ({', '.join(DATASETS)}), or --check DIR")
    if a.check:
        return check(a.check)
    seconds, from_table = DATASETS[a.dataset]
    seconds, out = a.clip_seconds if a.clip_seconds is not None else seconds, a.out or pathlib.Path("data") / a.dataset
    if a.workers is not None and a.workers < 1:
        raise ValueError(f"--workers {a.workers}: give 1 or more")
    if not 0.16 <= seconds <= 3600:
        raise ValueError(f"--clip-seconds {seconds:g} is out of range [0.16, 3600]")
    root, source = a.root, "esc50" if a.dataset == "esc10" else a.dataset  # ESC-10 is a part of ESC-50
    if root is None and a.dataset == "demo":
        root = out.with_name(out.name + "-audio")
    elif root is None and source in DOWNLOADS:
        root = download(source, out.with_name(f"{source}-audio"), seconds)
    elif root is None:
        raise ValueError(f"{a.dataset} needs --root, a copy of the data on disk ({ROOTS[a.dataset]})")
    elif a.dataset != "demo" and not root.exists():
        raise FileNotFoundError(f"--root {root} does not exist")
    classes, clips = from_table(root.absolute())
    task = a.task or {"csv": None, "esc10": "single-label", "esc50": "single-label"}.get(a.dataset, "multi-label")
    prepare(out, a.dataset, classes, clips, task, seconds, a.workers, a.strict)


def terminated(*_):
    os.write(2, b"stopped by SIGTERM; the same command goes on where it was\n")
    os._exit(143)  # a file is whole or absent at any moment, and the workers end with their parent


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C; the same command goes on where it was")
