import contextlib
import importlib
import io
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings

import numpy as np
import pytest
import soundfile

os.environ["OMP_NUM_THREADS"] = "1"  # as fast at these sizes, and many times faster where something else runs
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")  # tests of the CPU fork: they do not see a GPU
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import timm

import dataset
import evaluate
import models

os.fsync = lambda _: None  # nobody pulls the plug on a test: a third of the time of a toy run


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; only run by -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


# ------------------------------------------------------------------------------------------------ starting scripts


def command(script, *args, ok=True, **options):
    """Run a script as a user does; -> its output. `ok=False`: it must stop with one sentence and no traceback."""
    line = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(line, check=False, capture_output=True, text=True, timeout=600, **options)
    if ok:
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def inside(script, *args):
    """The same without a new process, which takes five seconds to start: -> its output, or the error it stops with."""
    output, argv = io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(output):
            models.command_line(importlib.import_module(script.removesuffix(".py")).main)
    except SystemExit as stop:
        if stop.code:
            assert str(stop.code).startswith("error: "), stop.code
            return stop.code
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for folder in list(dataset.LOCKS):  # as the end of a process does
            dataset.unlock(folder)
    return output.getvalue()


def forked(script, *args, kill_after=None, before=lambda: None, env=None, wait=True):
    """Run a script in a forked process, which saves its imports: -> (exit code, what it wrote). Killed with all its
    children after `kill_after` s, if it still runs. With wait=False -> (process id, file of what it writes)."""
    main = importlib.import_module(script.removesuffix(".py")).main  # imported once, not in every child
    descriptor, path = tempfile.mkstemp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads: none of this process's holds a lock
        child = os.fork()
    if not child:
        code = 70
        try:
            os.setpgid(0, 0)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            os.environ.update(env or {})
            sys.argv = [script, *map(str, args)]
            if kill_after is not None:
                threading.Timer(kill_after, os.killpg, (0, signal.SIGKILL)).start()
            before()
            models.command_line(main)
            code = 0
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            code = 1 if isinstance(stop.code, str) else stop.code or 0
        finally:
            if code == 70:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(descriptor)
    return ended(child, path) if wait else (child, path)


def ended(child, path):
    """Wait for a forked process: -> (exit code, what it wrote)."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, taken(path)


def taken(path):
    text = pathlib.Path(path).read_text(errors="replace")
    os.unlink(path)
    return text


def in_ranks(script, *args, n=2, before=lambda rank: None, kill=True):
    """Run a script in n forked processes with the environment that torchrun gives them: -> [(exit code, output)] by rank.
    When one fails, the others are killed, as torchrun does, or have to end by themselves (kill=False)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    children = {}
    for r in range(n):
        rank_env = env | {"RANK": str(r), "LOCAL_RANK": str(r)}
        child, path = forked(script, *args, env=rank_env, wait=False, before=lambda r=r: before(r))
        children[child] = (r, path)
    found = {}
    while children:
        child, status = os.waitpid(-1, 0)
        r, path = children.pop(child)
        found[r] = os.waitstatus_to_exitcode(status), taken(path)
        for other in children if status and kill else []:
            os.kill(other, signal.SIGKILL)
    return [found[r] for r in range(n)]


# ---------------------------------------------------------------------------------------------- tiny models and clips

CNN = "timm:toy_efficientnet"  # 9,000 parameters, with stochastic depth; a process that pytest did not fork knows timm's only:
TIMM_CNN = "timm:test_efficientnet"
AST = "ast-toy"  # two blocks of width 64, where the `toy` fixture is used; ast-tiny is the smallest real one
HYBRID = "hybrid-toy"  # that CNN under PSLA's attention heads, there too


@timm.models.register_model
def toy_efficientnet(in_chans=3, num_classes=1000, global_pool="avg", drop_path_rate=0.0, **_):
    blocks = timm.models._efficientnet_builder.decode_arch_def([["cn_r1_k3_s2_e1_c8"], ["er_r2_k3_s2_e2_c16"]])
    head = {"num_features": 64, "num_classes": num_classes, "global_pool": global_pool}
    return timm.models.EfficientNet(blocks, stem_size=8, in_chans=in_chans, drop_path_rate=drop_path_rate, **head)


@timm.models.register_model
def deit_toy_distilled(num_classes=1000, **_):
    size = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return timm.models.deit.VisionTransformerDistilled(num_classes=num_classes, **size)


@pytest.fixture(scope="module")
def toy():
    """AST and HYBRID name models in this process and in forked ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, AST, ("ast", "deit_toy_distilled"))
        patch.setitem(models.MODELS, HYBRID, ("hybrid", CNN.removeprefix("timm:")))
        yield


SAVE_FIGURE = evaluate.save_figure


@pytest.fixture(scope="module")
def undrawn():
    """Figures are made but not rendered, which takes most of the time of scoring; but they are within `drawn()`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "save_figure", lambda fig, *paths, dpi=0: None)
        yield


