"""Every command of README's 'Reproduce the paper', at toy size: bash expands the very text, two toy models stand for all."""

import re
import subprocess

import pytest
from conftest import ROOT, inside

CNN = "timm-mobilenetv3_small_050"  # as it stands in the name of a run
BLOCKS = re.findall(
    r"```bash\n(.*?)```", (ROOT / "README.md").read_text().split("## Reproduce the paper")[1], re.DOTALL
)
TITLES = ["teachers", "Table 3", "Table 4", "Table 5", "Table 7", "Table 8", "Table 9", "Table 13", "Figure 2"]


def commands(block):
    """The python commands of a block as bash would run them, with toy models and epochs, each once."""
    block = re.sub(r"\bdensenet-121\b|\befficientnet-b[026]\b", CNN, block)
    block = re.sub(r"\bast-(small|base)\b", "ast-tiny", block).replace("hybrid-b2", "hybrid-b0")
    block = block.replace("for f in 1 2 3 4 5", "for f in 1 2").replace(
        "for e in 00 05 10 20 30 40 50", "for e in 00 01"
    )
    shell = 'python() { printf "%s\\n" "$@"; echo ---; }\n' + block
    text = subprocess.run(["bash", "-euc", shell], check=True, capture_output=True, text=True).stdout
    for script, *flags in dict.fromkeys(tuple(c.split("\n")) for c in text.split("\n---\n") if c):
        if script != "evaluate.py":
            at = flags.index("--model") + 1
            flags[at] = flags[at].replace("timm-", "timm:")
            flags += [
                "--epochs",
                "1",
                "--batch-size",
                "12",
                *([] if "--pretrained" in flags else ["--pretrained", "no"]),
            ]
        yield script, flags


@pytest.fixture(scope="module")
def work(multi, folds, tmp_path_factory):
    """data/fsd50k and data/esc50 are toys, and so are the AudioSet weights that Table 13 starts from."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "data").mkdir()
    (folder / "data" / "fsd50k").symlink_to(multi)
    (folder / "data" / "esc50").symlink_to(folds)
    return folder


def test_readme_has_a_row_for_each():
    text = (ROOT / "README.md").read_text()
    assert len(BLOCKS) == len(TITLES) and all(f"**{t}**" in text for t in TITLES[1:])


@pytest.mark.parametrize("title", TITLES)
def test_the_commands_run(title, work, monkeypatch):
    monkeypatch.chdir(work)
    if title == "Table 13":
        for name in ("ast-tiny", CNN):
            source, goal = (
                work / "exp" / "fsd50k" / f"{name}-s0" / "best.pt",
                work / "exp" / "audioset" / f"{name}-s0" / "wa.pt",
            )
            goal.parent.mkdir(parents=True)
            goal.symlink_to(source)
    n = 0
    for script, flags in commands(BLOCKS[TITLES.index(title)]):
        said = inside(script, *flags)
        assert not said.startswith("error: "), (script, flags, said)
        n += 1
    assert n
