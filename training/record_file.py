"""metrics.jsonl: what is in it stays there, and a disk that takes no more costs records, no run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoint.files import sync_folder
from .loggers import Logger, Record
from .values import ConfigError

_TAIL = 2**20  # bytes that are looked at for the last record that is whole


def complain(line: str) -> None:
    """Say something in one line on standard error, above a progress bar."""
    tqdm.write(f"main.py: {' '.join(line.split())}", file=sys.stderr)


class RecordFile:
    """One JSON object a line, in the file at once.

    What cannot be written is lost: one line says so when that begins, and one when it is over.

    Args:
        path: the file; new, or that of a run which is continued.
        kept: how much of it the checkpoint has seen, in bytes; what follows is recorded anew. None
            for a new run.
        step: the checkpoint's.

    Raises:
        ConfigError: if it cannot be opened.
    """

    def __init__(self, path: Path, kept: int | None = None, step: int = 0) -> None:
        self._path, self._lost, self._named = path, [], False
        try:
            # Without O_NONBLOCK a named pipe would never be open.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
            self._file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
            if kept is not None and (missing := self._cut(kept, step)):
                complain(missing)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None

    def _cut(self, kept: int, step: int) -> str:
        """Take away what is recorded anew, and a broken end; say what is missing."""
        size = self.size
        end = min(size, kept)
        begin = max(0, end - _TAIL)
        whole, last = _whole(os.pread(self._file.fileno(), end - begin, begin))
        if begin and not whole:
            begin = 0
            whole, last = _whole(os.pread(self._file.fileno(), end, 0))
        if begin + whole != size:
            self._file.truncate(begin + whole)
        if begin + whole >= kept:
            return ""
        gone = "all records" if not whole else f"the records after step {last}"
        return (
            f"{self._path}: {gone} up to step {step} are missing: the checkpoint has seen {kept} "
            f"bytes, and {begin + whole} are there; the run goes on without them"
        )

    @property
    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: Record) -> None:
        """Append a record; its "step" is the number of steps finished."""
        step = record["step"]
        try:
            self._append(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")
        except OSError as error:
            if not self._lost:
                complain(
                    f"{self._path}: {error.strerror}: the record of step {step} is lost, and so "
                    "are those that follow until it can be written again; training goes on"
                )
            self._lost.append(step)
        else:
            self._name_lost("can be written again")

    def _append(self, line: bytes) -> None:
        """Write all of a line, or nothing."""
        size = self.size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise

    def _name_lost(self, now: str) -> None:
        if self._lost:
            first, last = self._lost[0], self._lost[-1]
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            complain(f"{self._path} {now}: {len(self._lost)} records are lost, of {steps}")
            self._lost = []

    def sync(self) -> None:
        """Have what is recorded so far written to the disk, so that a power loss takes none."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
            if not self._named:
                sync_folder(self._path.parent)
                self._named = True
        except OSError as error:
            complain(f"{self._path}: {error.strerror}: a power loss now would take records away")

    def close(self) -> None:
        """No record follows."""
        self._name_lost("ends")
        self._file.close()


def _whole(content: bytes) -> tuple[int, int]:
    """How many bytes end with a record, and the step of that record."""
    end = content.rfind(b"\n")
    while end >= 0:
        begin = content.rfind(b"\n", 0, end) + 1
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            return end + 1, int(json.loads(content[begin:end])["step"])
        end = begin - 1
    return 0, 0


class Guarded:
    """A logger whose errors cost what it was to take, and no run; the first one is said.

    Args:
        logger: where records go besides metrics.jsonl.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger, self._lost = logger, 0
        self._name = type(logger).__name__

    def write(self, record: Record) -> None:
        step = record["step"]
        try:
            self._logger.write(record)
        except Exception as error:  # each has its own; training is worth more than its curves
            self._lost += 1
            if self._lost == 1:
                complain(
                    f"{self._name}: {type(error).__name__}: {error}: the record of step {step} is "
                    "lost there, others may follow; training goes on, metrics.jsonl has them all"
                )

    def preempted(self) -> None:
        self._tried(self._logger.preempted)

    def close(self, *, failed: bool) -> None:
        if self._lost > 1:
            complain(f"{self._name}: {self._lost} records are lost there; metrics.jsonl has them")
        self._tried(lambda: self._logger.close(failed=failed))

    def _tried(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            complain(f"{self._name}: {type(error).__name__}: {error}")


def _finite(value: Any) -> Any:
    """``value`` with None for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
