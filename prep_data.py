"""Audio -> data/<name>/: a cache of log-mel spectrograms and its tables (Section 3.1).

    python prep_data.py demo                                             # synthetic, no download, seconds
    python prep_data.py esc50                                            # downloads it; esc10: its ESC-10 part
    python prep_data.py fsd50k [--root /path/with/FSD50K.dev_audio]      # downloads it, or reads a copy that you have
    python prep_data.py audioset --root /data/AudioSet                   # its lists and audio files, or tars of them
    python prep_data.py csv --root clips.csv --out data/machines         # your own: path,labels[,split][,fold]

The table of `csv` has one clip a row: `path` (absolute, or relative to the table), `labels` joined by ';', and if you
have them `split` (train, val, eval) and `fold` (a number). Any rate, any channels. Interrupted, the same command resumes.
"""

import argparse
import collections
import concurrent.futures
import csv
import functools
import hashlib
import http.client
import io
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import ssl
import sys
import tarfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request

import joblib  # comes with scikit-learn
import numpy as np
import soundfile
import stream_unzip
import torch
import torchaudio
from torchaudio.compliance import kaldi
from tqdm import tqdm

import dataset
from dataset import N_MELS, SAMPLE_RATE, SHARD, VERSION, atomic_write, crc32, read_json, write_csv, write_json

CHUNK = 16  # clips that a worker takes at a time
UNREADABLE = ".m4a", ".mp4", ".webm", ".aac", ".wma", ".amr"  # by soundfile: these are listed in skipped.csv
AUDIO = ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", *UNREADABLE
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "eval": "eval", "test": "eval", "": ""}
SPLITS |= {"training": "train", "testing": "eval", "evaluation": "eval"}
TIMEOUT, WAITS = 60, (1, 2, 4, 8, 16)  # s: of a silent connection, and before the next attempt while nothing new comes
AGAIN = "run the same command again, it resumes the download, or give --root a copy of the data"
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
# place, top folder of the archives, GB of archives, GB of disk in all (computed or estimated, not measured),
# {archive: {ending of a part: MD5}}; GitHub makes its archive anew
DOWNLOADS = {
    "esc50": ("https://github.com/karolpiczak/ESC-50/archive/", "ESC-50-master", 0.6, 1.5, {"master": {"zip": None}}),
    "fsd50k": ("https://zenodo.org/records/4060432/files/", None, 24.7, 47.5, {
        "FSD50K.ground_truth": {"zip": "ca27382c195e37d2269c4c866dd73485"},
        "FSD50K.dev_audio": {
            "z01": "faa7cf4cc076fc34a44a479a5ed862a3", "z02": "8f9b66153e68571164fb1315d00bc7bc",
            "z03": "1196ef47d267a993d30fa98af54b7159", "z04": "d088ac4e11ba53daf9f7574c11cccac9",
            "z05": "81356521aa159accd3c35de22da28c7f", "zip": "c480d119b8f7a7e32fdb58f3ea4d6c5a",
        },
        "FSD50K.eval_audio": {"z01": "3090670eaeecc013ca1ff84fe4442aeb", "zip": "6fa47636c3a3ad5c7dfeba99f2637982"},
    }),
}  # fmt: skip
DEMO_CLASSES = [
    "am_tone", "bell", "chirp_down", "chirp_up", "clicks", "fm_tone", "harmonic_stack", "noise_band", "noise_burst", "tone",
]  # fmt: skip
# path: None if listed, but not found; fold: '' if none; labels: class indices; member: in a tar, (its path, first byte, bytes)
Clip = collections.namedtuple("Clip", "id path split fold labels member", defaults=[None])


# ------------------------------------------------------------------------------------------------------------ features


def sparse_product(matrix, width=32):
    """x -> x @ matrix, for a mostly zero matrix: of each `width` columns, the zero rows above and below are left out."""
    bands = []
    for block in matrix.split(width, 1):
        used = block.any(1).nonzero()
        bands.append((used[0].item(), block[used[0] : used[-1] + 1].contiguous()))
    return lambda x: torch.cat([x[:, row : row + len(block)] @ block for row, block in bands], 1)


@functools.cache
def mel_product():
    """power (frames, 256) -> mel power (frames, 128)"""
    return sparse_product(kaldi.get_mel_banks(N_MELS, 512, float(SAMPLE_RATE), 20.0, 0.0, 100.0, -500.0, 1.0)[0].T)


def usable_rate(rate):
    """The rate, or, where it shares no useful divisor with 16000 (a filter of gigabytes), the nearest multiple of 25 Hz."""
    odd = rate * SAMPLE_RATE / math.gcd(rate, SAMPLE_RATE) ** 2 > 2e7
    return max(25, round(rate / 25) * 25) if odd else rate


