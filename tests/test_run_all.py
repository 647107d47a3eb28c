"""run_all.sh: what it calls, in which order, with a stand-in for Python that leaves the files a stage would."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT

HEADER = (ROOT / "run_all.sh").read_text().split("set -euo")[0].split("# Knobs")[1]
KNOBS = re.findall("[A-Z_]+", " ".join(re.findall(r"^#   ((?:[A-Z_]+(?:, )?)+) ", HEADER, re.MULTILINE)))
STAND_IN = r"""#!/usr/bin/env bash
(IFS=$'\t'; echo "$*" >>"$LOG")
while [[ $1 != *.py ]]; do shift; done # of torchrun
script=${1##*/} out= ckpt=; shift
while [ $# -gt 0 ]; do
  case $1 in
    --out | --average) out=$2 ;;
    --ckpt)
      ckpt=${2##*/} out=${2%/*} members=("${@:2}")
      [ $# -eq 2 ] || out=${out%/*}/ensemble-$(basename "${out%-s*}") ;; # as evaluate.py names it
  esac
  shift
done
[ "$script" != "${BREAK:-}" ] || exit 7
[ -z "${BARE:-}" ] || exit 0 # leaves nothing
sleep 0.005 # files of later stages are newer
[ -d "$out" ] || mkdir -p "$out"
case $script in
  prep_data.py) echo {} >"$out/stats.json" ;;
  train_teacher.py | distill.py) [ -f "$out/last.pt" ] || for f in best ep-00 ep-01 last; do : >"$out/$f.pt"; done ;;
  evaluate.py)
    if [ -n "$ckpt" ]; then printf '  "%s",\n' "${members[@]}" >"$out/metrics-${ckpt%.pt}-eval.json"; else
      [ -n "${KEPT:-}" ] || rm -f "$out"/ep-*
      [ -n "${NO_AVERAGE:-}" ] || : >"$out/wa.pt"
    fi ;;
