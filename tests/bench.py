"""The one place for speed claims: ours beside the usual way, in one run on one machine, as ratios.

    python tests/bench.py                            # all of it on the CPU; --quick: small sizes
    python tests/bench.py steps patchout             # some of it
    python tests/bench.py --device cuda              # so far run for AST-Base, on one H200

Prints a table and writes bench.json to the working folder. These machines are noisy: what is compared is measured in turn,
step by step, and a ratio is that of the medians.
"""

import argparse
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
import dataset
import distill
import evaluate
import models
import train_teacher

CLASSES = 200
HF_SIZES = {"ast-tiny": (192, 3), "ast-small": (384, 6), "ast-base": (768, 12)}  # width, heads
SMALLEST = "efficientnet-b0", "ast-tiny"


def seconds(f, *args, device=None):
    wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    f(*args)
    wait()
    return time.perf_counter() - began


def in_turn(functions, rounds, device):
    """{name: median seconds} of functions called in turn, after one call that is not counted."""
    times = {name: [] for name in functions}
    again = 5 if device.type == "cuda" else 1  # as in a loop, which waits for no step
    for _ in range(rounds + 1):
        for name, f in functions.items():
            times[name].append(seconds(lambda f=f: [f() for _ in range(again)], device=device) / again)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


# ------------------------------------------------------------------------------------------------- data