@functools.cache
def resampler(rate):
    """(samples,) at `rate` Hz -> at 16 kHz: torchaudio's Resample, its filter made once and, where it is long, without
    most of its zeros (from 44.1 kHz two times faster, to the same bits)."""
    rate = usable_rate(rate)
    whole = torchaudio.transforms.Resample(rate, SAMPLE_RATE)
    old, new = rate // whole.gcd, SAMPLE_RATE // whole.gcd
    if new < 32:
        return whole
    width, phases = whole.width, sparse_product(whole.kernel[:, 0].T)  # old + 2 width samples -> new

    def resample(x):
        blocks = torch.nn.functional.pad(x, (width, width + old)).unfold(0, old + 2 * width, old)
        return phases(blocks).flatten()[: math.ceil(new * len(x) / old)]

    return resample


def fbank(waveform, sample_rate=SAMPLE_RATE):
    """Kaldi log-mel filterbank (Section 2.1): (samples,) floats in [-1, 1] -> (frames, 128), natural log (nats).

    25 ms Hanning window every 10 ms, snip edges, DC removed in each frame, preemphasis 0.97, power, 20 Hz low cut: equals
    torchaudio.compliance.kaldi.fbank(htk_compat=True, window_type='hanning', num_mel_bins=128, dither=0) at 16 kHz, with
    tables that are made once. Fewer than 400 samples at 16 kHz give 0 frames.
    """
    x = resampler(sample_rate)(torch.as_tensor(waveform, dtype=torch.float32))
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
        mels.append(mel_product()(power).clamp_(min=torch.finfo(torch.float32).eps).log_())
    return torch.cat(mels)


def open_audio(path, member=None):
    """An audio file, or a tar archive's (its path, first byte, bytes), as an open soundfile.SoundFile."""
    if member:
        with open(member[0], "rb") as f:
            f.seek(member[1])
            path = io.BytesIO(f.read(member[2]))
    elif not os.path.isfile(path):
        raise FileNotFoundError("no such file")
    if str(path).lower().endswith(".raw"):
        raise ValueError("audio without a header: convert it to WAV")
    f = soundfile.SoundFile(path)
    f.seekable = functools.partial(bool, f.seekable() and f.frames < 2**62)  # a FLAC out of a pipe has no known end
    if not 1000 <= f.samplerate <= 768000:
        raise ValueError(f"a sample rate of {f.samplerate} Hz")
    return f


def read_mono(f, n):
    """The next n samples of an open file, or what is left of it: (n,) float32, channels averaged."""
    kind = "int16" if f.subtype == "PCM_16" else "float32"  # torch converts faster, to the same bits
    x = f.read(n, dtype=kind)
    if kind == "float32" and not (np.abs(x) < 1e15).all():  # its power would not fit into float32
        raise ValueError("samples that are not finite, or of an absurd size")
    x = torch.from_numpy(x) if kind == "float32" else torch.from_numpy(x).float() / 32768
    return x if x.ndim == 1 else sum(x.unbind(1)) / x.shape[1]  # for two channels twice as fast as mean(1)


def load_audio(path, seconds, member=None):
    """The first `seconds` of an audio file as (samples,) float32 at 16 kHz: channels averaged, then resampled.

    Raises soundfile.LibsndfileError for what it cannot decode, FileNotFoundError, ValueError for no or non-finite samples.
    """
    with open_audio(path, member) as f:
        x = read_mono(f, math.ceil((seconds + 0.1) * f.samplerate))  # with a margin for the filter
    if not len(x):
        raise ValueError("no samples")
    return resampler(f.samplerate)(x)[: round(seconds * SAMPLE_RATE)]


# ------------------------------------------------------------------------------------------------------------ datasets
# Each returns (classes [(mid, name)], clips [Clip]): what is there, before any is read.


