"""What a run says of itself while it begins, and how far it is. Without torch: to be there at once.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import datetime
from pathlib import Path

from . import launchers
from .config import Config
from .values import absolute

_started = time.monotonic()
_stamp = ""


def begin(config: Config, recipe: Path) -> None:
    """The first words, on rank 0: what is about to be trained, by how many, and where it is kept.

    Args:
        config: the run's settings.
        recipe: the file that they are from.
    """
    global _started, _stamp
    _started, _stamp = time.monotonic() - _age(), _now()
    folder = absolute(config.log_pth) / name_of(config)
    where = f"run folder {folder}"
    if config.resume == "auto":
        where = f"goes on with the newest unfinished run like it in {folder.parent}, or begins "
        where += f"in {folder.name}"
    replicas = f"{launchers.replicas()} replicas"
    if launchers.replicas() == 1:
        replicas = "1 replica, so nothing will be synchronised"
    say(f"recipe {recipe.stem}, {replicas}, {where}")
    if remark := launchers.remark():
        say(remark)


def _age() -> float:
    """Seconds since this process was started."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        up = float(Path("/proc/uptime").read_text().split()[0])
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, up - began / os.sysconf("SC_CLK_TCK"))
    return 0.0


def say(line: str) -> None:
    """One line on rank 0, after the seconds since the start."""
    if launchers.rank() == 0:
        print(f"main.py: {time.monotonic() - _started:5.1f} s  {line}", flush=True)


def name_of(config: Config) -> str:
    """The name of this run's folder, if it gets a new one."""
    return f"{config.data}-{config.model}-{config.optimizer}-{_stamp or _now()}"


def _now() -> str:
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")


class Pace:
    """Says how long a run has taken, and how long it will take yet.

    Args:
        total_steps: length of the run.
    """

    def __init__(self, total_steps: int) -> None:
        self._total, self._began = total_steps, time.monotonic()
        self._first: tuple[int, float] | None = None
        self._said = self._began

    def step(self, step: int) -> None:
        """A step is finished. The first one, for which much is compiled, is no measure."""
        if self._first is None:
            self._first = step, time.monotonic()

    def due(self, every: float = 30.0) -> bool:
        """Whether nothing has been said for so many seconds."""
        return time.monotonic() - self._said >= every

    def times(self, step: int) -> str:
        """Time elapsed and left after ``step`` steps."""
        self._said = now = time.monotonic()
        elapsed = f"{clock(now - self._began)} elapsed"
        if self._first is None or step <= self._first[0]:
            return elapsed
        first, since = self._first
        return f"{elapsed}, {clock((now - since) / (step - first) * (self._total - step))} left"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:05, 12:31, 3:00:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
