"""The other ranks that one launcher has started on this host, until all have met.

Afterwards `localopt.Watch` looks after all ranks. Until then nobody else would say whose process
was killed: DeepSpeed's launcher ends the others without a word.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from . import launchers

_LOOK = 0.1  # seconds; DeepSpeed's launcher looks once a second, torchrun ten times
DEAD = 3  # exit status of a rank that ends because of another


class Siblings:
    """Looks after them in a thread, from `start` to `stop`.

    Where one was killed by a signal, the lowest of the other ranks here says so, and ends.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, str]] = {}  # by rank: process, when it started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="siblings", daemon=True)

    def start(self) -> None:
        """Begin to look, where there is somebody to look after."""
        if launchers.replicas_here() > 1 and launchers.below_one():
            self._thread.start()

    def stop(self) -> None:
        """All have met."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK):
            if len(self._known) < launchers.replicas_here() - 1:
                self._known |= found(self._known)
            for rank, (pid, started) in self._known.items():
                if (number := killed_by(pid, started)) and not self._stop.is_set():
                    self._end(rank, pid, number)

    def _end(self, rank: int, pid: int, number: int) -> None:
        others = [launchers.rank(), *(other for other in self._known if other != rank)]
        if launchers.rank() == min(others):
            name = signal.Signals(number).name
            line = f"rank {rank} on {socket.gethostname()} was killed by {name} before training "
            line += f"began (process {pid})"
            with contextlib.suppress(OSError):
                os.write(sys.__stderr__.fileno(), f"main.py: {line}\n".encode())
        os._exit(DEAD)


def found(known: Mapping[int, tuple[int, str]]) -> dict[int, tuple[int, str]]:
    """By rank: number of the process, and when it started. As far as they can be seen.

    One that was killed has no environment any more that would say its rank: of those it is the next
    whose process is not known.
    """
    parent, processes, nameless = os.getppid(), dict(known), []
    with contextlib.suppress(OSError):
        children = Path("/proc", str(parent), "task", str(parent), "children").read_text()
        for child in map(int, children.split()):
            with contextlib.suppress(OSError, ValueError, IndexError):
                process = child, _status(child)[19]
                if child == os.getpid() or process in processes.values():
                    continue
                if killed_by(*process):
                    nameless.append(process)
                    continue
                environment = Path("/proc", str(child), "environ").read_bytes().split(b"\0")
                if ranks := [item[5:] for item in environment if item.startswith(b"RANK=")]:
                    processes[int(ranks[0])] = process
    missing = [r for r in launchers.ranks_here() if r not in (*processes, launchers.rank())]
    return processes | dict(zip(missing, nameless, strict=False))


def killed_by(pid: int, started: str) -> int:
    """The signal that ended a process which nobody has waited for yet; 0 if none did."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = _status(pid)
        if status[0] == "Z" and status[19] == started:
            return int(status[49]) & 0x7F
    return 0


def _status(pid: int) -> list[str]:
    """What /proc says of it, from its state on: the name before that may hold spaces."""
    return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
