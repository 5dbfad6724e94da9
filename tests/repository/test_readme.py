"""The README tells the truth: its program runs as printed, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE
from tests.support.program import ROOT
from training.plan.plan import plan

README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_program_runs_as_printed(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "train.py").write_text(program)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*torchrun, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    told = re.search(r"accuracy ([\d.]+)%, (\d+) synchronisations in 500 steps", done.stdout)
    assert told, done.stdout
    assert float(told[1]) > 85  # guessing gives about 10
    assert int(told[2]) < 125  # fewer than with constant H = 4


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:sh|py|yml))\b", README)))
)
def test_what_it_names_is_there(name: str) -> None:
    if name == "train.py":  # the reader's own
        return
    places = [ROOT / name, ROOT / "recipe" / name, ROOT / "localopt" / name]
    assert any(place.exists() for place in places), name


def test_every_recipe_and_script_is_named() -> None:
    files = [*(ROOT / "recipe").glob("*.yml"), *(ROOT / "run-scripts").glob("*.sh")]
    assert [file.name for file in files if file.name not in README] == []


ROWS = re.findall(r"^\| `([\w-]+\.yml)`.*?\| .*?: ([\d.]+) % \|", README, re.MULTILINE)


@pytest.mark.parametrize(("recipe", "share"), ROWS, ids=lambda row: row.removesuffix(".yml"))
def test_a_recipe_synchronises_as_often_as_it_says(recipe: str, share: str) -> None:
    thought = plan(["--plan", "--recipe-pth", f"recipe/{recipe}", "--data-pth", "/none"])
    own = thought.scenarios[thought.chosen]
    digits = len(share.partition(".")[2])
    assert f"{100 * len(own.rounds) / thought.schedule.total_steps:.{digits}f}" == share


def test_its_table_of_shares_was_found() -> None:
    assert len(ROWS) >= 12


LAUNCHERS = {"--hostfile", "--master_addr", "--no_ssh", "--no_ssh_check"}


@pytest.mark.slow
def test_the_flags_it_names_are_those_of_help() -> None:
    pages = README + (ROOT / "docs/choosing-alpha.md").read_text()
    named = re.findall(r"main\.py[^`\n]*? (--[\w-]+)|`(--[\w-]+)[`= ]", pages)
    flags = {flag.replace("--no-", "--") for pair in named for flag in pair if flag} - LAUNCHERS
    told = subprocess.run(
        [sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    shown = set(re.findall(r"--[\w-]+", told))
    assert {flag.replace("_", "-") for flag in flags} <= shown and len(flags) > 30
