"""from_scratch on real processes: the right mathematics, the bytes it says, and clean ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from data.order import epoch_order
from from_scratch import ddp, param_server, processes, ring_all_reduce
from from_scratch.__main__ import main
from from_scratch.meter import Meter
from from_scratch.processes import Peer, Row, WorkerError
from from_scratch.ring_all_reduce import Ring
from from_scratch.task import Task
from tests.support.patience import PATIENCE
from tests.support.program import ROOT
from tests.support.ranks import run

pytestmark = pytest.mark.slow

SIZES = (1, 2, 3, 7, 10, 64, 1001, 100_003)  # the last: chunks larger than a pipe takes


def averages(rank: int, n: int, links: list[Any]) -> list[tuple[float, int]]:
    """For each size: the error of the ring's mean, and the bytes it counted."""
    meter = Meter()
    ring = Ring(rank, n, *links[rank], meter)
    told = []
    for size in SIZES:
        x = torch.randn(size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        expected = x.clone()
        dist.all_reduce(expected)
        expected /= n
        meter.restart()
        ring.average(x)
        everyone = [torch.empty_like(x) for _ in range(n)]
        dist.all_gather(everyone, x)
        assert all(torch.equal(everyone[0], other) for other in everyone), "replicas differ"
        told.append((float((x - expected).norm() / expected.norm()), meter.bytes))
    return told


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_ring_is_all_reduce(n: int) -> None:
    """As torch's over gloo, and 2 (N − 1) ⌈size / N⌉ · 8 bytes from each rank."""
    links = list(ring_all_reduce.peers(n).values())
    for told in run(averages, n, links):
        for size, (error, sent) in zip(SIZES, told, strict=True):
            assert error < 1e-14
            assert sent == 2 * (n - 1) * -(-size // n) * 8


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def small_task(batch_size: int, dtype: torch.dtype = torch.float64) -> Task:
    """23 images, so that the last batch is smaller than the others."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(23, 6, generator=generator, dtype=dtype)
    labels = torch.randint(3, (23,), generator=generator)
    return Task(
        images, labels, images[:5], labels[:5],
        batch_size=batch_size, epochs=3, lr=0.3, seed=5, build=network,
    )  # fmt: skip


def plain_sgd(task: Task) -> np.ndarray:
    """One process, torch's own optimizer, mean losses of whole batches."""
    torch.manual_seed(task.seed)
    model = task.build().to(task.images.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    for epoch in range(task.epochs):
        for joint in torch.from_numpy(epoch_order(23, task.seed, epoch + 1)).split(task.batch_size):
            optimizer.zero_grad()
            cross_entropy(model(task.images[joint]), task.labels[joint]).backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


# 8: batches of 8, 8 and 7 images; 3: fewer than 5 workers, and the last has 2.
CASES = [(ring_all_reduce, n, b) for n in (1, 2, 3, 4, 5) for b in (8, 3)]
CASES += [(param_server, n, b) for n in (2, 3, 4, 5) for b in (8, 3)] + [(ddp, 2, 3)]


@pytest.mark.parametrize(
    ("strategy", "n", "batch_size"), CASES, ids=lambda x: getattr(x, "__name__", x)
)
def test_it_is_sgd_on_the_joint_batch(strategy: Any, n: int, batch_size: int) -> None:
    task = small_task(batch_size)
    expected = plain_sgd(task)
    rows: dict[str, list[Row]] = {}
    weights = processes.run(
        strategy.train, task, strategy.peers(n),
        report=lambda name, row: rows.setdefault(name, []).append(row),
    )  # fmt: skip
    assert len(weights) == n
    for replica in weights:
        assert replica.tobytes() == weights[0].tobytes(), "replicas differ"
        assert np.linalg.norm(replica - expected) < 1e-13 * np.linalg.norm(expected)
    assert list(rows) and all([r.epoch for r in told] == [0, 1, 2] for told in rows.values())
    for name, told in rows.items():
        assert {row.bytes for row in told} == {sent_per_epoch(strategy, name, n, task)}
        assert all(row.compute >= 0 and row.send >= 0 and row.wait >= 0 for row in told)


def sent_per_epoch(strategy: Any, name: str, n: int, task: Task) -> int:
    size = 6 * 7 + 7 + 7 * 3 + 3
    chunk = {
        ring_all_reduce: 2 * (n - 1) * -(-size // n),
        param_server: size * (n - 1 if name.startswith("server") else 1),
        ddp: 0,  # not counted
    }
    return task.updates * 8 * chunk[strategy]


def test_float32_replicas_stay_equal_bit_for_bit() -> None:
    task = small_task(8, torch.float32)
    weights = processes.run(ring_all_reduce.train, task, ring_all_reduce.peers(4))
    assert len({replica.tobytes() for replica in weights}) == 1
    assert np.isfinite(weights[0]).all()


class Failing:
    """A strategy of which one process fails in its second epoch."""

    def __init__(self, train: processes.Train, rank: int, how: str) -> None:
        self.train, self.rank, self.how = train, rank, how

    def __call__(self, peer: Peer, task: Task, link: Any) -> torch.Tensor:
        if peer.rank == self.rank:
            restart, self.left = peer.meter.restart, 2

            def fail() -> None:
                restart()
                self.left -= 1
                if not self.left and self.how == "raise":
                    raise ZeroDivisionError("the ninth decimal")
                if not self.left:
                    os.kill(os.getpid(), signal.SIGKILL)

            peer.meter.restart = fail
        return self.train(peer, task, link)


@pytest.mark.parametrize(
    ("strategy", "rank", "name", "how"),
    [
        (ring_all_reduce, 2, "worker 2", "kill"),
        (ring_all_reduce, 2, "worker 2", "raise"),
        (param_server, 2, "worker 2", "kill"),
        (param_server, 2, "worker 2", "raise"),
        (param_server, 0, "server (process 0)", "kill"),
        (ddp, 2, "worker 2", "kill"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_failure_ends_the_run_and_is_named(strategy: Any, rank: int, name: str, how: str) -> None:
    forkserver.ensure_running()  # it stays, with its helper
    resource_tracker.ensure_running()
    before = set(children())
    with pytest.raises(WorkerError) as ended:
        processes.run(Failing(strategy.train, rank, how), small_task(8), strategy.peers(3))
    told = str(ended.value)
    if how == "kill":
        assert told == f"{name} was killed by SIGKILL (exit code -9)"
    else:
        assert told.startswith(f"{name} failed (exit code 1):\nTraceback")
        assert told.endswith("ZeroDivisionError: the ninth decimal")
    assert not set(children()) - before


def children(pid: int | None = None) -> Iterator[int]:
    """The processes below this one, or below another."""
    found: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found.setdefault(int(parent), []).append(int(status.parent.name))
    below = [pid or os.getpid()]
    for one in below:
        below += found.get(one, [])
        yield from found.get(one, [])


class Command:
    """`python -m from_scratch` in a process group of its own, as a shell would start it."""

    def __init__(self, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "from_scratch", *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def until_epoch(self, number: int) -> None:
        for line in self.process.stdout:
            if line.split()[:1] == [str(number)]:
                return
        raise AssertionError(self.process.stderr.read())

    def ended(self, timeout: float = PATIENCE) -> tuple[int, str]:
        """The exit status, and what it said on standard error."""
        drain = threading.Thread(target=self.process.stdout.read)
        drain.start()
        try:
            told = self.process.stderr.read() if not self._hangs(timeout) else "hangs"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        drain.join()
        return self.process.wait(), told

    def _hangs(self, timeout: float) -> bool:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return True
        return False


LONG = ("--workers", "3", "--epochs", "1000", "--train-size", "64", "--batch-size", "32")


def test_a_killed_worker_ends_the_command() -> None:
    command = Command("--strategy", "ring_all_reduce", *LONG)
    command.until_epoch(2)
    below = list(children(command.process.pid))
    newest = max(below, key=lambda pid: (psutil.Process(pid).create_time(), pid))
    os.kill(newest, signal.SIGKILL)
    code, told = command.ended()
    assert code == 1
    assert re.fullmatch(r"from_scratch: worker 2 was killed by SIGKILL \(exit code -9\)\n", told)
    assert gone(below)


@pytest.mark.parametrize(
    ("number", "to_all", "code", "told"),
    [
        (signal.SIGINT, True, 130, "from_scratch: stopped\n"),
        (signal.SIGTERM, False, 143, ""),
        (signal.SIGKILL, False, -signal.SIGKILL, None),  # some parts of Python's warn
    ],
)
def test_a_signal_leaves_no_process(number: int, to_all: bool, code: int, told: str | None) -> None:
    """Ctrl-C reaches the whole group; a kill only the command itself."""
    command = Command("--strategy", "ring_all_reduce", *LONG)
    command.until_epoch(2)
    below = list(children(command.process.pid))
    assert len(below) >= 3
    (os.killpg if to_all else os.kill)(command.process.pid, number)
    command.process.wait(PATIENCE)
    assert gone(below)
    ended, said = command.ended()
    assert ended == code
    assert told in (None, said)


def gone(pids: list[int]) -> bool:
    """Whether all have ended within a few seconds."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_strategies_learn_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command on the digits: same seed, same accuracy, whoever averages."""
    forkserver.ensure_running()  # before the command tells it to import less than other tests need
    results = []
    for strategy, n in (("ring_all_reduce", 2), ("param_server", 3), ("ddp", 2)):
        out = tmp_path / f"{strategy}.json"
        flags = ["--n_gpus", str(n), "--epochs", "4", "--batch_size", "32", "--out", str(out)]
        assert main(["--strategy", strategy, *flags]) == 0
        told = capsys.readouterr()
        assert told.err == "" and "weights are equal, bit for bit" in told.out
        results.append(json.loads(out.read_text()))
    for result in results:
        assert result["replicas_equal"] and result["updates"] == 4 * 45
        assert result["accuracy"] > 0.85
        assert [epoch["loss"] for epoch in result["epochs"]] == pytest.approx(
            [epoch["loss"] for epoch in results[0]["epochs"]], rel=1e-2
        )
        assert abs(result["accuracy"] - results[0]["accuracy"]) < 0.01
