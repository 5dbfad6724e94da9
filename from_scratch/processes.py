"""Starts a strategy's processes, hears from them, and ends all of them when one fails.

Processes come from a fork server: it imports torch once, and a copy of it starts in milliseconds,
which is safe with CUDA as well, for the server never touches a GPU.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import multiprocessing

from .meter import Meter
from .task import Replica, Task

context = multiprocessing.get_context("forkserver")

PATIENCE = 0.5  # seconds in which to hear of a failure's cause when its consequence came first


class WorkerError(Exception):
    """A process raised or died; the message names it."""


@dataclass(frozen=True)
class Row:
    """What one process says of one epoch. `loss` is the sum over the images of its shards."""

    epoch: int
    seconds: float
    send: float
    wait: float
    bytes: int
    loss: float
    accuracy: float | None

    @property
    def compute(self) -> float:
        return self.seconds - self.send - self.wait


@dataclass(frozen=True)
class Peer:
    """What a process knows of the run that it takes part in.

    Attributes:
        rank, world_size: which process this is, and of how many.
        device: where it computes.
        folder: the run's own, removed after it.
        meter: for the strategy to fill.
    """

    rank: int
    world_size: int
    device: torch.device
    folder: str
    meter: Meter
    _start_line: Barrier
    _mailbox: Connection

    def epochs(self, replica: Replica) -> Iterator[int]:
        """Epochs from 0; all processes begin one together. After each, what it took is reported.

        Process 0 evaluates between epochs, while no clock runs.
        """
        for epoch in range(replica.task.epochs):
            replica.loss_sum.zero_()
            self._start_line.wait()
            self.meter.restart()
            yield epoch
            loss = replica.loss_sum.item()  # on a GPU this waits for what is still being computed
            meter, seconds = self.meter, self.meter.seconds
            accuracy = replica.accuracy() if self.rank == 0 else None
            self._mailbox.send(
                Row(epoch, seconds, meter.send, meter.wait, meter.bytes, loss, accuracy)
            )


class _Failure(NamedTuple):
    moment: float  # of the clock that all processes share
    name: str
    story: str


Train = Callable[[Peer, Task, Any], torch.Tensor]


def run(
    train: Train,
    task: Task,
    peers: Mapping[str, Any],
    *,
    gpus: int = 0,
    report: Callable[[str, Row], None] = lambda name, row: None,
) -> list[np.ndarray]:
    """Run `train(peer, task, link)` in a process for each of `peers`, and wait for the end.

    Args:
        train: a function at the top of a module; returns the process's final weights.
        task: given to all of them.
        peers: each process's name and link, in the order of ranks.
        gpus: how many there are to share out; 0 for CPUs.
        report: called here with the name of a process and what it says of an epoch.

    Returns:
        The final weights of each process.

    Raises:
        WorkerError: a process raised or died. Whenever this function ends, so have all of them.
    """
    processes: dict[str, BaseProcess] = {}
    mailboxes: dict[Connection, str] = {}
    start_line = context.Barrier(len(peers))
    with tempfile.TemporaryDirectory(prefix="from_scratch-") as folder:
        try:
            for rank, (name, link) in enumerate(peers.items()):
                ours, theirs = context.Pipe(duplex=False)
                device = torch.device(rank % gpus) if gpus else torch.device("cpu")
                peer = Peer(rank, len(peers), device, folder, Meter(), start_line, theirs)
                processes[name] = context.Process(
                    target=_process, args=(train, peer, task, link), name=name, daemon=True
                )
                processes[name].start()
                mailboxes[ours] = name
                theirs.close()  # or a death would not show: a pipe ends with its last writer
            return _listen(processes, mailboxes, report)
        finally:
            started = [process for process in processes.values() if process.pid]
            for process in started:
                process.kill()
            for process in started:
                process.join()


def start_server(*modules: str) -> None:
    """Start the fork server early, with what it should import once for all processes.

    It and its processes are born deaf to Ctrl-C, which the terminal sends to all of them: it is
    this process that ends them.
    """
    forkserver.set_forkserver_preload(list(modules))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, before)


def _process(train: Train, peer: Peer, task: Task, link: Any) -> None:
    """In a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # else the number of cores, in every process
    try:
        weights = train(peer, task, link)
        peer._mailbox.send(weights.cpu().numpy())
        code = 0
    except BaseException:
        peer._mailbox.send(_Failure(time.monotonic(), "", traceback.format_exc()))
        code = 1
    # Threads, a courier's or gloo's, may be in the middle of something; all has been said.
    os._exit(code)


def _end_with_parent() -> None:
    """Without it, a process whose parent was killed might wait for its neighbours for ever."""
    parent_process().join()
    os._exit(1)


def _listen(
    processes: Mapping[str, BaseProcess],
    mailboxes: dict[Connection, str],
    report: Callable[[str, Row], None],
) -> list[np.ndarray]:
    """Until every process has sent its final weights."""
    final: dict[str, np.ndarray] = {}
    failures: list[_Failure] = []
    deadline = None
    while mailboxes and (ready := wait(list(mailboxes), _left(deadline))):
        for mailbox in ready:
            name = mailboxes[mailbox]
            try:
                message = mailbox.recv()
            except (EOFError, OSError):  # what others say of it is a consequence
                raise WorkerError(f"{name} {_end(processes[name])}") from None
            if isinstance(message, Row):
                report(name, message)
                continue
            del mailboxes[mailbox]
            if isinstance(message, _Failure):
                failures.append(message._replace(name=name))
                deadline = deadline or time.monotonic() + PATIENCE
            else:
                final[name] = message
    if failures:
        first = min(failures)  # the others, of connections that broke, are consequences
        raise WorkerError(f"{first.name} {_end(processes[first.name])}:\n{first.story.rstrip()}")
    return [final[name] for name in processes]


def _left(deadline: float | None) -> float | None:
    """Seconds to wait; None for ever."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _end(process: BaseProcess) -> str:
    """How a process ended that has nothing more to say."""
    process.join(10)  # it is on its way out, and has nothing else to do
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name} (exit code {code})"
    return "failed and has not ended yet" if code is None else f"failed (exit code {code})"
