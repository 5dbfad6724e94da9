"""main.py started by DeepSpeed's launcher, by one that says no ranks, and by none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE
from tests.support.ports import free_port
from tests.support.program import ROOT, start
from training import launchers
from training.launchers import LAUNCHERS, Launcher
from training.values import ConfigError

from .runs import SHORT, one_line

slow = pytest.mark.slow
HERE = Path("/home/user")
SSH = ["sshd: user@notty"]
DEEPSPEED = ["python", "/usr/bin/deepspeed", "--hostfile=none", "main.py"]
RANKS = ["python", "-u", "-m", "deepspeed.launcher.launch", "--node_rank=1"]


@pytest.mark.parametrize(
    ("above", "launched_by"),
    [
        ([["bash"], SSH], []),
        ([["python", "/usr/bin/torchrun", "main.py"], ["bash"]], [10]),
        ([["python", "-m", "torch.distributed.run", "main.py"], SSH], [10]),
        ([RANKS, DEEPSPEED, ["bash"], SSH], [10, 11]),
        ([RANKS, ["bash"], SSH, ["init"]], [10, 12]),
    ],
    ids=["none", "torchrun", "its module", "deepspeed", "deepspeed, through ssh"],
)
def test_the_processes_that_launched_this_one(monkeypatch, above, launched_by) -> None:
    processes = [(10 + at, arguments, HERE) for at, arguments in enumerate(above)]
    monkeypatch.setattr(launchers, "_processes_above", lambda: iter(processes))
    assert launchers.processes() == launched_by


def test_only_a_launchers_own_hostfile_is_looked_for(monkeypatch) -> None:
    above = [(10, ["srun", "--hostfile", "/no/file"], HERE), (11, DEEPSPEED, HERE)]
    monkeypatch.setattr(launchers, "_processes_above", lambda: iter(above))
    with pytest.raises(ConfigError, match="hostfile /home/user/none is missing"):
        launchers.check()


def test_a_launcher_is_an_entry(monkeypatch) -> None:
    mine = Launcher(("fling",), over_ssh="fling --there", count="FLUNG")
    monkeypatch.setitem(LAUNCHERS, "fling", mine)
    above = [(10, ["fling", "--there"], HERE), (11, SSH, HERE)]
    monkeypatch.setattr(launchers, "_processes_above", lambda: iter(above))
    assert launchers.processes() == [10, 11]
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("FLUNG", "2")
    with pytest.raises(ConfigError, match="FLUNG is 2, but RANK is not set"):
        launchers.check()


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return ("--data-pth", data, "--log-pth", str(tmp_path / "runs"), *SHORT)


@slow
def test_one_replica_needs_no_launcher(flags) -> None:
    outcome = start(*flags, world_size=1)
    assert outcome.codes == [0], outcome.errors
    assert "1 replica\n" in outcome.outputs[0]


def deepspeed(hostfile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command that the README names, on this host alone."""
    port = str(free_port())
    launcher = [str(ROOT / ".venv/bin/deepspeed"), "--hostfile", str(hostfile), "--no_ssh_check"]
    address = ["--master_addr", "127.0.0.1", "--master_port", port]
    return subprocess.run(
        [*launcher, *address, "main.py", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


@slow
@pytest.mark.long
def test_deepspeeds_launcher_starts_it(flags) -> None:
    done = deepspeed(ROOT / "hostfile", *flags)
    assert done.returncode == 0, done.stderr
    assert "2 replicas" in done.stdout


@slow
def test_a_missing_hostfile_is_named_where_deepspeed_would_train_on_one_process(flags) -> None:
    done = deepspeed(Path("/no/hostfile"), *flags)
    assert done.returncode != 0
    (line,) = [row for row in done.stderr.splitlines() if row.startswith("main.py:")]
    assert "hostfile /no/hostfile is missing" in line


@slow
def test_processes_of_a_launcher_that_says_no_ranks_do_not_train_alone(flags, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    line = one_line(start(*flags, world_size=1))
    assert "SLURM_STEP_NUM_TASKS is 2" in line
