"""The README tells the truth: its program runs as printed, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .program import ROOT

README = (ROOT / "README.md").read_text()


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
        [*torchrun, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100
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
