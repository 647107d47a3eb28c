"""The one place for speed claims: ours beside the usual way, in one run on one machine, as ratios.

    python tests/bench.py                            # all of it on the CPU; --quick: small sizes
    python tests/bench.py steps growth               # some of it
    python tests/bench.py --device cuda              # not run yet

Prints a table and writes bench.json to the working folder. These machines are noisy: what is compared is measured in turn,
step by step, and a ratio is that of the medians.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import numpy as np
import soundfile
import timm
import torch
import torchaudio
import transformers
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.utils.flop_counter import FlopCounterMode
from torchaudio.compliance import kaldi

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import distill
import evaluate
import models
import prep_data
import train_teacher

CLASSES = 200
HF_SIZES = {"ast-tiny": (192, 3), "ast-small": (384, 6), "ast-base": (768, 12)}  # width, heads
PEAK = "  peak memory (of the process so far on a CPU), GiB"
SMALLEST = "efficientnet-b0", "ast-tiny"


def seconds(f, *args, device=None):
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    f(*args)
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(functions, rounds, device):
    """{name: median seconds} of functions called in turn, after one call that is not counted."""
    times = {name: [] for name in functions}
    for n in range(rounds + 1):
        for name, f in functions.items():
            times[name].append(seconds(f, device=device))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


# ------------------------------------------------------------------------------------------------- data


def usual_loop(paths, seconds_kept):
    """One process, a clip at a time: soundfile, torchaudio.functional.resample, kaldi.fbank."""
    for path in paths:
        x, rate = soundfile.read(path, dtype="float32", always_2d=True)
        x = torchaudio.functional.resample(torch.from_numpy(x.mean(1)), rate, 16000)[: seconds_kept * 16000]
        kaldi.fbank(
            x[None], htk_compat=True, sample_frequency=16000, window_type="hanning", num_mel_bins=128, dither=0.0
        )


def bench_prep(row, quick, device, folder):
    """Clips a second of prep_data.py with two workers, its start included, against the usual loop, on 44.1 kHz WAV."""
    n, rng = 600 if quick else 6000, np.random.default_rng(0)
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
    loops, ours = [], []
    for pair in range(3):
        loops.append(n // 4 / seconds(usual_loop, paths[: n // 4], 10))
        out = folder / f"out{pair}"
        ours.append(n / seconds(lambda out=out: subprocess.run([*line, out], check=True, capture_output=True)))
    ours, loop = statistics.median(ours), statistics.median(loops)
    row(f"preparation, {n} clips of 10 s at 44.1 kHz, clips/s", ours, "the usual loop", loop, ours / loop)


def fake_folder(folder, n, shards, classes=CLASSES, split="train"):
    """A prepared folder of n clips of 10 s with random log-mels in `shards` files, or with none (only its tables)."""
    rng = np.random.default_rng(0)
    facts = {"version": prep_data.VERSION, "source": "fsd50k", "task": "multi-label", "sample_rate": 16000}
    facts |= {"n_mels": 128, "n_frames": 1000, "shard": prep_data.SHARD, "crc32": [0] * shards}
    prep_data.write_json(folder / "stats.json", facts)
    names = [[i, f"/m/{i}", f"class {i}"] for i in range(classes)]
    prep_data.write_csv(folder / "classes.csv", ["index", "mid", "display_name"], names)
    labels = rng.integers(0, classes, (n, 3))
    with open(folder / "clips.csv", "w", newline="") as f:
        lines = csv.writer(f, lineterminator="\n")
        lines.writerow(["row", "id", "path", "split", "fold", "labels", "n_frames", "mean", "var"])
        for i in range(n):
            own = ";".join(map(str, labels[i, : 1 + i % 3]))
            lines.writerow(
                [i, f"id{i:09d}", f"/data/audio/id{i:09d}.wav", split, "", own, 998, -5.123456789, 16.12345678]
            )
    for s in range(shards):
        x = rng.standard_normal((min(n - s * prep_data.SHARD, prep_data.SHARD), 1000, 128), np.float32)
        np.save(folder / f"fbank-{s:05d}.npy", x.astype(np.float16))
    return folder


def bench_scale(row, quick, device, folder):
    """Opening a prepared folder of 2 million clips in a process of its own, and drawing an epoch's order of them."""
    n = 200_000 if quick else 2_000_000
    fake_folder(folder, n, 0, 527, "train-unbalanced")
    code = f"""
import resource, sys, time
sys.path.insert(0, {str(ROOT)!r})
import prep_data, train_teacher
began = time.perf_counter()
data = prep_data.FbankDataset({str(folder)!r}, "train")
opened = time.perf_counter()
train_teacher.epoch_order(data, 0, 1, True)
print(opened - began, time.perf_counter() - opened, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    opened, order, peak = map(float, done.stdout.split())
    row(f"opening clips.csv of {n} rows, s (at most 20)", opened)
    row("  the process's peak memory, GiB (at most 3)", peak)
    row("  an epoch's class-balanced order of them, s (at most 2)", order)


def bench_input(row, quick, device, folder):
    """What feeds a step: reading rows, and mixing and augmenting them on the device."""
    n, B = 512 if quick else 2048, 12
    data = prep_data.FbankDataset(fake_folder(folder, n, -(-n // prep_data.SHARD)), "train")
    rng = np.random.default_rng(0)
    order = rng.permutation(n)

    def read():
        for i in range(0, n, B):
            data.fetch(order[i : i + B])

    row("reading rows in random order, clips/s", n / in_turn({"": read}, 3, device)[""])
    x, frames, _ = (v.to(device) for v in data.fetch(order[:B]))
    d = prep_data.draw(rng, B, n)
    d = {k: torch.from_numpy(v).to(device) for k, v in d.items()}

    def make():
        noise = torch.rand(B, 1000, 128, device=device)
        mixed = prep_data.mix(x.float(), x.flip(0).float(), d["lam"], frames, frames)
        prep_data.augment(mixed, {k: d[k] for k in ("f0", "f1", "t0", "t1", "shift", "noise")}, noise, -5.0, 4.0)

    row("mixup, masks, noise and shift, clips/s", B / in_turn({"": make}, 10, device)[""])


# ------------------------------------------------------------------------------------------------- training steps


def ours(name, device, n_frames=1000, train=True):
    model = models.build_model(name, CLASSES, n_frames).to(device).train(train)
    return train_teacher.faster(model, argparse.Namespace(no_compile=False), device)


def peer(name, device):
    """(label, model, its forward pass): the same network as its users have it now, Hugging Face's AST or plain timm."""
    if name in HF_SIZES:
        d, heads = HF_SIZES[name]
        config = transformers.ASTConfig(
            hidden_size=d, num_attention_heads=heads, intermediate_size=4 * d, max_length=1000, num_labels=CLASSES,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
        )  # fmt: skip
        model = transformers.ASTForAudioClassification(config).train().to(device)
        return "Hugging Face, sdpa", model, lambda x: model(x).logits
    model = timm.create_model(models.MODELS[name][1], in_chans=1, num_classes=CLASSES).train().to(device)
    return "timm, NCHW", model, lambda x: model(x.transpose(1, 2).unsqueeze(1))