esac
"""


@pytest.fixture
def run_all(tmp_path):
    """run_all(DATA, KNOB=...) -> (the finished process, its command lines: [script, flag, ...])"""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)

    def run(*args, script=ROOT / "run_all.sh", **knobs):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        env = {k: v for k, v in os.environ.items() if k not in KNOBS}
        env |= {"PYTHON": str(tmp_path / "python"), "LOG": str(log), **knobs}
        line = ["bash", script, *args]
        done = subprocess.run(line, check=False, capture_output=True, text=True, cwd=tmp_path, env=env)
        lines = log.read_text().splitlines() if log.exists() else []
        return done, [line.replace(f"{ROOT}/", "").split("\t") for line in lines]

    return run


def training(calls):
    return [c for c in calls if c[0] in ("train_teacher.py", "distill.py")]


def after(call, flag, n=1):
    """The value of a flag, or its n values; None without it."""
    if flag not in call:
        return None
    values = call[call.index(flag) + 1 :][:n]
    return values if n > 1 else values[0]


def runs(calls):
    """The runs that were trained, in order, and their teachers."""
    own = lambda c: [t.split("/")[-2] for t in c if t.endswith("/best.pt")] if c[0] == "distill.py" else []
    return [(after(c, "--out"), own(c)) for c in training(calls)]


def stages(calls, run):
    """What was done with a run after its training: the first flag and the file, in order."""
    return [" ".join(c[1:]).replace(f"{run}/", "") for c in calls if c[0] == "evaluate.py" and run in c[2]]


def test_fsd50k_defaults_are_the_papers_best(run_all):
    done, calls = run_all("fsd50k", ROOT="/my data")
    assert done.returncode == 0, done.stderr
    assert calls[0] == ["prep_data.py", "fsd50k", "--out", "data/fsd50k", "--root", "/my data"]
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
    assert training(calls)[0] == [
        *("train_teacher.py", "--data", "data/fsd50k", "--model", "efficientnet-b0"),
        *("--seed", "0", "--out", f"{exp}/efficientnet-b0-s0"),
    ]  # and nothing else: the recipe table decides
    for run, _ in runs(calls):  # averaged, then scored
        assert stages(calls, run) == [f"--average {run}", "--ckpt best.pt", "--ckpt wa.pt"]
    assert calls[-1] == ["evaluate.py", "--summary", exp] and not [c for c in calls if len(c) > 3 and "--ckpt" in c]
    done, again = run_all("fsd50k")
    assert done.returncode == 0 and len(again) == 7 + 1  # each training says that it is done; and the summary


def test_an_average_that_was_killed_while_it_pruned_is_called_again(run_all, tmp_path):
    run_all("esc50", KEPT="1", ROOT="r", FOLDS="1", BASELINES="0")
    run = "exp/esc50/efficientnet-b2-fold1-s0"
    assert not [c for c in run_all("esc50", FOLDS="1", BASELINES="0")[1] if "--average" in c]
    (tmp_path / run / "ep-00.pt").unlink()
    assert [c for c in run_all("esc50", FOLDS="1", BASELINES="0")[1] if "--average" in c] == [
        ["evaluate.py", "--average", run]
    ]


def test_brackets_in_a_name_are_letters(run_all, tmp_path):
    (tmp_path / "b [1]").mkdir()
    (tmp_path / "b [1]" / "stats.json").write_text("{}")
    done, calls = run_all("b [1]")
    assert done.returncode == 0, done.stderr
    assert stages(calls, "exp/b [1]/ast-base-s0") == [
        "--average exp/b [1]/ast-base-s0",
        "--ckpt best.pt",
        "--ckpt wa.pt",
    ]


def test_after_a_run_with_kept_epochs_only_the_rest_is_done(run_all):
    """README's first block keeps epochs; `SEEDS="0 1 2" bash run_all.sh fsd50k` follows it."""
    _, first = run_all("fsd50k", KEEP_EPOCHS="1", KEPT="1", BASELINES="0", ROOT="r")
    assert all(c[-1] == "--keep-epochs" for c in training(first))
    done, calls = run_all("fsd50k", SEEDS="0 1 2", ROOT="r")
    assert done.returncode == 0, done.stderr
    scored = [c for c in calls if c[:2] in (["evaluate.py", "--average"], ["evaluate.py", "--ckpt"]) and len(c) == 3]
    of_seed_0 = {c[2].split("/")[2] for c in scored if "-s0" in c[2]}
    assert of_seed_0 == {"efficientnet-b2-s0", "ast-base-s0"}  # the baselines, which were left out
    assert len(scored) == 3 * (2 + 7 + 7)
    together = [c[2:] for c in calls if len(c) == 5]
    assert len(together) == 7 and [f"exp/fsd50k/ast-base-s{s}/wa.pt" for s in range(3)] in together
    _, again = run_all("fsd50k", SEEDS="0 1 2", ROOT="r")
    assert again == [
        *training(again),
        ["evaluate.py", "--summary", "exp/fsd50k"],
    ]  # ensembles are not scored again either


def test_where_nothing_is_averaged_the_last_epoch_is_scored(run_all):
    done, calls = run_all("esc50", ROOT="r", NO_AVERAGE="1", SEEDS="0 1", FOLDS="2")
    assert done.returncode == 0, done.stderr
    run = "exp/esc50/ast-base-fold2-s1"
    assert stages(calls, run) == [f"--average {run}", "--ckpt best.pt"]  # best.pt is the last epoch there
    ensembles = [c[2:] for c in calls if c[1] == "--ckpt" and len(c) == 4]
    assert len(ensembles) == 4 and all(m.endswith("/best.pt") for c in ensembles for m in c)


def test_seeds_and_folds(run_all):
    done, calls = run_all("esc10", SEEDS="0 1", CNN="timm:x", AST="ast-tiny", EXP="my exp", ROOT="r", FOLDS="1 3")
    assert done.returncode == 0, done.stderr
    trained = training(calls)
    assert [(after(c, "--fold"), after(c, "--seed")) for c in trained[::4]] == [
        ("1", "0"),
        ("1", "1"),
        ("3", "0"),
        ("3", "1"),
    ]
    assert len(trained) == 4 * 4 and after(trained[2], "--teacher") == "my exp/timm-x-fold1-s0/best.pt"
    assert after(trained[0], "--model") == "timm:x" and after(trained[0], "--out") == "my exp/timm-x-fold1-s0"
    ensembles = [c[2:] for c in calls if len(c) == 4 and c[1] == "--ckpt"]
    assert len(ensembles) == 2 * 4  # each fold's four settings
    assert [f"my exp/ast-tiny-from-timm-x-fold3-s{s}/wa.pt" for s in range(2)] in ensembles
    done, calls = run_all("esc10", BARE="1")  # without the knob: five folds
    assert [after(c, "--fold") for c in training(calls)[::4]] == list("12345")


