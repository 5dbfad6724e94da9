"""Where a process's seconds go, and how many bytes it sends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Counts from `restart` on. What is neither sending nor waiting is computing.

    Attributes:
        send: seconds spent on handing data over.
        wait: seconds spent on waiting for what others send.
        bytes: sent, without what the pipes add: 4 bytes per message.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.send = self.wait = 0.0
        self.bytes = 0
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the restart."""
        return time.perf_counter() - self._start

    @contextmanager
    def sending(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.send += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wait += time.perf_counter() - start
