"""How replicas find each other at the start, and what is said when they do not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.patience import PATIENCE
from tests.support.ports import free_port
from tests.support.program import ROOT, start
from tests.support.ranks import run

from .runs import SHORT, one_line

pytestmark = pytest.mark.slow

LAUNCHER = """
import os, subprocess, sys
ranks = []
for rank in "01":
    said = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_SIZE="2")
    said |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
    ranks.append(subprocess.Popen([sys.executable, *sys.argv[2:]], env=os.environ | said))
print("ranks", *(rank.pid for rank in ranks), flush=True)
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return ("--data-pth", data, "--log-pth", str(tmp_path / "runs"), "--device", "cpu", *SHORT)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """main.py below a process with DeepSpeed's name, which waits for rank 0 first."""
    launcher, started = tmp_path / "deepspeed", []
    launcher.write_text(LAUNCHER)

    def launched(*flags: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(launcher), str(free_port()), "main.py", *flags],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield launched
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children():
                child.kill()
            process.kill()


def test_a_rank_that_is_killed_before_all_have_met_is_named(flags, launched) -> None:
    """By the other one, which is at its imports, and at once."""
    launcher = launched(*flags)
    _, _, second = launcher.stdout.readline().split()
    while "imports torch" not in launcher.stdout.readline():
        assert launcher.poll() is None
    os.kill(int(second), signal.SIGKILL)
    killed = time.monotonic()
    _, errors = launcher.communicate(timeout=PATIENCE)
    assert f"was killed by SIGKILL before training began (process {second})" in errors
    assert errors.startswith("main.py: rank 1 on ") and errors.count("\n") == 1
    assert time.monotonic() - killed < 60, "five minutes are waited for one on another host"


def test_of_a_rank_that_fails_alone_one_line_is_all_that_is_said(
    flags, launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store ends with rank 0, which C++ would tell on the other one in thirty lines."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    launcher = launched(*flags, "--wandb", "online")
    _, errors = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode != 0
    (line,) = [line for line in errors.splitlines() if "real_accelerator" not in line]
    assert line.startswith("main.py: rank 0 on ") and "`wandb login`" in line


def test_a_port_in_use_is_named_with_the_flag_for_another(flags) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        began = time.monotonic()
        outcome = start(*flags, absent=1, places=[{"MASTER_PORT": port}])
    line = one_line(outcome)
    assert f"port {port}, " in line and "is in use" in line and "--master_port" in line
    assert time.monotonic() - began < PATIENCE / 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "0"}, "RANK is '0', and WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', and RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2': it must lie between 0 and 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    ],
)
def test_a_launchers_environment_that_is_not_whole_is_refused(flags, given, said: str) -> None:
    whole = len(given) != 3 or "MASTER_PORT" in given
    if whole and {"RANK", "WORLD_SIZE"} <= given.keys():
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | given
    line = one_line(start(*flags, world_size=1, places=[given]))
    assert said in line and ("launcher" in line or "torchrun" in line)


def listening(rank: int, world_size: int, address: str, here: str) -> list[str]:
    """The addresses at which the store of two replicas listens on rank 0."""
    from datetime import timedelta

    from training import meeting_point
    from training.values import ConfigError

    port = free_port()
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "LOCAL_SIZE": here}
    arrival = meeting_point._Arrival(0, 2, timedelta(seconds=1))
    store = arrival.store()
    with pytest.raises(ConfigError, match="rank 1 did not come within"):
        arrival.wait(store)
    connections = psutil.Process().net_connections()
    return [c.laddr.ip for c in connections if c.laddr.port == port and c.status == "LISTEN"]


def test_the_store_listens_where_it_is_looked_for_and_nowhere_else() -> None:
    """A name that leads to this host's loopback is no address for other hosts."""
    assert run(listening, 1, "127.0.0.1", "2", timeout=60) == [["127.0.0.1"]]
    ((everywhere,),) = run(listening, 1, "127.0.0.1", "1", timeout=60)
    assert everywhere in ("::", "0.0.0.0")