@contextlib.contextmanager
def drawn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "save_figure", SAVE_FIGURE)
        yield


KINDS = ("high", "low", "noise")


def write_clips(folder, counts, multi, seconds=1):
    """Clips of 0.56 to 1 of so many seconds of three kinds of sound, and their table. Multi-label clips hold one or two."""
    rng, rows, longest = np.random.default_rng(0), [], round(16000 * seconds)
    t = np.arange(longest) / 16000
    sounds = {
        "high": np.sin(2 * np.pi * 3000 * t),
        "low": np.sin(2 * np.pi * 250 * t),
        "noise": rng.standard_normal(longest) / 3,
    }
    (folder / "audio").mkdir(parents=True)
    for split, count in counts.items():
        for i in range(count):
            kinds = sorted(rng.choice(KINDS, rng.integers(1, 3) if multi else 1, replace=False))
            n = int(rng.integers(0.5625 * longest, longest))
            x = 0.2 * sum(sounds[k][:n] for k in kinds) * rng.uniform(0.3, 1) + 0.01 * rng.standard_normal(n)
            soundfile.write(folder / "audio" / f"{split} {i}.wav", x, 16000)
            rows.append(f"audio/{split} {i}.wav,{';'.join(kinds)},{split}")
    key = "fold" if next(iter(counts)).isdecimal() else "split"
    (folder / "clips.csv").write_text(f"path,labels,{key}\n" + "\n".join(rows) + "\n")
    return folder / "clips.csv"


def write_prepared(folder, counts, multi, n_frames=30, source="csv", classes=KINDS, labels=None, shard=512):
    """A prepared folder, as prep_data.py writes one: {split or fold: clips} of log-mels of up to n_frames, some shorter.

    Each class is a band of mel bins of its own, the last one is noise; labels(rng) -> a clip's class indices.
    """
    folder.mkdir(parents=True)
    rng, rows, mels = np.random.default_rng(len(counts)), [], []
    draw = labels or (lambda rng: sorted(rng.choice(len(classes), rng.integers(1, 3) if multi else 1, replace=False)))
    for split, count in counts.items():
        for i in range(count):
            own, n = draw(rng), int(rng.integers(n_frames * 2 // 3, n_frames + 1))
            x = rng.normal(-10, 1, (n, 128))
            for k in own:
                sound = np.full((n, 128), -20.0)
                if k == len(classes) - 1:
                    sound[:] = rng.normal(-6, 2, sound.shape)
                else:
                    sound[:, 16 + 24 * k : 28 + 24 * k] = rng.normal(-2, 1)
                x = np.logaddexp(x, sound + rng.uniform(-2, 0))
            x = x.astype(np.float16)
            mean, var = x.astype(np.float64).mean(), x.astype(np.float64).var()
            place = (split, "") if not split.isdecimal() else ("", split)
            cells = (len(rows), f"{split}-{i}", f"/nowhere/{split}-{i}.wav", *place, ";".join(map(str, own)), n)
            rows.append((*cells, mean, var))
            mels.append(np.pad(x, ((0, n_frames - n), (0, 0))))
    dataset.write_csv(folder / "clips.csv", dataset.CLIP_COLUMNS, rows)
    dataset.write_csv(
        folder / "classes.csv", ["index", "mid", "display_name"], [(i, name, name) for i, name in enumerate(classes)]
    )
    for s in range(0, len(mels), shard):
        np.save(folder / f"fbank-{s // shard:05d}.npy", np.stack(mels[s : s + shard]))
    stats = {
        "version": dataset.VERSION, "source": source, "task": "multi-label" if multi else "single-label",
        "sample_rate": 16000, "n_mels": 128, "n_frames": n_frames, "shard": shard,
        "crc32": [dataset.crc32(p) for p in sorted(folder.glob("fbank-*.npy"))],
        "tables": {name: dataset.crc32(folder / name) for name in ("classes.csv", "clips.csv")},
    }  # fmt: skip
    dataset.write_json(folder / "stats.json", stats)
    return folder


@pytest.fixture(scope="session")
def multi(tmp_path_factory):
    """A prepared multi-label folder: 48 / 12 / 14 clips of 0.3 s (30 frames), three classes."""
    return write_prepared(tmp_path_factory.mktemp("multi") / "multi", {"train": 48, "val": 12, "eval": 14}, True)


@pytest.fixture(scope="session")
def folds(tmp_path_factory):
    """A prepared single-label folder with three folds of 16 clips of 0.3 s."""
    return write_prepared(tmp_path_factory.mktemp("folds") / "folds", {"1": 16, "2": 16, "3": 16}, False)
