"""run_all.sh: what it calls, in which order, with a stand-in for Python that leaves the files a stage would."""

import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT

STAND_IN = r"""#!/usr/bin/env bash
script=$(basename "$1"); shift
echo "$script $*" >> "$LOG"
out=
while [ $# -gt 0 ]; do
  case $1 in
    --out | --average) out=$2 ;;
    --ckpt) ckpt=$2 ; out=$(dirname "$2") ;;
  esac
  shift
done
[ "$script" != "${BREAK:-}" ] || exit 7
sleep 0.01  # files of later stages are newer
mkdir -p "$out"
case $script in
  prep_data.py) echo {} > "$out/stats.json" ;;
  train_teacher.py | distill.py) [ -f "$out/last.pt" ] || touch "$out"/{best,ep-01,last}.pt ;;
  evaluate.py) if [ -n "${ckpt:-}" ]; then touch "$out/metrics-$(basename "$ckpt" .pt)-eval.json"; else rm -f "$out"/ep-*; touch "$out/wa.pt"; fi ;;
esac
"""


@pytest.fixture
def run_all(tmp_path):
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)

    def run(*args, **knobs):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        env = {k: v for k, v in os.environ.items() if k not in ("SEEDS", "FOLDS", "EPOCHS", "GPUS")}
        env |= {"PYTHON": str(tmp_path / "python"), "LOG": str(log), **knobs}
        line = ["bash", ROOT / "run_all.sh", *args]
        done = subprocess.run(line, check=False, capture_output=True, text=True, cwd=tmp_path, env=env)
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def runs(calls):
    """The runs that were trained, in order, and their teachers."""
    found = []
    for call in calls:
        script, *flags = call.split(" ")
        if script in ("train_teacher.py", "distill.py"):
            out = flags[flags.index("--out") + 1]
            teachers = [f.split("/")[-2] for f in flags if f.endswith("/best.pt")] if script == "distill.py" else []
            found.append((out, teachers))
    return found


def test_fsd50k_defaults_are_the_papers_best(run_all):
    done, calls = run_all("fsd50k", ROOT="/my data")
    assert done.returncode == 0, done.stderr
    assert calls[0] == "prep_data.py fsd50k --out data/fsd50k --root /my data"
    exp = "exp/fsd50k"
    assert runs(calls) == [
        (f"{exp}/efficientnet-b0-s0", []),
        (f"{exp}/densenet-121-s0", []),
        (f"{exp}/ast-tiny-s0", []),
        (f"{exp}/efficientnet-b2-s0", []),
        (f"{exp}/ast-base-s0", []),
        (f"{exp}/ast-base-from-efficientnet-b0+densenet-121-s0", ["efficientnet-b0-s0", "densenet-121-s0"]),
        (f"{exp}/efficientnet-b2-from-ast-tiny-s0", ["ast-tiny-s0"]),
    ]
    assert sum(c.startswith("evaluate.py --average") for c in calls) == 7
    assert sum(c.startswith("evaluate.py --ckpt") for c in calls) == 14  # best and wa
    assert calls[-1] == "evaluate.py --summary exp/fsd50k"
    done, again = run_all("fsd50k")
    assert done.returncode == 0 and len(again) == 7 + 1  # each training says that it is done; and the summary


def test_seeds_folds_and_knobs(run_all):
    knobs = {
        "SEEDS": "0 1",
        "FOLDS": "1 3",
        "CNN": "timm:x",
        "AST": "ast-tiny",
        "BASELINES": "0",
        "EPOCHS": "2",
        "LR_AST": "1e-3",
    }
    done, calls = run_all("esc10", **knobs, PRETRAINED_CNN="a b.pth", EXP="my exp", ROOT="r")
    assert done.returncode == 0, done.stderr
    trained = [c for c in calls if c.startswith(("train", "distill"))]
    assert len(trained) == 2 * 2 * 4
    assert (
        f"--teacher {'my exp'}/timm-x-fold1-s0/best.pt" in trained[2]
        and "--fold 1" in trained[2]
        and "--lr 1e-3" in trained[2]
    )
    assert "--pretrained a b.pth" in trained[0] and "--pretrained" not in trained[1] and "--epochs 2" in trained[0]
    ensembles = [c for c in calls if c.count("wa.pt") == 2]
    assert len(ensembles) == 2 * 4  # each fold's four settings
    assert "my exp/ast-tiny-from-timm-x-fold3-s0/wa.pt my exp/ast-tiny-from-timm-x-fold3-s1/wa.pt" in " ".join(
        ensembles
    )


def test_audioset_bal_shares_the_prepared_folder(run_all):
    done, calls = run_all("audioset-bal", ROOT="r")
    assert done.returncode == 0, done.stderr
    assert calls[0] == "prep_data.py audioset --out data/audioset --root r"
    assert [r[0] for r in runs(calls)][:2] == ["exp/audioset-bal/efficientnet-b2-s0", "exp/audioset-bal/ast-base-s0"]
    assert all("--recipe audioset-bal" in c for c in calls if c.startswith(("train", "distill")))


def test_the_first_failure_stops_it_with_the_stage_and_code(run_all):
    done, calls = run_all("demo", BREAK="distill.py")
    assert done.returncode == 7 and "stage 'distill exp/demo/ast-tiny-from-timm-resnet10t-s0' failed" in done.stderr
    assert calls[-1].startswith("distill.py")
    done, calls = run_all("demo")  # the same command goes on
    assert done.returncode == 0 and sum(c.startswith("evaluate.py --average") for c in calls) == 2


@pytest.mark.parametrize("args", [[], ["fsd51k"], ["demo", "esc10"]])
def test_usage(run_all, args):
    done, calls = run_all(*args)
    assert done.returncode == 2 and not calls and ("bash run_all.sh demo" in done.stdout or args[0] in done.stderr)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_reaches_the_stage(tmp_path, sent):
    stage = """#!/usr/bin/env bash
trap 'echo saved > saved; exit 143' TERM
touch started
while true; do sleep 0.1; done
"""
    (tmp_path / "python").write_text(stage)
    (tmp_path / "python").chmod(0o755)
    # a process started in the background ignores SIGINT, and a script below it could not trap it
    line = ["env", "--default-signal=INT", "bash", ROOT / "run_all.sh", "demo"]
    env = os.environ | {"PYTHON": str(tmp_path / "python")}
    run = subprocess.Popen(line, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    run.send_signal(sent)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 143 and (tmp_path / "saved").exists() and "the same command goes on" in errors