def fake_batch(B, device, n_frames=1000):
    x, y = torch.randn(B, n_frames, 128, device=device), torch.rand(B, CLASSES, device=device) < 0.02
    return x, y.float()


def training_step(model, forward, teachers=(), fused=True, bf16=True):
    """-> a function of a batch (x, y) that does one step: forward passes, loss, backward, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, train_teacher.BETAS, weight_decay=5e-7, fused=fused)

    def step(x, y):
        with evaluate.autocast(x.device) if bf16 else contextlib.nullcontext():
            with torch.no_grad():
                teacher_logits = [teacher(x) for teacher in teachers]
            z = forward(x)
        if teachers:
            loss, _, _ = distill.cmkd_loss(z, teacher_logits, y, "multi-label")
        else:
            loss = train_teacher.truth_loss(z.float(), y, "multi-label")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def by_default(step, x, y):
    """The step on a GPU in PyTorch's default float32, without TF32 in matrix products."""
    torch.set_float32_matmul_precision("highest")
    step(x, y)
    torch.set_float32_matmul_precision("high")


def first_peak(step, batch):
    """Do two steps, the first of which compiles: -> the GPU's peak memory in the second, or the process's so far (GiB)."""
    device = batch[0].device
    step(*batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step(*batch)
    return evaluate.peak_memory(device)


def matrix_product(device):
    """-> a large matrix product in the precision of training, to be timed in turn with a step, and its FLOPs."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return partial(torch.mm, a, a), 2 * n**3


def sizes(name, quick, device):
    """(batch, rounds) of a model's step."""
    if device.type == "cuda":
        return 12 if name == "efficientnet-b6" else 48, 20  # so that eager float32 fits, by estimate
    return (4, 2) if quick else (12, 7) if name in SMALLEST else (2, 3)


@torch.no_grad()
def flops(name, x):
    """Of one forward pass, counted."""
    model = models.build_model(name, CLASSES).to(x.device)  # which does a forward pass of its own
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def bench_steps(row, quick, device, folder):
    """A training step of each model beside its peer's, and the share of the device's matrix rate that it reaches."""
    for name in SMALLEST if quick else models.MODELS:
        steps_of(name, *sizes(name, quick, device), row, device)


def steps_of(name, B, rounds, row, device):
    model, batch = ours(name, device), fake_batch(B, device)
    step = training_step(model, model)
    peak = first_peak(step, batch)
    product, work = matrix_product(device)
    functions, label = {"ours": partial(step, *batch), "product": product}, ""
    if not name.startswith("hybrid"):
        label, other, forward = peer(name, device)
        functions["peer"] = partial(training_step(other, forward, fused=False), *batch)
        if device.type == "cuda":
            plain = training_step(other, forward, fused=False, bf16=False)
            functions["float32"] = partial(by_default, plain, *batch)
    took = in_turn(functions, rounds, device)
    ours_took, rate, what = took.pop("ours"), work / took.pop("product"), f"{name}, training step at batch {B}, clips/s"
    for kind, t in took.items():
        row(what, B / ours_took, label + (", float32" if kind == "float32" else ""), B / t, t / ours_took)
    if not took:
        row(what, B / ours_took)
    done = 3 * flops(name, batch[0]) / ours_took  # a step is three forward passes
    row("  TFLOP/s, of a large matrix product's", done / 1e12, "matrix product", rate / 1e12, done / rate)
    row(PEAK, peak)


def bench_kd(row, quick, device, folder):
    """A distillation step beside the student's alone: the smallest pair, and run_all.sh's, in both directions."""
    pairs, (product, work) = [SMALLEST, SMALLEST[::-1]], matrix_product(device)
    if not quick:
        pairs += [("efficientnet-b0", "ast-base"), ("ast-tiny", "efficientnet-b2")]
    for teacher_name, name in pairs:
        B, rounds = sizes(name, quick, device)
        batch = fake_batch(B, device)
        model, teacher = ours(name, device), ours(teacher_name, device, train=False).requires_grad_(False)
        kd, alone = (training_step(model, model, t) for t in ([teacher], []))
        peak = first_peak(kd, batch)
        functions = {"kd": partial(kd, *batch), "alone": partial(alone, *batch), "product": product}
        took = in_turn(functions, rounds, device)
        what = f"{teacher_name} -> {name}, a step at batch {B}, clips/s"
        row(what, B / took["kd"], "the student alone", B / took["alone"], took["alone"] / took["kd"])
        done, rate = (3 * flops(name, batch[0]) + flops(teacher_name, batch[0])) / took["kd"], work / took["product"]
        row("  TFLOP/s, of a large matrix product's", done / 1e12, "matrix product", rate / 1e12, done / rate)
        row(PEAK, peak)


def bench_loop(row, quick, device, folder):
    """What the training loop adds to a step: reading, mixup, masks, noise, shift, the watch for NaN."""
    on_gpu = device.type == "cuda"
    B, steps, rounds = (12, 20, 5) if on_gpu else (4, 1, 2) if quick else (12, 1, 7)
    data = prep_data.FbankDataset(fake_folder(folder, 512, 1), "train")
    for place in ("disk", "the GPU") if on_gpu else ("disk",):
        if place == "the GPU":
            data.keep_on(device)
        for name in (*SMALLEST, "ast-base") if on_gpu else SMALLEST:
            flags = ["--data", str(folder), "--model", name, "--batch-size", str(B), "--pretrained", "no"]
            args = train_teacher.resolve(train_teacher.parser("").parse_args(flags), data)
            model, batch = ours(name, device), fake_batch(B, device)
            step, fault = training_step(model, model), torch.tensor(torch.inf, device=device)
            epochs = (train_teacher.batches(data, args, epoch, device) for epoch in itertools.count(1))
            feed = itertools.chain.from_iterable(epochs)

            def loop(feed=feed, step=step, fault=fault, model=model):
                for x, y, _ in itertools.islice(feed, steps):
                    step(x, y)
                    train_teacher.first_fault(fault, 0, y.sum(), model)

            def alone(step=step, batch=batch):
                for _ in range(steps):
                    step(*batch)

            took = in_turn({"loop": loop, "alone": alone}, rounds, device)
            a, b = (took[k] / steps for k in ("alone", "loop"))
            row(f"{name}, clips from {place}, the loop's step at batch {B}, s", b, "forward, backward, Adam", a, b / a)


def bench_hours(row, quick, device, folder):
    """What `run_all.sh fsd50k` would take for training, computed from the steps of its seven runs: 50 epochs of 36,796 clips."""
    on_gpu, hours = device.type == "cuda", 0
    b2, ast, cnns = "efficientnet-b2", "ast-base", ["efficientnet-b0", "densenet-121"]
    for name, teacher_names in [(m, []) for m in (*cnns, "ast-tiny", b2, ast)] + [(ast, cnns), (b2, ["ast-tiny"])]:
        B = 4 if not on_gpu else 12 if name.startswith("ast") else 24
        model, batch = ours(name, device), fake_batch(B, device)
        teachers = [ours(t, device, train=False).requires_grad_(False) for t in teacher_names]
        step = partial(training_step(model, model, teachers), *batch)
        took = in_turn({"": step}, 20 if on_gpu else 1, device)[""]
        hours += 36_796 * 50 / B * took / 3600
        what = " + ".join(teacher_names) + (" -> " if teacher_names else "") + name
        row(f"{what}, clips/s at batch {B}", B / took)
    row("run_all.sh fsd50k, hours of training, computed", hours)


def bench_growth(row, quick, device, folder):
    """The time of a step against batch and frames, and of opening a folder against its clips."""
    for name in SMALLEST:
        for B, T in ((2, 500), (4, 500), (8, 500), (4, 250), (4, 1000)):
            model, batch = ours(name, device, T), fake_batch(B, device, T)
            took = in_turn({"": partial(training_step(model, model), *batch)}, 2 if quick else 5, device)[""]
            row(f"{name}, batch {B}, {T} frames, s a step", took)
    for n in (5_000, 50_000, 500_000):
        (folder / str(n)).mkdir()
        fake_folder(folder / str(n), n, 0)
        row(f"opening {n} clips, s", seconds(prep_data.FbankDataset, folder / str(n), "train"))


def bench_scores(row, quick, device, folder):
    """evaluate.scores, which adds the per-class table, against scikit-learn's two macro averages."""
    for n, classes, most in ((10231, 200, 3), (20371, 527, 15)):
        n = n // 10 if quick else n
        rng = np.random.default_rng(0)
        y = rng.random((n, classes)) < 0.01
        y[0] = True
        p = rng.random((n, classes), dtype=np.float32)
        functions = {
            "ours": lambda y=y, p=p: evaluate.scores(p, y, "multi-label"),
            "peer": lambda y=y, p=p: (average_precision_score(y, p), roc_auc_score(y, p)),
        }
        took = in_turn(functions, 3, torch.device("cpu"))
        row(f"scoring {n} x {classes}, s (at most {most})", took["ours"], "scikit-learn", took["peer"], took["peer"] / took["ours"])  # fmt: skip


def main():
    parts = {k.removeprefix("bench_"): f for k, f in globals().items() if k.startswith("bench_")}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(parts)} (default: all)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    a = p.parse_args()
    if unknown := set(a.parts) - set(parts):
        p.error(f"unknown part {min(unknown)}: some of {', '.join(parts)}")
    device, rows = evaluate.setup(a.device), []

    def row(what, ours, label="", other=None, ratio=None):
        rows.append({"what": what, "ours": ours, "beside": label, "theirs": other, "ratio": ratio})
        beside = f"{other:12.4g}  {label:28}" if label else " " * 42
        print(f"{what:62}{ours:12.4g}{beside}{f'{ratio:8.2f} x' if ratio else ''}", flush=True)

    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__}"  # fmt: skip
    print(f"{machine}\n{'':62}{'ours':>12}{'beside it':>14}")
    for name in a.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](row, a.quick, device, pathlib.Path(folder))
    pathlib.Path("bench.json").write_text(json.dumps({"machine": machine, "quick": a.quick, "rows": rows}, indent=1))
    print("wrote bench.json")


if __name__ == "__main__":
    main()
