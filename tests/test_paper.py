"""Every command of README's 'Reproduce the paper', at toy size: bash runs the very text, and its `python` is this process."""

import json
import os
import re
import shutil
import signal
import subprocess

import pytest
from conftest import ROOT, inside, write_prepared

import analyze
import dataset
import evaluate
import models

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Reproduce the paper")[1].split("\n## ")[0]
BLOCKS = dict(re.findall(r"\n(?:\*\*([^*]+)\*\*|The models)[^`\n]*(?:`[^`\n]*`[^`\n]*)*\n```bash\n([^`]*)```", SECTION))
LESS = {  # one model of each kind stands for all, two seeds for three, one fold for five
    r"efficientnet-b[26]|densenet-121": "efficientnet-b0",
    r"ast-(small|base)": "ast-tiny",
    r"hybrid-b2": "hybrid-b0",
    r"0 1 2": "0 1",
    r"0,1,2": "0,1",
    r"for n in 0 1; do for f in 1 2 3 4 5": "for n in 0; do for f in 1",
    r"00 05 10 20 30 40 50": "00 01",
}
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$WORK/ask"
exit "$(cat "$WORK/answer")"
"""


def less(text):
    for there, here in LESS.items():
        text = re.sub(there, here, text)
    return text


def answer(script, *flags):
    """Run one command at toy size in this process: -> its error, or nothing."""
    if script in ("train_teacher.py", "distill.py"):
        flags = ["no" if flag == "imagenet" else flag for flag in flags]
        flags += ["--epochs", "1", "--batch-size", "12"]
        flags += [] if "--pretrained" in flags else ["--pretrained", "no"]
    output = inside(script, *flags)
    return output if output.startswith("error: ") else ""


def run_block(title, work):
    """Run a block as a user does who pastes it after the first one, which defines its functions."""
    text = less(BLOCKS[""] + (BLOCKS[title] if title else ""))
    env = os.environ | {"PATH": f"{work}/bin:{os.environ['PATH']}", "WORK": str(work)}
    line = ["bash", "-c", 'bash -euc "$1"; printf "exit\n%s\n" $? >"$WORK/ask"', "bash", text]
    shell = subprocess.Popen(
        line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=work
    )
    commands, error = [], ""
    try:
        while True:
            script, *flags = (work / "ask").read_text().split("\n")[:-1]
            if script == "exit":
                assert flags == ["0"], (title, commands[-1], error or shell.stderr.read())
                return commands
            commands.append((os.path.basename(script), *flags))
            error = answer(*commands[-1])
            (work / "answer").write_text("1" if error else "0")
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """paper(title) runs a block in a folder of toys, after the blocks before it: -> (the folder, its commands)."""
    work, ran = tmp_path_factory.mktemp("paper"), {}
    (work / "bin").mkdir()
    (work / "bin" / "python").write_text(STAND_IN)
    (work / "bin" / "python").chmod(0o755)
    for name in ("ask", "answer"):
        os.mkfifo(work / name)
    (work / "run_all.sh").write_text(less((ROOT / "run_all.sh").read_text()))
    data = work / "data"
    write_prepared(data / "fsd50k", {"train": 24, "val": 8, "eval": 8}, True, source="fsd50k")
    audioset = {"train-balanced": 12, "train-unbalanced": 12, "eval": 8}
    write_prepared(data / "audioset", audioset, True, source="audioset")
    write_prepared(data / "esc50", {"1": 8, "2": 12, "3": 12}, False, source="esc50")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.delenv("SEEDS", raising=False)
        for drawing in ("draw_classes", "draw_confusion"):  # half of the time
            patch.setattr(evaluate, drawing, lambda *_: None)
        patch.setitem(models.MODELS, "efficientnet-b0", ("cnn", "toy_efficientnet"))
        patch.setitem(models.MODELS, "hybrid-b0", ("hybrid", "toy_efficientnet"))
        patch.setitem(models.MODELS, "ast-tiny", ("ast", "deit_toy_distilled"))
        patch.setattr(analyze, "SEEDS", 1)
        patch.setattr(analyze, "LEVELS", {k: (v[:1], unit) for k, (v, unit) in analyze.LEVELS.items()})

        def run(title):
            for before in list(BLOCKS)[: list(BLOCKS).index(title) + 1]:
                if before not in ran:
                    ran[before] = run_block(before, work)
            return work, ran[title]

        yield run


def runs(commands):
    """{the folder of each run that is trained, without exp/: its command}"""
    return {
        c[c.index("--out") + 1].removeprefix("exp/"): c for c in commands if c[0] in ("train_teacher.py", "distill.py")
    }


@pytest.mark.parametrize("title", list(BLOCKS))
def test_its_commands_run_and_everything_trained_is_scored(title, paper):
    work, commands = paper(title)
    assert commands
    for run in runs(commands):
        out = work / "exp" / run
        assert (out / "metrics-best-eval.json").exists()
        assert (out / "metrics-wa-eval.json").exists() != (title == "Table 13")  # ESC-50 has no averaging
        settings = dataset.read_json(out / "args.json")
        assert bool(list(out.glob("ep-*"))) == settings["keep_epochs"]  # others would take 0.8 TB in all


def test_a_run_that_was_killed_while_it_pruned_its_epochs_is_pruned(paper):
    work, _ = paper("")
    out = work / "exp/fsd50k/hybrid-b0-s0"
    shutil.copy(out / "best.pt", out / "ep-01.pt")  # ep-00 goes first, and scores are written last
    (out / "metrics-best-eval.json").unlink()
    run_block("", work)
    assert not list(out.glob("ep-*")) and (out / "metrics-best-eval.json").exists()


def test_every_figure_is_drawn(paper):
    work, commands = paper("Section 4.3")
    drawn = [c for c in paper("Figure 2")[1] + commands if c[0] == "analyze.py"]
    assert len(drawn) == len({c[c.index("--out") + 1] for c in drawn}) == 6
    for c in drawn:
        assert {p.suffix for p in (work / c[c.index("--out") + 1]).glob(f"{c[1]}.*")} == {".json", ".png", ".pdf"}


def test_a_block_again_trains_and_scores_nothing(paper):
    for title in ("Table 3", "Table 9", "Table 13"):
        work, _ = paper(title)
        again = {c[:2] for c in run_block(title, work) if title != "Table 9" or c[0] == "evaluate.py"}
        assert again <= {("evaluate.py", "--summary")}  # in Table 9 each training says that it is done


def test_table_9_skips_what_the_first_block_did(paper):
    _, commands = paper("Table 9")
    done = "efficientnet-b0-s0", "ast-tiny-s0"
    again = [c for c in commands if c[0] == "evaluate.py" and any(f"fsd50k/{run}/" in " ".join(c) for run in done)]
    assert all(len(c) == 4 for c in again) and len(again) == 2  # in the two ensembles only


def test_table_3_shows_what_chooses_between_temperatures(paper):
    work, _ = paper("Table 8")
    header, _, *lines = [row for row in (work / "exp/table3/summary.md").read_text().splitlines() if row[:1] == "|"]
    at = [cell.strip() for cell in header.split("|")].index("val")
    assert len(lines) == 8
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")]
        log = (work / "exp/table3" / f"{cells[1]}-s0" / "log.jsonl").read_text().splitlines()
        assert cells[at] == f"{max(100 * json.loads(entry)['val_score'] for entry in log):.1f}"


def test_the_text_itself_covers_the_tables(tmp_path):
    """What the blocks would start at full size: the pairs, settings, folds and seeds of the paper's tables."""

    def commands(title):
        shell = 'python() { (IFS="\t"; echo "$*"); }; bash() { python "$@"; }\n'
        line = ["bash", "-euc", shell + (BLOCKS[""] if title else "") + BLOCKS[title]]
        found = subprocess.run(line, check=True, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
        return [tuple(c.split("\t")) for c in found]

    assert len(BLOCKS) == SECTION.count("```bash") == 11
    first = commands("")
    trained = {title: runs(commands(title)[len(first) :]) for title in BLOCKS if title} | {
        "": runs(first[::-1])
    }  # what comes first counts: the rest is skipped
    after = lambda c, flag: c[c.index(flag) + 1] if flag in c else None
    assert len({after(c, "--model") for c in trained[""].values()}) == 9  # every model of the paper
    kept = {run for run, c in trained[""].items() if "--keep-epochs" in c}
    models_4_3 = ["efficientnet-b0", "efficientnet-b2", "ast-tiny", "ast-base"]
    models_4_3 += ["efficientnet-b2-from-ast-tiny", "ast-base-from-efficientnet-b0"]
    assert kept == {f"fsd50k/{m}-s{seed}" for m in models_4_3 for seed in range(3)}
    cells = {(after(c, "--model"), after(c, "--teacher"), after(c, "--tau")) for c in trained["Table 3"].values()}
    assert len(cells) == len(trained["Table 3"]) == 7 * 7 * 2
    for c in trained["Table 3"].values():  # self-KD: not of the teacher's seed
        assert (c[-2:] == ("--seed", "1")) == (f"/{after(c, '--model')}-s0/" in after(c, "--teacher"))
    sizes = {title: len(found) for title, found in trained.items()}
    assert [sizes[f"Table {n}"] for n in (4, 5, 7, 8)] == [2, 18, 12, 6] and sizes["Figure 2"] == 14
    thirteen = {
        (*(after(c, f) for f in ("--model", "--pretrained", "--teacher", "--fold", "--seed")),)
        for c in trained["Table 13"].values()
    }
    assert len(thirteen) == 3 * 5 * (2 * 3 + 2 * 3 * 3)
    assert len({start for _, start, *_ in thirteen}) == 5  # ImageNet, and two AudioSet models of each kind
    teachers = [c for c in trained["Table 13"].values() if c[0] == "distill.py"]
    assert all(f"fold{after(c, '--fold')}-s{after(c, '--seed')}/" in after(c, "--teacher") for c in teachers)
    assert [after(c, "--epochs") for c in trained["Table 11"].values()] == ["10"] * 3
    sizes = re.search(r"at 200 classes\): ([^;]*)", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    names = (
        "efficientnet-b0 efficientnet-b2 efficientnet-b6 densenet-121 ast-tiny ast-small ast-base hybrid-b0 hybrid-b2"
    )
    gb = dict(zip(names.split(), (4e-3 * float(n) for n in re.findall(r" ([\d.]+)", sizes)), strict=True))

    def disk(c):
        """GB of best.pt, wa.pt (not on ESC-50), last.pt (Adam's state is twice the weights), ep-00.pt to ep-50.pt"""
        return gb[after(c, "--model")] * (4 + ("data/esc50" not in c) + 51 * ("--keep-epochs" in c))

    needed = [sum(map(disk, trained[t].values())) for t in ("", "Table 3", "Table 13")]
    assert [int(n) for n in re.findall(r"(\d+) GB, computed", SECTION)] == pytest.approx(needed, rel=0.03)
