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
    paths = [sorted(folder.glob("*-s?/args.json")) for folder in (real_audio.RESULTS, real_audio.RESULTS / "float32")]
    again = sum(len(real_audio.again(f, s)) for f, s in itertools.product(real_audio.FOLDS, real_audio.SEEDS))
    assert [*map(len, paths)] == [len(real_audio.RUNS) * len(real_audio.FOLDS), again]
    for path in itertools.chain(*paths):
        args, log = json.loads(path.read_text()), (path.parent / "log.jsonl").read_text().splitlines()
        name, fold, seed = re.fullmatch(r"(.*)-fold(\d)-s(\d)", path.parent.name).groups()
        flags, teacher = (real_audio.AGAIN if path.parents[1].name == "float32" else real_audio.RUNS)[name]
        assert (len(log), args["fold"], args["seed"]) == (args["epochs"], int(fold), int(seed))
        metrics = json.loads((path.parent / "metrics-last-eval.json").read_text())
        assert (metrics["clips"], metrics["fold"], metrics["epoch"]) == (400, int(fold), args["epochs"])
        assert [t.split("/")[-2] for t in args.get("teacher", [])] == ([f"{teacher}-fold{fold}-s0"] if teacher else [])
        check_settings(flags, args)


def test_the_logs_of_the_mixtures_are_of_whole_runs_with_the_settings_that_the_script_has():
    paths = sorted((real_audio.RESULTS / "mini").glob("*-s0/args.json"))
    assert [path.parent.name for path in paths] == sorted(f"{name}-s0" for name in real_audio.MINI)
    for path in paths:
        args, (flags, teacher) = json.loads(path.read_text()), real_audio.MINI[path.parent.name.removesuffix("-s0")]
        assert [t.split("/")[-2:] for t in args.get("teacher", [])] == (
            [[f"{teacher}-s0", "best.pt"]] if teacher else []
        )
        check_settings(flags, args)
        metrics = json.loads((path.parent / "metrics-best-eval.json").read_text())
        assert (metrics["clips"], metrics["seed"], metrics["task"]) == (800, 0, "multi-label")
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