def usual_loop(paths):
    """One process, a clip at a time: soundfile, torchaudio.functional.resample, kaldi.fbank."""
    options = {"htk_compat": True, "window_type": "hanning", "num_mel_bins": 128, "dither": 0.0}
    for path in paths:
        x, rate = soundfile.read(path, dtype="float32", always_2d=True)
        x = torchaudio.functional.resample(torch.from_numpy(x.mean(1)), rate, 16000)[:160000]
        kaldi.fbank(x[None], sample_frequency=16000, **options)


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
    dataset.write_csv(folder / "t.csv", ["path", "labels", "split"], table)
    line = [sys.executable, ROOT / "prep_data.py", "csv", "--root", folder / "t.csv", "--workers", "2", "--out"]
    loops, ours = [], []
    for pair in range(3):
        loops.append(n // 4 / seconds(usual_loop, paths[: n // 4]))
        out = folder / f"out{pair}"
        ours.append(n / seconds(lambda out=out: subprocess.run([*line, out], check=True, capture_output=True)))
    ours, loop = statistics.median(ours), statistics.median(loops)
    row(f"preparation, {n} clips of 10 s at 44.1 kHz, clips/s", ours, "the usual loop", loop, ours / loop)


def fake_folder(folder, n, shards, split="train", filled=True):
    """A prepared folder of n clips of 10 s, spread evenly over `shards` files: of random log-mels, or of holes in the disk."""
    rng, each = np.random.default_rng(0), -(-n // shards)
    facts = {"version": dataset.VERSION, "source": "fsd50k", "task": "multi-label", "sample_rate": 16000, "tables": {}}
    dataset.write_json(folder / "stats.json", facts | {"n_frames": 1000, "crc32": [0] * shards})
    names = ([i, f"/m/{i}", f"class {i}"] for i in range(CLASSES))
    dataset.write_csv(folder / "classes.csv", ["index", "mid", "display_name"], names)
    labels = [";".join(map(str, own[: 1 + i % 3])) for i, own in enumerate(rng.integers(0, CLASSES, (n, 3)).tolist())]
    place, rest = lambda i: i // each * dataset.SHARD + i % each, (998, -5.123456789, 16.12345678)
    rows = ([place(i), f"id{i:09d}", f"/data/audio/id{i:09d}.wav", split, "", labels[i], *rest] for i in range(n))
    dataset.write_csv(folder / "clips.csv", dataset.CLIP_COLUMNS, rows)
    for s in range(shards):
        shape = (min(each, n - s * each), 1000, 128)
        x = np.lib.format.open_memmap(folder / f"fbank-{s:05d}.npy", "w+", np.float16, shape)
        if filled:
            x[:] = rng.integers(-3, 4, shape, np.int8)
            x.flush()
    return folder


def bench_scale(row, quick, device, folder):
    """Opening a prepared folder of AudioSet's size in a process of its own, and drawing an epoch's order of its clips."""
    n = 200_000 if quick else 2_000_000
    fake_folder(folder, n, n // 500, "train-unbalanced", filled=False)
    code = f"""
import resource, sys, time
sys.path.insert(0, {str(ROOT)!r})
import dataset
began = time.perf_counter()
data = dataset.FbankDataset({str(folder)!r}, "train")
opened = time.perf_counter()
dataset.epoch_order(data, 0, 1, True)
print(opened - began, time.perf_counter() - opened, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    opened, order, peak = map(float, done.stdout.split())
    row(f"opening {n} clips in {n // 500} shards, s (at most 20)", opened)
    row("  the process's peak memory, GiB (at most 3)", peak)
    row("  an epoch's class-balanced order of them, s (at most 2)", order)


def settings(data, name, B, *flags):
    line = ["--data", str(data.root), "--model", name, "--batch-size", str(B), "--pretrained", "no", *flags]
    return train_teacher.resolve(train_teacher.parser("").parse_args(line), data)


def bench_input(row, quick, device, folder):
    """The host's side of dataset.batches: reading batches of 120 clips from 300 shards, with mixup 0.5. Partners are counted as
    clips, 180 a batch: they are read like the others."""
    n, prefetch, clips = 300 * (2 if quick else 16), dataset.prefetch, []
    data = dataset.FbankDataset(fake_folder(folder, n, 300), "train")
    args = settings(data, "efficientnet-b0", 120)

    def host_side(work, steps, device):  # in the place of prefetch: no batch reaches the device's part
        clips.append(sum(len(d["x"]) for d, _ in prefetch(work, steps, device)))
        yield from ()

    rates, dataset.prefetch = {"the page cache": [], "cold pages": []}, host_side
    for epoch in range(1, 2 if quick else 6):
        for kind, rate in rates.items():
            for path in folder.glob("fbank-*.npy") if kind == "cold pages" else ():
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            took = seconds(list, dataset.batches(data, args, epoch, device))
            rate.append(clips[-1] / took)
    dataset.prefetch = prefetch
    for kind, rate in rates.items():
        row(f"reading at batch 120 from {kind}, clips/s (wanted: 3000)", statistics.median(rate))


# ------------------------------------------------------------------------------------------------- training steps


def ours(name, device, trains=True):
    torch._dynamo.reset()  # of one process it compiles the first eight models only
    model = models.build_model(name, CLASSES).to(device).train(trains).requires_grad_(trains)
    return models.wrap(model, argparse.Namespace(compile=True), device, trains)


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


def beside(row, what, B, took):
    """Rows of the first entry of took {name: seconds}, ours, beside each of the others, in clips/s."""
    (_, mine), *others = took.items()
    for label, t in others:
        row(what, B / mine, label, B / t, t / mine)
    if not others:
        row(what, B / mine)


def fake_batch(B, device):
    x, y = torch.randn(B, 1000, 128, device=device), torch.rand(B, CLASSES, device=device) < 0.02
    return x, y.float()


def training_step(model, forward, teachers=(), fused=True, precision=None, teacher_precision=None):
    """-> a function of a batch (x, y) that does one step: forward passes, loss, backward, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, train_teacher.BETAS, weight_decay=5e-7, fused=fused)

    def step(x, y):
        with torch.no_grad(), models.autocast(x.device, teacher_precision or precision):
            teacher_logits = [teacher(x) for teacher in teachers]
        with models.autocast(x.device, precision):
            z = forward(x)
        if teachers:
            loss, _, _ = distill.cmkd_loss(z, teacher_logits, y, "multi-label")
        else:
            loss = train_teacher.truth_loss(z.float(), y, "multi-label")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


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
    product, work = matrix_product(device)
    functions = {"product": product, "ours": partial(step, *batch)}
    if not name.startswith("hybrid"):
        label, other, forward = peer(name, device)
        functions[label] = partial(training_step(other, forward, fused=False), *batch)
        if device.type == "cuda":
            _, other, forward = peer(name, device)
            other.compile(dynamic=False)
            functions[f"{label}, compiled"] = partial(training_step(other, forward), *batch)
    took = in_turn(functions, rounds, device)
    rate, done = work / took.pop("product"), 3 * flops(name, batch[0]) / took["ours"]  # a step is three forward passes
    beside(row, f"{name}, training step at batch {B}, clips/s", B, took)
    row("  TFLOP/s, of a large matrix product's", done / 1e12, "matrix product", rate / 1e12, done / rate)


def bench_patchout(row, quick, device, folder):
    """A training step of an AST with PaSST's patchout, 474 of 1,190 tokens, beside our own without and Hugging Face's."""
    for name in ["ast-tiny"] if quick else ["ast-tiny", "ast-base"]:
        model, (label, other, forward) = ours(name, device), peer(name, device)
        keep = torch.from_numpy(dataset.draw_patches(np.random.default_rng(0), 1000, 4, 40)).to(device)
        steps = {"ours": training_step(model, partial(model, keep=keep)), "ours without": training_step(model, model)}
        steps[label] = training_step(other, forward, fused=False)
        steps_in_turn(f"{name}, patchout 4 40", steps, *sizes(name, quick, device), row, device)


def bench_precision(row, quick, device, folder):
    """A training step in bfloat16 beside float32 (on a GPU: TF32)."""
    for name in SMALLEST if quick else (*SMALLEST, "ast-base"):
        model = ours(name, device)
        steps = {p: training_step(model, model, precision=p) for p in ("bfloat16", "float32")}
        steps_in_turn(f"{name}, bfloat16", steps, *sizes(name, quick, device), row, device)


def steps_in_turn(what, steps, B, rounds, row, device):
    batch = fake_batch(B, device)
    took = in_turn({k: partial(step, *batch) for k, step in steps.items()}, rounds, device)
    beside(row, f"{what}, training step at batch {B}, clips/s", B, took)


def bench_kd(row, quick, device, folder):
    """A distillation step beside the student's alone: the smallest pair, and run_all.sh's, in both directions. The teacher's
    own forward pass: with the batch norms that models.wrap folds, and in bfloat16."""
    pairs = [SMALLEST, SMALLEST[::-1]]
    if not quick:
        pairs += [("efficientnet-b0", "ast-base"), ("ast-tiny", "efficientnet-b2")]
    for teacher_name, name in pairs:
        B, rounds = sizes(name, quick, device)
        model, teacher, whole = ours(name, device), ours(teacher_name, device, trains=False), ours(teacher_name, device)
        precise, rough = (training_step(model, model, [teacher], teacher_precision=p) for p in (None, "bfloat16"))
        steps = {"": precise, "its teacher in bfloat16": rough, "the student alone": training_step(model, model)}
        steps_in_turn(f"{teacher_name} -> {name}", steps, B, rounds, row, device)
        kinds = {"float32": (teacher, "float32"), "bfloat16": (teacher, "bfloat16"), "": (whole.eval(), "float32")}
        x, _ = fake_batch(B, device)
        took = in_turn({kind: partial(teach, x, *how) for kind, how in kinds.items()}, 3 * rounds, device)
        for kind in ("float32", "bfloat16"):
            what = f"  {teacher_name}'s forward pass, {kind}, clips/s"
            beside(row, what, B, {kind: took[kind], "not folded, float32": took[""]})


@torch.no_grad()
def teach(x, teacher, precision):
    with models.autocast(x.device, precision):
        teacher(x)


def bench_loop(row, quick, device, folder):
    """What the training loop adds to a step: reading, mixup, masks, noise, shift, the log of its losses and gradient norm."""
    on_gpu = device.type == "cuda"
    B, steps, rounds = (12, 20, 5) if on_gpu else (4, 1, 2) if quick else (12, 1, 7)
    data = dataset.FbankDataset(fake_folder(folder, 512, 1), "train")
    for place in ("disk", "the GPU") if on_gpu else ("disk",):
        if place == "the GPU":
            data.keep_on(device)
        for name in (*SMALLEST, "ast-base") if on_gpu else SMALLEST:
            args = settings(data, name, B)
            model, batch = ours(name, device), fake_batch(B, device)
            step, log = training_step(model, model), torch.zeros(1, train_teacher.COLUMNS_OF_LOG, device=device)
            epochs = (dataset.batches(data, args, epoch, device) for epoch in itertools.count(1))
            feed, run = itertools.chain.from_iterable(epochs), argparse.Namespace(model=model, names=[])

            def loop(feed=feed, step=step, log=log, run=run):
                for x, y, _, _ in itertools.islice(feed, steps):
                    step(x, y)
                    train_teacher.record(run, log, 0, {"loss": y.sum()})

            alone = lambda step=step, batch=batch: [step(*batch) for _ in range(steps)]
            took = in_turn({"loop": loop, "alone": alone}, rounds, device)
            a, b = (took[k] / steps for k in ("alone", "loop"))
            row(f"{name}, clips from {place}, the loop's step at batch {B}, s", b, "forward, backward, Adam", a, b / a)
            seeds = lambda: (
                np.random.default_rng([0, 1, 2]),
                torch.Generator(device).manual_seed(1),
                torch.manual_seed(1),
            )
            row("  of which seeding, share (at most 0.01)", in_turn({"": seeds}, 200, device)[""] / b)


def bench_hours(row, quick, device, folder):
    """What `run_all.sh fsd50k` would take for training, computed from the steps of its seven runs: 50 epochs of 36,796 clips."""
    on_gpu, hours = device.type == "cuda", 0
    b2, ast, cnns = "efficientnet-b2", "ast-base", ["efficientnet-b0", "densenet-121"]
    for name, teacher_names in [(m, []) for m in (*cnns, "ast-tiny", b2, ast)] + [(ast, cnns), (b2, ["ast-tiny"])]:
        B = 4 if not on_gpu else 12 if name.startswith("ast") else 24
        model, batch = ours(name, device), fake_batch(B, device)
        teachers = [ours(t, device, trains=False) for t in teacher_names]
        step = partial(training_step(model, model, teachers), *batch)
        took = in_turn({"": step}, 20 if on_gpu else 1, device)[""]
        hours += 36_796 * 50 / B * took / 3600
        row(" + ".join(teacher_names) + " -> " * bool(teacher_names) + f"{name}, clips/s at batch {B}", B / took)
    row("run_all.sh fsd50k, hours of training, computed", hours)


def bench_scores(row, quick, device, folder):
    """evaluate.scores, which adds the per-class table, against scikit-learn's two macro averages."""
    for n, classes, most in ((10231, 200, 3), (20371, 527, 15)):
        n, classes = (n // 10, classes // 10) if quick else (n, classes)
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
    device, rows = models.setup(a.device), []

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
