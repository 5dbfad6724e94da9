"""What ranks say of themselves while they train, through the process group's store."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ..collective import Collective
from . import control

EMPTY = "-"  # what a key holds that all ranks read and the first of them writes


def process(pid: int) -> tuple[str, str]:
    """A process's state, "" when there is none, and when it started: numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


@dataclass(frozen=True)
class Process:
    """Where a rank runs.

    Attributes:
        host: the host's name.
        system: which boot of which system, and whose process numbers; "" where that is hidden.
        pid: number of the process.
        started: when it started.
    """

    host: str
    system: str
    pid: int
    started: str

    @classmethod
    def here(cls) -> Process:
        system = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            system = f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
        return cls(socket.gethostname(), system, os.getpid(), process(os.getpid())[1])

    def state(self, here: Process) -> str | None:
        """The process's state, "" when it has gone; None where it cannot be seen from ``here``."""
        if not here.system or (self.host, self.system) != (here.host, here.system):
            return None
        state, started = process(self.pid)
        return state if started == self.started else ""


@dataclass(frozen=True)
class Status:
    """What a rank's main thread does.

    Attributes:
        step: the step it makes or made last.
        doing: in words.
        collective: whether that is waiting for other ranks.
        still: seconds since it last moved.
        proposal: the step at which it can stop, once a stop has been asked for.
        left: whether it has ended its watch in order.
    """

    step: int = 0
    doing: str = ""
    collective: bool = False
    still: float = 0.0
    proposal: int | None = None
    left: bool = False


@dataclass(frozen=True)
class Beat:
    """One rank's sign of life.

    Attributes:
        process: where it runs.
        keeps: whether the store lives in its process.
        count: beats so far.
        heard: whether it knows the verdict.
        parted: whether it knows that the rank which keeps the store has left.
        status: what it does.
    """

    process: Process
    keeps: bool
    count: int
    heard: bool
    parted: bool
    status: Status

    def encode(self) -> str:
        return json.dumps(vars(self) | {"process": vars(self.process), "status": vars(self.status)})

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        fields = json.loads(text)
        process, status = Process(**fields.pop("process")), Status(**fields.pop("status"))
        return cls(**fields, process=process, status=status)


@dataclass(frozen=True)
class Verdict:
    """Why the run is over.

    Attributes:
        by: the rank that says so.
        text: for people, in one line.
        failure: whether rank ``by`` failed by itself, and says why itself.
    """

    by: int
    text: str
    failure: bool = False


