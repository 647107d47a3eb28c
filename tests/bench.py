"""The one place for speed claims: ours beside the usual way, in one run on one machine, as ratios.

    python tests/bench.py                # all of it; --quick for a tenth of the sizes
    python tests/bench.py prep scale     # some of it

Writes bench.json to the working folder. These machines are noisy: every ratio is the median over alternating pairs.
"""

import argparse
import csv
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile
import torch
import torchaudio
from sklearn.metrics import average_precision_score, roc_auc_score
from torchaudio.compliance import kaldi

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate
import prep_data
import train_teacher


def seconds(f, *args):
    began = time.perf_counter()
    f(*args)
    return time.perf_counter() - began


def usual_loop(paths, seconds_kept):
    """One process, a clip at a time: soundfile, torchaudio.functional.resample, kaldi.fbank."""
    for path in paths:
        x, rate = soundfile.read(path, dtype="float32", always_2d=True)
        x = torchaudio.functional.resample(torch.from_numpy(x.mean(1)), rate, 16000)[: seconds_kept * 16000]
        kaldi.fbank(
            x[None], htk_compat=True, sample_frequency=16000, window_type="hanning", num_mel_bins=128, dither=0.0
        )


def bench_prep(rows, scale, folder):
    """Clips a second of prep_data.py with two workers, its start included, against the usual loop, on 44.1 kHz WAV."""
    n, rng = round(6000 * scale), np.random.default_rng(0)
    (folder / "audio").mkdir()
    paths = [folder / "audio" / f"{i}.wav" for i in range(n)]
    for i, path in enumerate(paths):
        if i < 300:
            soundfile.write(path, 0.1 * rng.standard_normal(441000), 44100)
        else:
            path.hardlink_to(paths[i % 300])  # what is measured is not the disk
    table = [[path, "ab"[i % 2], ("train", "eval")[i % 2]] for i, path in enumerate(paths)]
    prep_data.write_csv(folder / "t.csv", ["path", "labels", "split"], table)
    line = [sys.executable, ROOT / "prep_data.py", "csv", "--root", folder / "t.csv", "--workers", "2", "--out"]
    ratios = []
    for pair in range(3):
        loop = n // 4 / seconds(usual_loop, paths[: n // 4], 10)
        out = folder / f"out{pair}"
        ours = n / seconds(lambda out=out: subprocess.run([*line, out], check=True, capture_output=True))
        ratios.append(ours / loop)
    peer = f"{loop:.0f} clips/s, the usual loop"
    rows.append((f"preparation, {n} clips of 10 s, 44.1 kHz", f"{ours:.0f} clips/s", peer, statistics.median(ratios)))


def bench_scale(rows, scale, folder):
    """Opening a prepared folder of 2 million clips, and drawing an epoch's order of them."""
    n = round(2_000_000 * scale)
    rng = np.random.default_rng(0)
    facts = {
        "version": prep_data.VERSION,
        "source": "audioset",
        "task": "multi-label",
        "sample_rate": 16000,
        "n_mels": 128,
    }
    facts |= {"n_frames": 1000, "shard": prep_data.SHARD, "crc32": []}
    prep_data.write_json(folder / "stats.json", facts)
    prep_data.write_csv(
        folder / "classes.csv", ["index", "mid", "display_name"], [[i, f"/m/{i}", f"class {i}"] for i in range(527)]
    )
    labels = rng.integers(0, 527, (n, 3))
    with open(folder / "clips.csv", "w", newline="") as f:
        lines = csv.writer(f, lineterminator="\n")
        lines.writerow(["row", "id", "path", "split", "fold", "labels", "n_frames", "mean", "var"])
        for i in range(n):
            own = ";".join(map(str, labels[i, : 1 + i % 3]))
            lines.writerow(
                [
                    i,
                    f"id{i:09d}",
                    f"/data/audio/id{i:09d}.wav",
                    "train-unbalanced",
                    "",
                    own,
                    998,
                    -5.123456789,
                    16.123456789,
                ]
            )
    began = time.perf_counter()
    data = prep_data.FbankDataset(folder, "train")
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows.append((f"opening clips.csv of {n} rows", f"{took:.1f} s", f"{peak:.1f} GiB, the process's peak", None))
    rows.append(
        (
            "an epoch's order of them, class-balanced",
            f"{seconds(train_teacher.epoch_order, data, 0, 1, True):.2f} s",
            "",
            None,
        )
    )


def bench_scores(rows, scale, folder):
    """evaluate.scores against scikit-learn's macro averages."""
    for n, classes in ((10231, 200), (20371, 527)):
        n = round(n * scale)
        rng = np.random.default_rng(0)
        y = rng.random((n, classes)) < 0.01
        y[0] = True
        p = rng.random((n, classes), dtype=np.float32)
        ours = seconds(evaluate.scores, p, y, "multi-label")
        theirs = seconds(lambda y=y, p=p: (average_precision_score(y, p), roc_auc_score(y, p)))
        rows.append((f"scoring {n} x {classes}", f"{ours:.1f} s", f"{theirs:.1f} s, scikit-learn", theirs / ours))


def main():
    parts = {"prep": bench_prep, "scale": bench_scale, "scores": bench_scores}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)} (default: all)")
    p.add_argument("--quick", action="store_true", help="a tenth of the sizes")
    a = p.parse_args()
    rows = []
    for name in a.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](rows, 0.1 if a.quick else 1.0, pathlib.Path(folder))
    print(f"\n{'':52}{'ours':>16}   {'beside it':36}{'ours is':>8}")
    for what, ours, peer, ratio in rows:
        print(f"{what:52}{ours:>16}   {peer:36}{f'{ratio:.2f} x' if ratio else '':>8}")
    pathlib.Path("bench.json").write_text(json.dumps(rows, indent=1))
    print(f"wrote bench.json; torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