def read_rows(path, **dialect):
    """Yield (line number, cells) of a table in UTF-8; between its cells ',' or, as Excel has it in many countries, ';'."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is --root right?")
    with open(path, newline="", encoding="utf-8-sig") as f:
        try:
            delimiter = max(",;\t", key=f.readline().count)
            f.seek(0)
            lines = csv.reader(f, delimiter=delimiter, strict=True, **dialect)
            yield from ((lines.line_num, row) for row in lines if any(row))
        except (UnicodeDecodeError, csv.Error) as e:
            raise ValueError(f"{path} is not a table in UTF-8 ({e}): close its quotes, save it as 'CSV UTF-8'") from e


def read_table(path, columns):
    """Yield {column: cell, 'line': its number} of a table that has these columns."""
    rows = read_rows(path)
    names = [name.strip().lower() for name in next(rows, (1, []))[1]]  # Fold is fold
    for column in (*columns, "split", "fold"):
        if (n := names.count(column)) > 1 or not n and column in columns:
            raise ValueError(f"{path} has {n or 'no'} column '{column}': its first line must name {', '.join(columns)}")
    for line, row in rows:
        if len(row) != len(names):
            raise ValueError(f"{path} line {line} does not have the {len(names)} cells of the first line")
        yield dict(zip(names, row)) | {"line": line}


def esc(root, ten):
    """ESC-50's official layout; ESC-10 is the rows whose esc10 column is True (Excel: TRUE)."""
    columns, audio = ["filename", "fold", "target", "category", "esc10"], root / "audio"
    rows = [r for r in read_table(root / "meta" / "esc50.csv", columns) if not ten or r["esc10"].lower() == "true"]
    targets = {r["category"]: int(r["target"]) for r in rows}
    index = {name: i for i, name in enumerate(sorted(targets, key=targets.get))}
    clips = [Clip(r["filename"], str(audio / r["filename"]), "", int(r["fold"]), [index[r["category"]]]) for r in rows]
    return [("", name) for name in index], clips


def fsd50k(root):
    """FSD50K's official layout and its official split of the dev part into train and val."""
    truth, clips = root / "FSD50K.ground_truth", []
    classes = [(mid, name) for _, (_, name, mid) in read_rows(truth / "vocabulary.csv") if mid != "mid"]
    index = {mid: i for i, (mid, _) in enumerate(classes)}
    for part in ("dev", "eval"):
        for r in read_table(truth / f"{part}.csv", ["fname", "labels", "mids"]):
            labels = [index.get(mid) for mid in r["mids"].split(",")]
            if None in labels:
                raise ValueError(f"{truth / part}.csv line {r['line']}: '{r['mids']}' is not all in vocabulary.csv")
            path = str(root / f"FSD50K.{part}_audio" / f"{r['fname']}.wav")
            clips.append(Clip(r["fname"], path, r.get("split", "eval"), "", sorted(labels)))
    return classes, clips


def audioset(root):
    """AudioSet's official lists and class_labels_indices.csv in root, the audio anywhere below it, by id: files, or members
    of (WebDataset) tar archives.

    Names of files: ID, YID, ID_30.000, ID_30000_40000, ID_30.0-40.0, any ending. Splits train-balanced, train-unbalanced
    (together 'train') and eval. Missing videos are normal: they have no path here and a line in skipped.csv.
    """
    names = root / "class_labels_indices.csv"
    classes = [(r["mid"], r["display_name"]) for r in read_table(names, ["mid", "display_name"])]
    index, clips = {mid: i for i, (mid, _) in enumerate(classes)}, {}  # clips by id
    lists = {"train-balanced": "balanced_train", "train-unbalanced": "unbalanced_train", "eval": "eval"}
    for split, path in ((split, root / f"{name}_segments.csv") for split, name in lists.items()):
        if split == "train-unbalanced" and not path.is_file():
            print(f"{path.name} is not there: preparing the balanced part only")
            continue
        for line, row in read_rows(path, skipinitialspace=True):
            if not row[0].startswith("#"):
                labels = [index.get(mid) for mid in row[3].split(",")] if len(row) == 4 else [None]
                if None in labels:
                    raise ValueError(f"{path} line {line}: not 'id, start, end, \"classes of {names.name}\"'")
                if row[0] in clips:
                    raise ValueError(f"{path} line {line}: '{row[0]}' is listed already")
                clips[row[0]] = Clip(row[0], None, split, "", sorted(labels))
    for path, member in tqdm(audio_below(root), desc=f"listing {root}", unit="file"):
        stem = os.path.splitext(os.path.basename(path))[0]
        stems = [stem, re.sub(r"_[\d.]+$", "", stem), re.sub(r"_[\d.]+[_-][\d.]+$", "", stem)]
        clip = next((clips[k] for n in stems for k in (n, n.removeprefix("Y")) if k in clips), None)
        order = lambda p: (p.lower().endswith(UNREADABLE), p)
        if clip and (clip.path is None or order(path) < order(clip.path)):  # of several copies the first in order
            clips[clip.id] = clip._replace(path=path, member=member)
    listed, found = (collections.Counter(c.split for c in clips.values() if c.path or every) for every in (True, False))
    print("; ".join(f"{split}: {found[split]:,} of {n:,} listed clips found" for split, n in listed.items()))
    return classes, list(clips.values())


def files_below(folder, endings=AUDIO):
    """Yield the path of every file with one of these endings, at any depth below a folder and its links; no hidden ones."""
    real = lambda *path: os.path.join(os.path.realpath(os.path.join(*path)), "")
    for at, folders, names in os.walk(folder, followlinks=True):  # a link to a folder that holds it has no end
        folders[:] = [n for n in folders if not n.startswith(".") and not real(at).startswith(real(at, n))]
        yield from (os.path.join(at, n) for n in names if n.lower().endswith(endings) and not n.startswith("."))


