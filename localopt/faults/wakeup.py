"""A thread that sleeps until it is called, or a signal comes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Sequence


class Wakeup:
    """Wakes a thread, by `wake` or by a signal, also when the main thread is deep in C++.

    Args:
        signals: those to take over; in the main thread, unless empty.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = -1
        self._handlers = {number: signal.signal(number, _noticed) for number in signals}
        if signals:
            descriptor = self._writer.fileno()
            self._before = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: nobody waits
            os.write(self._writer.fileno(), b"\0")

    def wait(self, seconds: float) -> list[int]:
        """Wait to be woken; return the signals that have come."""
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        if not poll.poll(1000 * seconds):
            return []
        come = os.read(self._reader.fileno(), 4096)
        return [number for number in come if number in self._handlers]

    def close(self) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._before)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._reader.close()
        self._writer.close()


def _noticed(number: int, frame: object) -> None:
    """A signal's handler: the wake-up descriptor wakes the thread that waits for it."""
