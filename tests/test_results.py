"""README's table of real audio is what the logs in tests/results/ say, and the script that made them still can."""

import itertools
import json
import re

import real_audio
from conftest import ROOT


def test_readmes_table_is_recomputed_from_the_logs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(part in readme for part in real_audio.table())


def test_the_logs_are_of_whole_runs_with_the_settings_that_the_script_has():
    folders = {"": real_audio.RUNS, "float32": real_audio.AGAIN, "gpu": real_audio.GPU}
    paths = [sorted((real_audio.RESULTS / folder).glob("*-fold?-s?/args.json")) for folder in folders]
    again = sum(len(real_audio.again(f, s)) for f, s in itertools.product(real_audio.FOLDS, real_audio.SEEDS))
    assert [*map(len, paths)] == [len(real_audio.RUNS) * len(real_audio.FOLDS), again, 4 * 5 * 2]
    for path, runs in ((p, r) for ps, r in zip(paths, folders.values(), strict=True) for p in ps):
        args, log = json.loads(path.read_text()), (path.parent / "log.jsonl").read_text().splitlines()
        name, fold, seed = re.fullmatch(r"(.*)-fold(\d)-s(\d)", path.parent.name).groups()
        flags, teacher = runs[name]
        assert (len(log), args["fold"], args["seed"]) == (args["epochs"], int(fold), int(seed))
        metrics = json.loads((path.parent / "metrics-last-eval.json").read_text())
        assert (metrics["clips"], metrics["fold"], metrics["epoch"]) == (400, int(fold), args["epochs"])
        of_seed = seed if runs is real_audio.GPU else 0
        expected = [f"{teacher}-fold{fold}-s{of_seed}"] if teacher else []
        assert [t.split("/")[-2] for t in args.get("teacher", [])] == expected
        check_settings(flags, args)


def test_the_logs_of_the_mixtures_are_of_whole_runs_with_the_settings_that_the_script_has():
    paths = sorted((real_audio.RESULTS / "gpu" / "mini").glob("*/args.json"))
    names = {f"{name}-s{seed}": (name, seed) for name in real_audio.MINI for seed in real_audio.GPU_SEEDS}
    assert [path.parent.name for path in paths] == sorted(names)
    for path in paths:
        args, (name, seed) = json.loads(path.read_text()), names[path.parent.name]
        flags, teacher = real_audio.MINI[name]
        expected = [[f"{teacher}-s{seed}", "best.pt"]] if teacher else []
        assert [t.split("/")[-2:] for t in args.get("teacher", [])] == expected
        check_settings(flags, args)
        metrics = json.loads((path.parent / "metrics-best-eval.json").read_text())
        assert (metrics["clips"], metrics["seed"], metrics["task"]) == (800, seed, "multi-label")
        log = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
        assert len(log) == args["epochs"] and max(e["val_score"] for e in log) == metrics["val_score"]


def check_settings(flags, args):
    for flag, *values in (part.split() for part in flags.split("--")[1:]):
        have = args[flag.replace("-", "_")]
        if flag != "pretrained":
            assert [*map(plain, values or ["1"])] == [*map(plain, have if isinstance(have, list) else [have])], flag


def plain(value):
    try:
        return float(value)
    except ValueError:
        return str(value)


def test_gain_and_spread_by_hand():
    assert real_audio.spread([1.0, 2.0, 6.0]) == "3.0 ± 2.6"
    assert (
        real_audio.gain([1.0, 2.0, 6.0], [2.0, 4.0, 9.0]) == "+2.0 ± 0.6"
    )  # 1, 2 and 3: deviation 1, by the root of 3