def audio_below(root):
    """Yield (path, None) of each audio file below root, (tar/name, (tar, first byte, bytes)) of each in a tar archive there."""
    for path in files_below(root, (*AUDIO, ".tar")):
        yield from tar_members(path) if path.lower().endswith(".tar") else [(path, None)]


def tar_members(path):
    """Yield (tar/name, (tar, first byte, bytes)) of each audio file in a tar archive, from its headers. Of one that was
    cut short the whole files are used, and that is printed."""
    count, size = 0, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            while info := tar.next():
                if info.issparse():
                    raise ValueError(f"{path} holds {info.name} without its zeros: pack it without --sparse")
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if info.isreg() and info.name.lower().endswith(AUDIO):
                    count += 1
                    yield f"{path}/{info.name}", (path, info.offset_data, info.size)
                tar.members.clear()  # or it keeps them all
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("a damaged header, or no end mark")
    except tarfile.TarError as e:
        print(f"{path} is damaged ({e}): only its first {count} audio files are used; download it again")


def one_form(name):
    """A class name as every system writes it, in one line: macOS may give an accent as a letter of its own"""
    return unicodedata.normalize("NFC", name.strip().replace("\r", " "))


def class_folders(root):
    """A folder of class-named folders, audio at any depth below them; above them may stand train, val and eval folders."""
    paths = sorted(pathlib.Path(p).relative_to(root) for p in files_below(root))  # [split/]class/.../file
    tops = {p.parts[0] for p in paths if len(p.parts) > 1}
    splits = {top for top in tops if top.lower() in SPLITS}
    if splits and splits != tops:
        raise ValueError(f"{root} holds folders of splits ({min(splits)}) beside others: give a table")
    at = 1 if splits else 0  # the place of the class in a path
    found = [(SPLITS.get(p.parts[0].lower(), ""), one_form(p.parts[at]), p) for p in paths if len(p.parts) > at + 1]
    index = {name: i for i, name in enumerate(sorted({name for _, name, _ in found}))}
    clips = [Clip(p.as_posix(), str(root / p), split, "", [index[name]]) for split, name, p in found]
    if len(index) < 2 or all(re.fullmatch(r"fold[ _-]?\d+", name, re.IGNORECASE) for name in index):
        raise ValueError(f"{root} holds no class folders with audio: give {root}/CLASS/*.wav, or a table")
    if left := sum(1 for _ in files_below(root, ("",))) - len(clips):
        print(f"{left} files of {root} are left out: in no class folder, or without the ending of an audio format")
    return [("", name) for name in index], clips if splits else make_split(clips, root)


def own_table(table):
    """Anybody's table: path,labels[,split][,fold]; a missing split is made, stratified 80/10/10, and printed."""
    rows = list(read_table(table, ["path", "labels"]))
    labels = [sorted({one_form(v) for v in r["labels"].split(";") if v.strip()}) for r in rows]
    index = {name: i for i, name in enumerate(sorted({v for own in labels for v in own}))}
    if not index:
        raise ValueError(f"{table} has no {'labels' if rows else 'rows'}")
    clips = []
    for r, own in zip(rows, labels):
        if not r["path"].strip():
            raise ValueError(f"{table} line {r['line']} has no path")
        split, fold = (r.get(column, "").strip().lower() for column in ("split", "fold"))
        fold = fold.removesuffix(".0")  # pandas
        if split not in SPLITS:
            raise ValueError(f"{table} line {r['line']}: unknown split '{split}': use train, val or eval")
        if not (fold or "0").isdecimal():
            raise ValueError(f"{table} line {r['line']}: fold '{fold}' is not a whole number")
        at, own = str(table.parent / r["path"]), [index[v] for v in own]
        clips.append(Clip(r["path"], at, SPLITS[split], int(fold) if fold else "", own))
    for column in ("split", "fold"):
        empty = [r["line"] for r, c in zip(rows, clips) if getattr(c, column) == ""]
        if 0 < len(empty) < len(clips):
            raise ValueError(f"{table} line {empty[0]}: no {column}, though other lines have one")
    given = (clips[0].split, clips[0].fold) != ("", "")
    return [("", name) for name in index], clips if given else make_split(clips, table)


