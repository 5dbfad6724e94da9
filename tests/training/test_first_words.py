"""A run says at once what it will do, then what it waits for; and how long it will take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.patience import PATIENCE
from tests.support.program import ROOT, start
from training import optimizers, progress
from training.distributed import Process
from training.lr import Schedule
from training.run import described
from training.settings import load

from .runs import SHORT

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return ("--data-pth", data, "--log-pth", str(tmp_path / "runs"), "--device", "cpu", *SHORT)


def alone() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in LAUNCH}


@pytest.mark.slow
def test_what_will_be_trained_is_said_before_torch_comes(flags, tmp_path: Path) -> None:
    """And by how many: a process without a launcher trains alone, and says so."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "main.py", *flags],
        cwd=ROOT, env=alone(), text=True, timeout=PATIENCE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    lines = ended.stdout.splitlines()
    words = [line for line in lines if line.startswith("main.py:")]
    torch = next(i for i, line in enumerate(lines) if re.search(r"\| +torch(\.|$)", line))
    assert lines.index(words[0]) < torch
    (folder,) = (tmp_path / "runs").iterdir()
    assert "recipe digits-vit-localadamw-qsr, 1 replica, so nothing will be" in words[0]
    assert words[0].endswith(f"run folder {folder}")
    assert "without a launcher" in words[1] and "deepspeed --hostfile" in words[1]
    said = "\n".join(words)
    whole = r"simplevit-digits with [\d,]+ parameters on cpu; digits with 1,438 images; 12 steps"
    for phase in ("imports torch", "opens the data", whole, "for the first batch", "first step is"):
        assert re.search(phase, said), said
    assert re.search(r"elapsed, 0:\d\d left$", ended.stdout, re.MULTILINE)


@pytest.mark.slow
def test_rank_0_alone_speaks_and_names_the_planned_synchronisations(flags) -> None:
    outcome = start(*flags, "--period", "constant", "--h-base", "4")
    assert outcome.codes == [0, 0], outcome.errors
    assert "2 replicas, run folder" in outcome.outputs[0]
    assert "3 synchronisations planned (25.0% of the steps)" in outcome.outputs[0]
    assert not outcome.outputs[1]


@pytest.mark.slow
def test_a_run_of_no_steps_ends_in_order(flags) -> None:
    outcome = start(*flags, "--epochs", "0", world_size=1)
    assert outcome.codes == [0], outcome.errors


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (["--epochs", "0"], "; nothing will be synchronised"),
        (["--epochs", "2", "--warmup-steps", "12"], "the run ends within its warm-up of 12 steps"),
        (["--epochs", "2", "--warmup-steps", "11"], "planned (25.0% of the steps)"),
    ],
)
def test_where_there_is_little_to_train_it_says_so(run: list[str], said: str) -> None:
    config = load(run)
    schedule = Schedule.of(config, steps_per_epoch=6)
    two = Process(0, 2, 0, torch.device("cpu"))
    optimizer = SimpleNamespace(param_groups=[], period=optimizers.period(config, schedule))
    assert described(config, two, schedule, optimizer, images=192).endswith(said)


@pytest.mark.parametrize("flag", ["--help", "--sync=avrage"])
def test_help_and_wrong_names_wait_for_no_torch(flag: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "main.py", flag],
        cwd=ROOT, env=alone(), text=True, timeout=PATIENCE, capture_output=True,
    )  # fmt: skip
    assert "hierarchical" in ended.stdout + ended.stderr
    assert not re.search(r"\| +torch(\.|$)", ended.stderr, re.MULTILINE)


REMARK = "from training import launchers; print(launchers.remark())"


def remark(tmp_path: Path, *flags: str, **environment: str) -> str:
    """What is remarked below a process with DeepSpeed's command line."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text(
        "import subprocess, sys\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', {REMARK!r}]).returncode)\n"
    )
    ended = subprocess.run(
        [sys.executable, str(launcher), *flags, "main.py"],
        cwd=ROOT, env=alone() | environment, text=True, timeout=PATIENCE, capture_output=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_a_launcher_without_a_hostfile_is_remarked(tmp_path: Path) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2"}
    assert "was given no --hostfile" in remark(tmp_path, **ranks)
    assert remark(tmp_path, "--hostfile", "hostfile", **ranks) == ""
    assert remark(tmp_path, "--num_gpus=2", **ranks) == ""


def test_time_left_is_known_from_the_second_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one compiles; a run that goes on counts its own steps only."""
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    pace = progress.Pace(1000)
    now += 60
    pace.step(501)
    assert pace.times(501) == "1:00 elapsed"
    now += 100
    pace.step(601)
    assert pace.times(601) == "2:40 elapsed, 6:39 left"
    assert not pace.due()
    now += 31
    assert pace.due()
    assert progress.clock(3 * 3600 + 7) == "3:00:07"
