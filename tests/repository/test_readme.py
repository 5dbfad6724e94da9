"""README and docs/ tell the truth: programs run as printed, and what they name is there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE
from tests.support.program import ROOT, start
from training.plan.plan import plan

README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
EVERYTHING = "\n".join(PAGES.values())
(PROGRAM,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def torchrun(program: str, folder: Path) -> str:
    """What a program prints on two replicas."""
    (folder / "train.py").write_text(program, encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "train.py"], cwd=folder, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_program_runs_as_printed(tmp_path: Path) -> None:
    output = torchrun(PROGRAM, tmp_path)
    found = re.search(r"accuracy ([\d.]+)%, (\d+) synchronisations in 500 steps", output)
    assert found, output
    assert float(found[1]) > 85  # guessing gives about 10
    assert int(found[2]) < 125  # fewer than with constant H = 4


AROUND = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from localopt import QSR, LocalAdamW, LocalSGD

STEPS = 40
torch.manual_seed(0)
model = nn.Linear(8, 3)
loader = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(STEPS)]
{}
for inputs, labels in [] if "scheduler" in globals() else loader:
    cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
if hasattr(optimizer, "traffic"):
    optimizer.finish()
    os.write(1, f"{{optimizer.traffic.syncs}} synchronisations\\n".encode())
if dist.is_initialized():
    dist.barrier()
os._exit(0)  # at a normal exit torch's DistributedDataParallel may wait for gloo's thread for ever
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_both_sides_of_a_diff_run(number: int, tmp_path: Path) -> None:
    lines = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)[number].splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    counts = []
    for side in (before, after):
        (script := tmp_path / "train.py").write_text(AROUND.format(side), encoding="utf-8")
        outcome = start(script=script)
        assert outcome.codes == [0, 0], outcome.errors
        counts.append(re.findall(r"(\d+) synchronisations", "".join(outcome.outputs)))
    assert counts[0] == [] and len(counts[1]) == 2 and 0 < int(counts[1][0]) <= 10


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 190
    assert len(README.split()) <= 1900


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_it_is_for(page: str) -> None:
    title, purpose = PAGES[page].split("\n\n")[:2]
    assert title.startswith("# ") and "\n" not in title
    assert not purpose.startswith(("#", "|", "```", "!"))
    assert len(purpose.split()) > 6


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"README.md"}))
def test_every_page_is_named_in_the_readme(page: str) -> None:
    assert f"`{page}`" in README


NAMES = sorted(set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:sh|py|yml|md|png))\b", EVERYTHING)))
OF_A_RUN = {"train.py", "config.yml", "report.md"}  # the reader's own


@pytest.mark.parametrize("name", NAMES)
def test_what_they_name_is_there(name: str) -> None:
    if name in OF_A_RUN or name.startswith(".config_"):
        return
    folders = ("", "recipe", "run-scripts", "localopt", "localopt/faults", "training", "docs")
    assert any((ROOT / folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert "://" in target or (ROOT / page).parent.joinpath(target).exists(), target


MODULES = sorted(set(re.findall(r"python -m ([\w.]+)", EVERYTHING)))


@pytest.mark.parametrize("module", MODULES)
def test_what_they_start_is_there(module: str) -> None:
    assert importlib.util.find_spec(module), module


def test_every_recipe_and_script_is_named() -> None:
    files = [*(ROOT / "recipe").glob("*.yml"), *(ROOT / "run-scripts").glob("*.sh")]
    assert [file.name for file in files if file.name not in EVERYTHING] == []


ROWS = re.findall(
    r"^\| `([\w-]+\.yml)`.*?\| .*?: ([\d.]+) % \|", PAGES["docs/imagenet.md"], re.MULTILINE
)


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
def test_the_flags_they_name_are_those_of_help() -> None:
    ours = ("program", "imagenet", "choosing-alpha")
    pages = "\n".join([README, *(PAGES[f"docs/{name}.md"] for name in ours)])
    named = re.findall(r"main\.py[^`\n]*? (--[\w-]+)|`(--[\w-]+)[`= ]", pages)
    flags = {flag.replace("--no-", "--") for pair in named for flag in pair if flag} - LAUNCHERS
    output = subprocess.run(
        [sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    shown = set(re.findall(r"--[\w-]+", output))
    assert {flag.replace("_", "-") for flag in flags} <= shown and len(flags) > 30