def make_split(clips, source, seed=0):
    """80/10/10 by iterative stratification (Sechidis et al., 2011): rare classes first, a clip to the split that lacks it."""
    print(f"{source} has neither split nor fold: made a stratified 80/10/10 split from seed {seed}, see clips.csv")
    shares, members = {"train": 0.8, "val": 0.1, "eval": 0.1}, collections.defaultdict(list)
    labels = [c.labels or [math.inf] for c in clips]  # no label is a class of its own here
    for i in np.random.default_rng(seed).permutation(len(clips)).tolist():
        for k in labels[i]:
            members[k].append(i)
    splits, lacking = [None] * len(clips), {name: share * len(clips) for name, share in shares.items()}
    want = {k: {name: share * len(m) for name, share in shares.items()} for k, m in members.items()}
    for k in sorted(members, key=lambda k: (len(members[k]), k)):
        for i in (i for i in members[k] if splits[i] is None):
            splits[i] = max(lacking, key=lambda split: (want[k][split], lacking[split]))
            lacking[splits[i]] -= 1
            for own in labels[i]:
                want[own][splits[i]] -= 1
    return [c._replace(split=split) for c, split in zip(clips, splits)]


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
    return x if kind == "noise_band" else x * (np.sin(2 * np.pi * rng.uniform(4, 10) * t) > 0.3)


def demo(root):
    """Write the demo's audio and its table to root: clips of 1 s, 1 to 3 of ten synthetic sounds over a noise floor."""
    (root / "audio").mkdir(parents=True, exist_ok=True)
    rows, n = [], SAMPLE_RATE
    for s, (split, count) in enumerate((("train", 240), ("val", 60), ("eval", 120))):
        for i in range(count):
            rng = np.random.default_rng([2022, s, i])
            x = rng.standard_normal(n) * 10 ** rng.uniform(-2.8, -2.0)
            kinds = sorted(rng.choice(len(DEMO_CLASSES), rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]), replace=False))
            for k in kinds:
                length = int(rng.uniform(0.4, 0.9) * SAMPLE_RATE)
                at = rng.integers(n - length)
                fade = np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / 160)
                x[at : at + length] += demo_sound(rng, DEMO_CLASSES[k], length) * fade * 10 ** rng.uniform(-1.1, -0.5)
            name = f"audio/{split}-{i:03d}.wav"
            wav = io.BytesIO()  # soundfile's error of a full disk is no OSError
            soundfile.write(wav, x / max(1, np.abs(x).max()), SAMPLE_RATE, subtype="PCM_16", format="WAV")
            (root / name).write_bytes(wav.getvalue())
            rows.append([name, ";".join(DEMO_CLASSES[k] for k in kinds), split])
    write_csv(root / "clips.csv", ["path", "labels", "split"], rows)
    return own_table(root / "clips.csv")


DATASETS = {  # facts: seconds kept of a clip, task, how to list the clips
    "demo": (1, "multi-label", demo),
    "esc10": (5, "single-label", functools.partial(esc, ten=True)),
    "esc50": (5, "single-label", functools.partial(esc, ten=False)),
    "fsd50k": (10, "multi-label", fsd50k),
    "audioset": (10, "multi-label", audioset),
    "csv": (10, None, lambda root: class_folders(root) if root.is_dir() else own_table(root)),
}


# ----------------------------------------------------------------------------------------------------------- downloads