class BeatExchange:
    """Brings this rank's beats to the store and the other ranks' from there, in a thread.

    Args:
        collective: the ranks.
        beat: seconds between beats.
        dead_after: seconds without a sign after which a rank is not waited for.
        status: what this rank's main thread does.
        news: called after each exchange.

    Attributes:
        beats: the other ranks' last beats.
        changed: when each of them was seen to change.
        began: when the last complete exchange began.
        read: when it ended.
        absent: ranks that have not begun yet.
        stop: signal and reason of the stop that was asked for first.
        verdict: what all ranks go by.
        settled: whether the verdict may be carried out: who needs this process knows it.
        gone: ranks whose processes have gone, and when that was seen; filled by the reader.
        error: why the store can no longer be used.
    """

    def __init__(
        self,
        collective: Collective,
        beat: float,
        dead_after: float,
        status: Callable[[], Status],
        news: Callable[[BeatExchange], None],
    ) -> None:
        self.rank, self.process = collective.rank, Process.here()
        self._store = control._store(collective, "watch")
        base = self._store
        while isinstance(base, dist.PrefixStore):
            base = base.underlying_store
        self._connects = isinstance(base, dist.TCPStore)
        self._keeps = self._connects and "TCPServer" in repr(base)
        self._beat, self._dead_after, self._status, self._news = beat, dead_after, status, news
        self._others = set(range(collective.world_size)) - {self.rank}
        self.absent = set(self._others)
        self.beats: dict[int, Beat] = {}
        self.changed: dict[int, float] = {}
        self.started = self.began = self.read = time.monotonic()
        self.stop: tuple[int, str] | None = None
        self.verdict: Verdict | None = None
        self.settled = False
        self.gone: dict[int, float] = {}
        self.error: Exception | None = None
        self._said: Beat | None = None
        self._request = self._accusation = ""
        self._since = math.inf  # when the verdict came, or this rank left
        self._wake = threading.Event()
        self.thread = threading.Thread(target=self._run, name="localopt-post", daemon=True)

    @property
    def keeper(self) -> int | None:
        """The rank whose process keeps the store, as far as known."""
        return next((rank for rank, beat in self.beats.items() if beat.keeps), None)

    @property
    def parted(self) -> bool:
        """Whether the rank that keeps the store has left in order."""
        return any(beat.keeps and beat.status.left for beat in self.beats.values())

    def hurry(self) -> None:
        """Exchange now."""
        self._wake.set()

    def ask_stop(self, number: int, reason: str) -> None:
        """Ask all ranks to agree on a stop."""
        self._request = json.dumps([number, reason])
        self.hurry()

    def accuse(self, verdict: Verdict) -> None:
        """Propose a verdict; the first that reaches the store stands."""
        self._accusation = json.dumps(vars(verdict))
        self.hurry()

    def _run(self) -> None:
        store = None
        try:
            # A FileStore counts its objects, and removes the file when as many as ranks have gone.
            store = control.cloned(self._store) if self._connects else self._store
            store.set_timeout(timedelta(seconds=self._dead_after))
            store.compare_set("stop", "", EMPTY)
            store.compare_set("verdict", "", EMPTY)
            self._exchange(store)
            self._news(self)
            while not self._over():
                left = self._said is not None and self._said.status.left
                urgent = self.absent or self.stop or self.verdict or left
                self._wake.wait(self._beat / 10 if urgent else self._beat)
                self._wake.clear()
                self._exchange(store)
                self._news(self)
            self.settled = self.verdict is not None
        except Exception as error:  # whatever a store raises, the other thread reports it
            if self.verdict is None:
                self.error = error
            else:  # the keeper had read that this rank knows it, and has gone
                self.settled = True
        finally:
            del store  # closes its connection
            self._news(self)

    def _exchange(self, store: dist.Store) -> None:
        """Write this rank's beat, read the others'."""
        began = time.monotonic()
        if self._request:
            store.compare_set("stop", EMPTY, self._request)
            self._request = ""
        if self._accusation:
            store.compare_set("verdict", EMPTY, self._accusation)
            self._accusation = ""
        count = self._said.count + 1 if self._said else 0
        heard, status = self.verdict is not None, self._status()
        self._said = Beat(self.process, self._keeps, count, heard, self.parted, status)
        store.set(f"beat/{self.rank}", self._said.encode())
        self.absent = {rank for rank in self.absent if not store.check([f"beat/{rank}"])}
        ranks = sorted(self._others - self.absent)
        stop, verdict, *beats = store.multi_get(
            ["stop", "verdict", *(f"beat/{rank}" for rank in ranks)]
        )
        now = time.monotonic()
        for rank, text in zip(ranks, beats, strict=True):
            theirs = Beat.decode(text)
            if rank not in self.beats or theirs.count != self.beats[rank].count:
                self.changed[rank] = now
            self.beats = self.beats | {rank: theirs}
        if stop.decode() != EMPTY:
            self.stop = tuple(json.loads(stop))
        if verdict.decode() != EMPTY:
            self.verdict = self.verdict or Verdict(**json.loads(verdict))
        if self.verdict or status.left:
            self._since = min(self._since, now)
        self.began, self.read = began, now

    def _over(self) -> bool:
        """Whether this rank has said and heard all, and nobody needs the store it keeps."""
        said, now = self._said, time.monotonic()
        if said is None or not (said.heard or said.status.left):
            return False
        if not self._keeps:
            return True
        return now > self._since + self._dead_after or all(
            beat.status.left or (beat.heard if said.heard else beat.parted)
            for rank, beat in self.beats.items()
            if rank not in self.gone and now - self.changed[rank] < self._dead_after
        )
