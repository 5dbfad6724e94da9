"""main.py started by DeepSpeed's launcher, by one that says no ranks, and by none."""

from __future__ import annotations

import os
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


def deepspeed(
    hostfile: Path, *own: str, main: tuple[str, ...]
) -> subprocess.CompletedProcess[str]:
    """The command that the README names, on this host alone."""
    port = str(free_port())
    launcher = [str(ROOT / ".venv/bin/deepspeed"), "--hostfile", str(hostfile), "--no_ssh_check"]
    address = ["--master_addr", "127.0.0.1", "--master_port", port]
    return subprocess.run(
        [*launcher, *address, *own, "main.py", *main],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


@slow
def test_a_missing_hostfile_is_named_where_deepspeed_would_train_on_one_process(flags) -> None:
    done = deepspeed(Path("/no/hostfile"), main=flags)
    assert done.returncode != 0
    (line,) = [row for row in done.stderr.splitlines() if row.startswith("main.py:")]
    assert "hostfile /no/hostfile is missing" in line


@slow
def test_a_hostfile_that_deepspeed_takes_and_we_do_not_is_named(flags, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("local,host slots=1\n")
    done = deepspeed(hostfile, "--no_ssh", "--node_rank", "0", main=flags)
    assert done.returncode != 0
    (line,) = [row for row in done.stderr.splitlines() if row.startswith("main.py:")]
    assert f"hostfile {hostfile}: 'local,host slots=1'" in line and "Traceback" not in line
    assert not (tmp_path / "runs").exists()


@slow
@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("-oProxyCommand=touch$IFS{0} slots=1\nlocalhost slots=1\n", "-oProxyCommand=touch"),
        ("localhost slots=1\n$(touch${{IFS}}{0}) slots=1\n", "$(touch"),
        ("a;touch${{IFS}}{0} slots=1\n", "a;touch"),
        ("a,b slots=1\n", "'a,b'"),
        ("localhost slots=abc\n", "'localhost slots=abc'"),
        ("\ufefflocalhost slots=2\n", "byte order mark"),
    ],
    ids=["option", "substitution", "command", "list", "slots", "mark"],
)
def test_run_sh_starts_nothing_on_what_is_no_host(
    flags, tmp_path: Path, content: str, part: str
) -> None:
    """ssh is not even called with it."""
    touched, hostfile, called = (tmp_path / name for name in ("touched", "hosts", "called"))
    hostfile.write_text(content.format(touched), encoding="utf-8")
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\necho "$@" >>{called}\nexec sh -c "$2"\n')
    ssh.chmod(0o755)
    done = subprocess.run(
        [ROOT / "run-scripts/run.sh", "recipe/digits-resnet-sgd.yml", *flags],
        env=os.environ | {"HOSTFILE": str(hostfile), "PATH": f"{ssh.parent}:{os.environ['PATH']}"},
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"run.sh: hostfile {hostfile}: ") and part in line
    assert not touched.exists() and not called.exists() and not (tmp_path / "runs").exists()


@slow
def test_processes_of_a_launcher_that_says_no_ranks_do_not_train_alone(flags, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    line = one_line(start(*flags, world_size=1))
    assert "SLURM_STEP_NUM_TASKS is 2" in line