def download_file(url, path, md5):
    """Download url to path through path.part, resuming it: a file named path is whole and has this MD5, if there is one.

    Raises ValueError for another MD5 (the file is removed), ConnectionError if the server or the network does not give it.
    """
    part, failures = path.with_name(f"{path.name}.part"), 0
    while not path.exists():
        part.touch()
        have = part.stat().st_size
        headers = {"Range": f"bytes={have}-", "User-Agent": "cmkd-prep-data"}  # Zenodo denies Python's own name
        try:
            reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
            with reply, open(part, "ab" if reply.status == 206 else "wb") as f:  # 200: all of it comes
                start, total = f.tell(), f.tell() + int(reply.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(f, "write", desc=path.name, initial=start, total=total or None) as out:
                    shutil.copyfileobj(reply, out)
                if f.tell() < total:
                    raise ConnectionError(f"cut after {f.tell()} of {total} bytes")
        except NETWORK as e:
            code, reason = getattr(e, "code", 500), str(e) or type(e).__name__
            if code != 416:  # 416: nothing is left to send
                failures = 0 if part.stat().st_size > have else failures
                if (code < 500 and code != 429) or failures == len(WAITS):
                    raise ConnectionError(f"{url} could not be downloaded ({reason}): {AGAIN}") from e
                print(f"{path.name}: {reason}; trying again in {WAITS[failures]} s")
                time.sleep(WAITS[failures])
                failures += 1
                continue
        with open(part, "rb") as f:
            found = hashlib.file_digest(f, "md5").hexdigest()
        if md5 not in (None, found):
            part.unlink()
            raise ValueError(f"{url} came with MD5 {found}, not {md5}, and was removed: {AGAIN}")
        os.replace(part, path)


def unpack(parts, root, top):
    """Unpack a zip archive (a split one is z01, z02, ..., zip) below root without its folder `top`: each file is whole or
    absent, a link is a plain file. ValueError for a damaged archive, or for a member that would leave root."""
    temporary = root / ".unpacking"

    def joined():
        for path in parts:
            with open(path, "rb") as f:
                if path == parts[0] and f.read(4) not in (b"PK\7\10", b"PK00"):  # a split archive begins with a mark
                    f.seek(0)
                yield from iter(lambda: f.read(1 << 20), b"")

    try:
        with tqdm(desc=f"unpacking {parts[-1].name}", unit="B", unit_scale=True) as bar:
            for name, _, blocks in stream_unzip.stream_unzip(joined()):  # which zipfile cannot where it is split
                name = name.decode("utf-8", "replace")
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
    except stream_unzip.UnzipError as e:
        reason = str(e) or type(e).__name__
        raise ValueError(f"{parts[-1]} is damaged ({reason}): remove all its parts, run the same command again") from e
    temporary.unlink(missing_ok=True)


def download(source, root):
    """Download a data set from its official place, unpack it into root and remove the archives; what is done is kept.

    NAME.part is a part of an archive, NAME a whole and verified one; ARCHIVE.unpacked marks that it is done.
    """
    url, top, gb, gb_in_all, archives = DOWNLOADS[source]
    if not any(root.iterdir()):
        free = shutil.disk_usage(root).free / 1e9
        need = f"{gb_in_all} GB of disk in {root}, which has {free:.1f} GB free"
        print(f"{source}: {gb} GB to download from {url}; unpacked and prepared it needs {need}")
        if free < gb_in_all:
            raise OSError(f"{source} needs {need}: free some, or give --out on a larger disk")
    for archive, sums in archives.items():
        parts, mark = [root / f"{archive}.{ending}" for ending in sums], root / f"{archive}.unpacked"
        if not mark.exists():
            for part, md5 in zip(parts, sums.values()):
                download_file(url + part.name, part, md5)
            unpack(parts, root, top)
            os.sync()
            mark.touch()
            print(f"{archive} is unpacked into {root}, the archive is removed")
        for part in parts:
            part.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------- preparation


def check_clips(source, clips, task):
    """The task of a list of clips, given or found; ValueError for a list that cannot be trained on and scored."""
    if not clips:
        raise ValueError(f"{source}: no clips, the tables are empty or no audio was found")
    path, times = collections.Counter(os.path.normpath(c.path) for c in clips).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{source}: clip '{path}' is listed {times} times: give it one line, its labels joined by ';'")
    if odd := next((c.path for c in clips if re.search("[\ud800-\udfff\r]", c.path)), None):
        raise ValueError(f"the file name {odd!r} is not UTF-8, or has a line break: rename it")
    many = next((c for c in clips if len(c.labels) != 1), None)
    if task == "single-label" and many:
        raise ValueError(f"--task single-label, but clip '{many.id}' has {len(many.labels)} labels")
    if task is None and many and max(len(c.labels) for c in clips) == 1:
        raise ValueError(f"clip '{many.id}' has no label, and none has two: label it, or give --task multi-label")
    splits, folds = {c.split.split("-")[0] for c in clips}, {c.fold for c in clips}
    if "" not in splits and (lacking := {"train", "eval"} - splits):
        raise ValueError(f"no clip has split '{max(lacking)}': training and scoring need both: give clips a split")
    if "" not in folds and len(folds) < 2:
        raise ValueError(f"all clips are in fold {clips[0].fold}: two or more folds are needed")
    return task or ("multi-label" if many else "single-label")


def start_worker():
    """Runs first in each worker: ends it when the preparation is killed, or it would wait for work for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and the lock are the parent's
    for descriptor in dataset.LOCKS.values():
        os.close(descriptor)
    torch.set_num_threads(1)
    np.empty(31 << 20, np.uint8)  # one large block, freed at once: from here glibc keeps the memory that a clip frees
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def fill_row(shard, start, n_frames, seconds, row, clip):
    """Fill a row of a shard, whose rows start at this byte -> (frames, mean, var), or the reason why it stays zero."""
    try:
        x = fbank(load_audio(clip.path, seconds, clip.member))[:n_frames].half()
        if not len(x):
            raise ValueError("shorter than one frame of 25 ms")
    except (soundfile.SoundFileError, ValueError, OSError) as e:
        return " ".join(str(e).split())
    with open(shard, "rb+") as f:  # written, not mapped: a full disk is an error, not a bus error
        f.seek(start + row * n_frames * N_MELS * 2)
        f.write(x.numpy())
    wide = x.double()
    return len(x), wide.mean().item(), wide.var(correction=0).item()


def make_shards(shards, notes, n_frames, seconds, workers):
    """Have a pool of processes fill the rows of the shards {path: clips} that are still to be read, a few shards at a time so
    that no worker waits, and put each shard in place and then its note. Clips that could not be read are tried again."""
    unread = {s: [i for i, what in enumerate(note["found"]) if isinstance(what, str)] for s, note in notes.items()}

    def make(shard):
        rows, clips, note = unread[shard], shards[shard], notes[shard]

        def fill(path):
            if len(rows) < len(clips):
                os.replace(shard, path)
            else:
                np.lib.format.open_memmap(path, "w+", np.float16, (len(clips), n_frames, N_MELS))
            start = np.load(path, mmap_mode="r").offset
            fill_own = functools.partial(fill_row, path, start, n_frames, seconds)
            for row, what in zip(rows, pool.map(fill_own, rows, [clips[row] for row in rows], chunksize=CHUNK)):
                note["found"][row] = what
                bar.update()

        shard.with_suffix(".json").unlink(missing_ok=True)  # killed before it is back, the shard is made anew
        atomic_write(shard, fill)
        note["crc32"] = crc32(shard)
        write_json(shard.with_suffix(".json"), note)

    # fork, as torch's own DataLoader does on Linux: a worker starts at once, without importing torch again
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    total, left = (sum(map(len, v.values())) for v in (shards, unread))
    with (
        concurrent.futures.ProcessPoolExecutor(workers, context, start_worker) as pool,
        concurrent.futures.ThreadPoolExecutor(2 + workers // 8) as threads,
        tqdm(total=total, initial=total - left, unit="clip") as bar,
    ):
        pool.submit(int).result()  # the workers are there before the threads
        try:
            collections.deque(threads.map(make, (shard for shard in shards if unread[shard])))
        except concurrent.futures.process.BrokenProcessPool as e:
            raise ValueError("a worker process was killed: run the same command again, with fewer --workers") from e
        finally:
            pool.shutdown(cancel_futures=True)  # until its workers are gone, which hold the lock


def prepare(out, source, classes, clips, task=None, seconds=10, workers=None):
    """Write data/<name>/: shards, each with a note of what was found until all are there, then the tables.

    The list of clips fixes every clip's row, so the bytes depend neither on the workers nor on an interruption. ValueError
    if `out` holds other clips or is in use, or if more than 5 % of the clips could not be read (the same command retries).
    """
    out, n_frames, workers = pathlib.Path(out), round(seconds * 100), workers or joblib.cpu_count()
    missing, clips = [c for c in clips if c.path is None], [c for c in clips if c.path is not None]
    facts = {"version": VERSION, "source": source, "task": check_clips(source, clips, task)}
    facts |= {"sample_rate": SAMPLE_RATE, "n_mels": N_MELS, "n_frames": n_frames, "shard": SHARD}
    digest = hashlib.sha256(repr([facts, classes]).encode())
    for c in clips:
        digest.update(repr((c.id, c.path, c.split, c.fold, c.labels)).encode())
    fingerprint = facts["fingerprint"] = digest.hexdigest()[:16]
    out.mkdir(parents=True, exist_ok=True)
    dataset.lock(out)
    try:
        begun = [*out.glob("stats.json"), *out.glob("fbank-*.json")]
        if not begun and (out / "clips.csv").exists():
            raise ValueError(f"{out} holds a clips.csv without a stats.json: give another --out, or move that table")
        if begun and read_json(begun[0]).get("fingerprint") != fingerprint:
            raise ValueError(f"{out} holds other clips or other settings: give another --out, or remove it")
        if (out / "stats.json").exists():
            print(f"{out} is complete: nothing to do")
        else:
            shards = {out / f"fbank-{i // SHARD:05d}.npy": clips[i : i + SHARD] for i in range(0, len(clips), SHARD)}
            notes = {s: {"fingerprint": fingerprint, "found": [""] * len(own)} for s, own in shards.items()}  # unread
            notes |= {s: read_json(p) for s in shards if s.exists() and (p := s.with_suffix(".json")).exists()}
            gb = sum(len(own) for s, own in shards.items() if not s.exists()) * n_frames * N_MELS * 2 / 1e9
            names = ", ".join(name for _, name in classes[:5]) + ", ..." * (len(classes) > 5)
            kind = f"{len(classes)} classes ({names}), {facts['task']}, {gb:.1f} GB; {workers} workers -> {out}"
            print(f"{source}: {len(clips)} clips of {seconds:g} s, {kind}")
            if gb > (free := shutil.disk_usage(out).free / 1e9):
                raise OSError(f"{out} has {free:.1f} GB free, its shards need {gb:.1f}: give --out on a larger disk")
            make_shards(shards, notes, n_frames, seconds, workers)
            write_tables(out, facts, classes, clips, missing, notes.values())
        for note in out.glob("fbank-*.json"):
            note.unlink()
    finally:
        dataset.unlock(out)


def write_tables(out, facts, classes, clips, missing, notes):
    """The last pass: skipped.csv, classes.csv, clips.csv and stats.json."""
    found = [what for note in notes for what in note["found"]]  # by row
    kept = [(row, c) for row, c in enumerate(clips) if not isinstance(found[row], str)]
    skipped = [(c.id, c.path, what) for c, what in zip(clips, found) if isinstance(what, str)]
    rows = skipped + [(c.id, "", f"not there ({c.split})") for c in missing]  # of AudioSet, where that is normal
    write_csv(out / "skipped.csv", ["id", "path", "reason"], rows)
    if skipped:
        first = f"{skipped[0][1]}: {skipped[0][2]}; {out / 'skipped.csv'} names all"
        what = f"{len(skipped)} of {len(clips)} clips could not be read, the first: {first}"
        if len(skipped) > 0.05 * len(clips):
            raise ValueError(f"{what}. The rest is kept: fix or convert them, and the same command reads them again")
        print(what)
    check_clips(facts["source"], [c for _, c in kept], facts["task"])  # is a whole split unreadable?
    rows = ([row, *c[:4], ";".join(map(str, c.labels)), *found[row]] for row, c in kept)
    write_csv(out / "clips.csv", dataset.CLIP_COLUMNS, rows)
    write_csv(out / "classes.csv", ["index", "mid", "display_name"], ([i, *c] for i, c in enumerate(classes)))
    facts |= {"clips": len(kept), "skipped": len(skipped), "crc32": [note["crc32"] for note in notes]}
    if facts["source"] == "audioset":  # copies of it differ
        listed = collections.Counter(c.split for c in clips + missing)
        facts["listed"] = {"train": listed["train-balanced"] + listed["train-unbalanced"], **listed}
    facts["tables"] = {name: crc32(out / name) for name in ("classes.csv", "clips.csv")}
    write_json(out / "stats.json", facts)
    counts = collections.Counter(c.split or f"fold {c.fold}" for _, c in kept)
    print(f"wrote {out}: " + ", ".join(f"{k} {v}" for k, v in counts.items()))


def check(out):
    """Verify a prepared folder: every byte of its shards, every row of its table. ValueError names what is wrong."""
    data = dataset.FbankDataset(out, None)  # reads all rows
    for s, crc in enumerate(tqdm(data.stats["crc32"], unit="shard")):
        if crc32(out / f"fbank-{s:05d}.npy") != crc:
            raise ValueError(f"{out}/fbank-{s:05d}.npy is damaged: remove {out} and prepare it again")
    print(f"{out} is sound: {len(data)} clips, {s + 1} shards, {data.task}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, path = p.add_argument, pathlib.Path
    add("dataset", nargs="?", choices=DATASETS)
    add("--root", type=path, help="the raw data (default: a download next to --out); csv: a table or class folders")
    add("--out", type=path, help="the prepared folder (default: data/DATASET)")
    add("--workers", type=int, help="processes (default: one for each core it may use)")
    add("--clip-seconds", type=float, help="kept of each clip, shorter ones are padded (default: 10; ESC: 5; demo: 1)")
    add("--task", choices=["multi-label", "single-label"], help="csv: multi-label where a clip has several labels")
    add("--check", type=path, metavar="DIR", help="verify a prepared folder, prepare nothing")
    a = p.parse_args()
    if (a.dataset is None) == (a.check is None):
        p.error(f"name a dataset ({', '.join(DATASETS)}), or --check DIR")
    if a.check:
        return check(a.check)
    seconds, task, list_clips = DATASETS[a.dataset]
    seconds, out = seconds if a.clip_seconds is None else a.clip_seconds, a.out or path("data", a.dataset)
    if a.workers is not None and a.workers < 1:
        raise ValueError(f"--workers {a.workers}: give 1 or more")
    if not 0.16 <= seconds <= 3600:
        raise ValueError(f"--clip-seconds {seconds:g} is out of range [0.16, 3600]")
    source = "esc50" if a.dataset == "esc10" else a.dataset  # ESC-10 is a part of ESC-50
    root = a.root or out.absolute().parent / f"{out.absolute().name if source == 'demo' else source}-audio"
    if a.root is None and source in DOWNLOADS:
        root.mkdir(parents=True, exist_ok=True)
        dataset.lock(root)
        download(source, root)
        dataset.unlock(root)
    elif a.root is None and source != "demo":
        raise ValueError(f"{source} cannot be downloaded: it needs --root, see --help")
    classes, clips = list_clips(root.absolute())
    prepare(out, a.dataset, classes, clips, a.task or task, seconds, a.workers)


if __name__ == "__main__":
    dataset.command_line(main)  # where it ends, its workers end too
