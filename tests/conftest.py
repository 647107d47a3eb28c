import contextlib
import importlib
import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import soundfile

os.environ["OMP_NUM_THREADS"] = "1"  # as fast at these sizes, and many times faster where something else runs
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import models
import prep_data


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; only run by -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


KINDS = ("high", "low", "noise")


def command(script, *args, ok=True, **options):
    """Run a script as a user does; -> its output. `ok=False`: it must stop with one sentence and no traceback."""
    line = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=600, **options)
    if ok:
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    return said[0]


def inside(script, *args):
    """The same without a new process, which takes five seconds to start: -> its output, or the error it stops with."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(said):
            models.command_line(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as stop:
        if stop.code:
            assert stop.code.startswith("error: "), stop.code
            return stop.code
    finally:
        sys.argv = argv
        for folder in list(prep_data.LOCKS):  # as the end of a process does
            prep_data.unlock(folder)
    return said.getvalue()


def write_clips(folder, counts, multi):
    """Clips of about 1 s of three kinds of sound, and their table. Multi-label clips hold one or two kinds."""
    rng, rows = np.random.default_rng(0), []
    t = np.arange(16000) / 16000
    sounds = {
        "high": np.sin(2 * np.pi * 3000 * t),
        "low": np.sin(2 * np.pi * 250 * t),
        "noise": rng.standard_normal(16000) / 3,
    }
    (folder / "audio").mkdir(parents=True)
    for split, count in counts.items():
        for i in range(count):
            kinds = sorted(rng.choice(KINDS, rng.integers(1, 3) if multi else 1, replace=False))
            n = int(rng.integers(9000, 16000))
            x = 0.2 * sum(sounds[k][:n] for k in kinds) * rng.uniform(0.3, 1) + 0.01 * rng.standard_normal(n)
            soundfile.write(folder / "audio" / f"{split} {i}.wav", x, 16000)
            rows.append(f"audio/{split} {i}.wav,{';'.join(kinds)},{split}")
    key = "fold" if next(iter(counts)).isdecimal() else "split"
    (folder / "clips.csv").write_text(f"path,labels,{key}\n" + "\n".join(rows) + "\n")
    return folder / "clips.csv"


def prepared(tmp_path_factory, name, counts, multi):
    folder = tmp_path_factory.mktemp(name)
    table = write_clips(folder / "raw audio", counts, multi)
    command("prep_data.py", "csv", "--root", table, "--out", folder / name, "--clip-seconds", 1, "--workers", 1)
    return folder / name


@pytest.fixture(scope="session")
def multi(tmp_path_factory):
    """A prepared multi-label folder: 48 / 12 / 14 clips of 1 s, three classes."""
    return prepared(tmp_path_factory, "multi", {"train": 48, "val": 12, "eval": 14}, True)


@pytest.fixture(scope="session")
def folds(tmp_path_factory):
    """A prepared single-label folder with three folds of 16 clips."""
    return prepared(tmp_path_factory, "folds", {"1": 16, "2": 16, "3": 16}, False)