def test_an_ensemble_of_other_seeds_is_scored_anew(run_all):
    """Seed 2 was trained, by another job, before the ensemble of seeds 0 and 1 was scored."""
    together = lambda calls: [[m[-7] for m in c[2:]] for c in calls if len(c) > 3 and c[1] == "--ckpt"]
    knobs = {"ROOT": "r", "EXP": "./my exp", "BASELINES": "0", "CNN": "timm:x", "AST": "ast-tiny"}
    assert not together(run_all("fsd50k", SEEDS="2", **knobs)[1])
    for seeds in ("0 1", "0 1 2", "2 1"):
        assert together(run_all("fsd50k", SEEDS=seeds, **knobs)[1]) == [seeds.split()] * 4
        assert not together(run_all("fsd50k", SEEDS=seeds, **knobs)[1])


def test_every_knob_reaches_the_commands_that_it_is_for(run_all):
    """One run of the CNN, the AST and their teachers with every knob set: which commands have the flag, and which have not."""
    knobs = {
        "CNN": "efficientnet-b2", "AST": "ast-base", "CNN_TEACHERS": "efficientnet-b0 timm:x", "AST_TEACHERS": "ast-tiny",
        "PRETRAINED_CNN": "a b.pth", "PRETRAINED_AST": "no", "LR_CNN": "1e-3", "LR_AST": "2e-3", "BATCH_CNN": "11",
        "BATCH_AST": "22", "EPOCHS": "3", "RECIPE": "demo", "PATCHOUT": "4 40", "PRECISION": "bfloat16", "WORKERS": "5",
        "KEEP_EPOCHS": "1", "GPUS": "4", "SEEDS": "7", "FOLDS": "2", "BASELINES": "1", "EXP": "e", "ROOT": "raw",
    }  # fmt: skip
    assert set(knobs) | {"PYTHON"} == set(KNOBS)
    done, calls = run_all("esc50", **knobs)
    assert done.returncode == 0, done.stderr
    prepare, *calls, summary = calls
    assert prepare == ["prep_data.py", "esc50", "--out", "data/esc50", "--root", "raw", "--workers", "5"]
    assert summary == ["evaluate.py", "--summary", "e"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--signals-to-handle=SIGTERM", "--nproc_per_node=4"]
    assert all(c[:5] == torchrun for c in calls)  # training and scoring; preparation and summary are one process
    calls = [c[5:] for c in calls]
    models = ["efficientnet-b0", "timm:x", "ast-tiny", "efficientnet-b2", "ast-base"]
    assert [after(c, "--model") for c in training(calls)] == [*models, "ast-base", "efficientnet-b2"]
    assert runs(calls)[-2:] == [
        ("e/ast-base-from-efficientnet-b0+timm-x-fold2-s7", ["efficientnet-b0-fold2-s7", "timm-x-fold2-s7"]),
        ("e/efficientnet-b2-from-ast-tiny-fold2-s7", ["ast-tiny-fold2-s7"]),
    ]
    for c in training(calls):
        ast = after(c, "--model").startswith("ast-")
        own = (
            {"--pretrained": "no", "--lr": "2e-3", "--batch-size": "22"}
            if ast
            else {"--pretrained": "a b.pth", "--lr": "1e-3", "--batch-size": "11"}
        )
        both = {
            "--data": "data/esc50",
            "--epochs": "3",
            "--recipe": "demo",
            "--precision": "bfloat16",
            "--seed": "7",
            "--fold": "2",
        }
        assert {flag: after(c, flag) for flag in own | both} == own | both
        assert after(c, "--patchout", 2) == (["4", "40"] if ast else None) and "--keep-epochs" in c
    for c in calls:
        if c[0] == "evaluate.py":  # a checkpoint knows the rest
            assert len(c) == 3


def test_baselines_0_trains_teachers_and_students_alone(run_all):
    done, calls = run_all("demo", BASELINES="0", CNN="densenet-121", CNN_TEACHERS="efficientnet-b0")
    assert done.returncode == 0, done.stderr
    assert [after(c, "--model") for c in training(calls)] == ["efficientnet-b0", "ast-tiny", "ast-tiny", "densenet-121"]


def test_audioset_bal_shares_the_prepared_folder(run_all):
    done, calls = run_all("audioset-bal", ROOT="r")
    assert done.returncode == 0, done.stderr
    assert calls[0] == ["prep_data.py", "audioset", "--out", "data/audioset", "--root", "r"]
    assert [r[0] for r in runs(calls)][:2] == ["exp/audioset-bal/efficientnet-b2-s0", "exp/audioset-bal/ast-base-s0"]
    assert all(after(c, "--recipe") == "audioset-bal" for c in training(calls))
    done, calls = run_all("audioset", BARE="1")
    assert all(c[0] != "prep_data.py" and "--recipe" not in c for c in calls) and runs(calls)[0][0].startswith(
        "exp/audioset/"
    )


def test_through_a_link_and_with_cdpath(run_all, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stats.json").write_text("{}")
    (tmp_path / "link.sh").symlink_to(ROOT / "run_all.sh")
    done, calls = run_all("data", script=tmp_path / "link.sh", CDPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert calls[0][0] == "train_teacher.py" and runs(calls)[0][0] == "exp/data/efficientnet-b2-s0"


def test_a_prepared_folder(run_all, tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "stats.json").write_text("{}")
    done, calls = run_all("my data/", CNN="timm:x", AST="ast-tiny")
    assert done.returncode == 0, done.stderr
    assert all(after(c, "--data") == "my data" for c in training(calls)) and len(training(calls)) == 4
    assert runs(calls)[-1] == ("exp/my data/timm-x-from-ast-tiny-s0", ["ast-tiny-s0"])


@pytest.mark.parametrize(
    ("broken", "stage"),
    [
        ("prep_data.py", "prepare data/demo"),
        ("train_teacher.py", "train exp/demo/timm-resnet10t-s0"),
        ("distill.py", "distill exp/demo/ast-tiny-from-timm-resnet10t-s0"),
        ("evaluate.py", "average exp/demo/timm-resnet10t-s0"),
    ],
)
def test_the_first_failure_stops_it_with_the_stage_and_code(run_all, broken, stage):
    done, calls = run_all("demo", BREAK=broken)
    assert done.returncode == 7 and calls[-1][0] == broken
    assert f"stage '{stage}' failed (exit code 7); fix it and run the same command again" in done.stderr
    done, again = run_all("demo")  # the same command resumes
    assert done.returncode == 0 and sum(c[1] == "--average" for c in calls + again) == 4 + (broken == "evaluate.py")


@pytest.mark.parametrize("args", [[], ["fsd51k"], ["demo", "esc10"], ["--help"]])
def test_usage(run_all, args):
    done, calls = run_all(*args)
    assert done.returncode == (0 if args == ["--help"] else 2) and not calls
    assert "bash run_all.sh demo" in done.stdout or args[0] in done.stderr


def test_no_python_is_said(tmp_path):
    for name in ("bash", "dirname", "awk"):
        (tmp_path / name).symlink_to(shutil.which(name))
    env = {k: v for k, v in os.environ.items() if k not in KNOBS} | {"PATH": str(tmp_path)}
    line = [tmp_path / "bash", ROOT / "run_all.sh", "demo"]
    done = subprocess.run(line, check=False, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 127 and "python: command not found" in done.stderr and "stage 'prepare" in done.stderr


@pytest.mark.parametrize("stage", ["prepare", "train"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_script_reaches_the_stage(tmp_path, sent, stage):
    """Of a training also one to all of its processes, as a terminal sends it: Python must not end before it has saved."""
    if stage == "train":
        (tmp_path / "data" / "demo").mkdir(parents=True)
        (tmp_path / "data" / "demo" / "stats.json").touch()
    stand_in = """#!/usr/bin/env bash
trap 'echo saved > saved; exit 143' TERM
touch started
while true; do sleep 0.05; done
"""
    (tmp_path / "python").write_text(stand_in)
    (tmp_path / "python").chmod(0o755)
    # a process started in the background may ignore them, and a script below it could not trap them
    line = ["env", "--default-signal=INT,HUP", "bash", ROOT / "run_all.sh", "demo"]
    env = os.environ | {"PYTHON": str(tmp_path / "python")}
    run = subprocess.Popen(line, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    (os.killpg if stage == "train" else os.kill)(run.pid, sent)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 143 and (tmp_path / "saved").exists() and "the same command resumes" in errors
