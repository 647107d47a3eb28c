"""README's table of real audio is what the logs in tests/results/ say, and the script that made them still can."""

import itertools
import re

import real_audio
from conftest import ROOT


def test_readmes_table_is_recomputed_from_the_logs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(part in readme for part in real_audio.table())


def test_the_logs_are_of_whole_runs_with_the_settings_that_the_script_has():
    again = sum(len(real_audio.again(f, s)) for f, s in itertools.product(real_audio.FOLDS, real_audio.SEEDS))
    for bed, runs, count in (
        ("", real_audio.RUNS, 5 * len(real_audio.RUNS)),
        ("float32", real_audio.AGAIN, again),
        ("gpu", real_audio.GPU, 5 * len(real_audio.GPU) * len(real_audio.GPU_SEEDS)),
    ):
        settings, logs, scores = files(bed, "args.json", "log.jsonl", "metrics-last-eval.json")
        assert len(settings) == count and settings.keys() == logs.keys() <= scores.keys()
        for run, args in settings.items():
            name, fold, seed = re.fullmatch(r"(.*)-fold(\d)-s(\d)", run).groups()
            flags, teacher = runs[name]
            assert (len(logs[run]), args["fold"], args["seed"]) == (args["epochs"], int(fold), int(seed))
            metrics = scores[run]
            assert (metrics["clips"], metrics["fold"], metrics["epoch"]) == (400, int(fold), args["epochs"])
            expected = [f"{teacher}-fold{fold}-s{seed if bed == 'gpu' else 0}"] if teacher else []
            assert [t.split("/")[-2] for t in args.get("teacher", [])] == expected
            check_settings(flags, args)


def test_the_logs_of_the_mixtures_are_of_whole_runs_with_the_settings_that_the_script_has():
    settings, logs, scores = files("gpu/mini", "args.json", "log.jsonl", "metrics-best-eval.json")
    names = {f"{name}-s{seed}": (name, seed) for name in real_audio.MINI for seed in real_audio.GPU_SEEDS}
    assert settings.keys() == logs.keys() == scores.keys() == names.keys()
    for run, args in settings.items():
        name, seed = names[run]
        flags, teacher = real_audio.MINI[name]
        expected = [[f"{teacher}-s{seed}", "best.pt"]] if teacher else []
        assert [t.split("/")[-2:] for t in args.get("teacher", [])] == expected
        check_settings(flags, args)
        metrics = scores[run]
        assert (metrics["clips"], metrics["seed"], metrics["task"]) == (800, seed, "multi-label")
        assert len(logs[run]) == args["epochs"] and max(e["val_score"] for e in logs[run]) == metrics["val_score"]


def test_collect_adds_a_run_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(real_audio, "RESULTS", tmp_path / "results")
    real_audio.read.cache_clear()
    for run in ("b", "a"):
        (tmp_path / run / "bed" / run).mkdir(parents=True)
        (tmp_path / run / "bed" / run / "args.json").write_text(f'{{"seed": "{run}"}}')
        (tmp_path / run / "bed" / run / "log.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
        real_audio.collect(tmp_path / run)
        real_audio.read.cache_clear()
    settings, logs = (real_audio.read(tmp_path / "results" / "bed" / name) for name in ("args.json", "log.jsonl"))
    assert settings == {"a": {"seed": "a"}, "b": {"seed": "b"}}
    assert logs == {"a": [{"epoch": 1}, {"epoch": 2}], "b": [{"epoch": 1}, {"epoch": 2}]}


def files(bed, *names):
    return (real_audio.read(real_audio.RESULTS / bed / name) for name in names)


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
