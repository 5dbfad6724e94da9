"""The watch that each rank keeps while it trains: an agreed stop, and an end when a rank is lost.

Two daemon threads per rank, none on the step's path. One exchanges beats with the other ranks
through the process group's store. c10d's operations do not return while the process that keeps
the store is stopped, whatever their time-out (cancelling a wait waits for an answer, too), so
the other thread, which never touches the store, hears signals, judges and ends the process.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from ..collective import Collective, waiting
from ..errors import AbsentRankError, CollectiveError, ranks_text
from .beats import BeatExchange, Status, Verdict, process
from .wakeup import Wakeup

_BEHIND = 0.05  # seconds for a SIGINT that came before a SIGTERM, and is handled after it
DEAD = 3  # exit status of a rank that ends because of another
_ADVICE = "resume from the newest checkpoint"
_GONE = ("", "Z", "X")  # states in /proc of a process that does nothing any more


class Watch:
    """Agrees on where to stop, and ends the run on all ranks when one is lost.

    A context manager. Within it, SIGTERM or SIGINT to any rank (or the end of a process in
    ``watch_parent``) stops all ranks before the same step; a second SIGINT exits at once with
    130, more SIGTERMs change nothing. A rank that is lost is named in one line, and all ranks
    exit with status 3:

    - its process has gone, on this host: after about two beats;
    - it gives no sign of life (killed on another host, SIGSTOP, a host without network, Python
      held up by a call that never lets other threads run): after ``dead_after``;
    - the process that keeps the store (rank 0, or a launcher) has gone: at once, on all hosts;
      is stopped: after ``dead_after`` and a beat;
    - its main thread does not move, outside collectives: after ``stall_after``;
    - all ranks wait in collectives: after ``stall_after``.

    A rank that leaves the context in order is missed by nobody. One that leaves it by an
    exception ends the others, which name it. Cost: 0.25 µs a step (`begin`), and a beat, one
    write and one read of ``world_size`` short notes, in other threads.

    Args:
        collective: the ranks, all by default; every one must make a watch, in the same order of
            calls.
        beat: seconds between signs of life.
        dead_after: seconds without one after which a rank is dead; more than the longest call
            that holds the interpreter.
        stall_after: seconds after which a main thread that does not move hangs; more than the
            longest step and the longest time between `touch`es.
        on_death: called on every rank, in a thread, with the line that says why the run is over;
            it must end the process, whose main thread may be in a collective for ever. None
            prints the line on one rank (on each, where the store is lost) and exits.
        advice: what to do, the end of that line.
        signals: those that ask for a stop; the watch is made and left in the main thread, unless
            there are none.
        watch_parent: processes whose end asks for a stop, too: launchers.

    Attributes:
        signal: the signal that asked for a stop, first of all ranks; None if none did.
        reason: that in words.
        verdict: the line that says why the run is over; None while it is not.
        first: whether this rank is the one to print it.
        failed: whether this rank has told the others, by `fail`, that it ends.
    """

    def __init__(
        self,
        collective: Collective | None = None,
        *,
        beat: float = 1.0,
        dead_after: float = 30.0,
        stall_after: float = 600.0,
        on_death: Callable[[str], NoReturn] | None = None,
        advice: str = _ADVICE,
        signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT),
        watch_parent: Sequence[int] = (),
    ) -> None:
        collective = collective or Collective()
        self._rank, self._host = collective.rank, socket.gethostname()
        self._beat, self._dead_after, self._stall_after = beat, dead_after, stall_after
        self._on_death, self._advice, self._signals = on_death or self._end, advice, signals
        self._parents = {pid: process(pid)[1] for pid in watch_parent}
        self._interrupts = 0
        self.signal: int | None = None
        self.reason = ""
        self.verdict: str | None = None
        self.first = False

        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._limit: float = math.inf  # begin() lets no step after this one pass
        self._running = 0  # the step that the main thread makes, or made last
        self._proposal: int | None = None
        self._stop: int | None = None
        self._touches = 0
        self._phase = "training"
        self._deciding = self._handles = self.failed = self._left = self._closed = False
        self._moved: tuple[Any, ...] = ()
        self._moved_at = self._awake = self._excused = time.monotonic()
        self._paused = 0.0

        self._post: BeatExchange | None = None
        if collective.world_size > 1:
            self._post = BeatExchange(collective, beat, dead_after, self._status, self._news)
        self._wakeup: Wakeup | None = None
        self._guard = threading.Thread(target=self._keep, name="localopt-watch", daemon=True)

    # What the main thread calls.

    def __enter__(self) -> Self:
        self._wakeup = Wakeup(self._signals)
        self._moved_at = self._awake = self._excused = time.monotonic()
        self._guard.start()
        if self._post:
            self._post.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        in_order = kind is None or (isinstance(error, SystemExit) and not error.code)
        if not in_order:
            message = f"{kind.__name__}: {error}" if str(error) else kind.__name__
            self._fail(message, waiting.failed or _of_others(error))
            if self.verdict and self.first and not self.failed:
                error.add_note(self.verdict)  # the threads are about to tell it, and come too late
        self.close()

    def close(self) -> None:
        """Take leave of the other ranks, end the threads, give the signals back.

        The rank whose process keeps the store waits until the others know, at most a beat.
        """
        with self._changed:
            if self._left or self._wakeup is None:
                return
            self._left = True
            self._changed.notify_all()
        if self._post:
            self._post.hurry()
            self._post.thread.join(self._dead_after + self._beat)  # longer: the store is lost
        self._closed = True
        self._wakeup.wake()
        self._guard.join()
        self._wakeup.close()

    def begin(self, step: int) -> bool:
        """Whether this rank may make one more step; False where all ranks stop.

        Cost: 0.25 µs, until a stop has been asked for; then it waits, at most once, until all
        ranks have said how far they are.

        Args:
            step: steps made so far, one more at each call.
        """
        with self._lock:
            if step < self._limit:
                self._running = step + 1
                return True
        return self._settle(step)

    def touch(self) -> None:
        """Say that this rank is alive, in what takes long outside of steps."""
        self._touches += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what this rank does: "evaluating"."""
        outer, self._phase = self._phase, name
        self._touches += 1
        try:
            yield
        finally:
            self._phase = outer
            self._touches += 1

    def fail(self, message: str) -> None:
        """Tell the other ranks that this one ends, and why; they end too.

        After a collective that failed this waits as `explain` does: another rank may be the
        reason. Otherwise it takes at most two seconds.
        """
        self._fail(message, waiting.failed)

    def _fail(self, message: str, perhaps_another: bool) -> None:
        if self._post is None or self.verdict or (perhaps_another and self.explain()):
            return
        step, line = self._running, " ".join(message.split())
        text = f"{self._name()} stopped: {line} (at step {step}); {self._advice}"
        with self._changed:
            self.failed = True
            self._changed.notify_all()
            self._post.accuse(Verdict(self._rank, text, failure=True))
            self._changed.wait_for(lambda: self._post.settled or self._post.error, 2.0)

    def explain(self, seconds: float | None = None) -> str | None:
        """Wait for a verdict that explains why a collective has failed.

        If there is one, its end is the caller's business from then on: `on_death` is called only
        if the process is still in the context ``stall_after`` later.

        Args:
            seconds: how long; None waits as long as it takes to find a rank dead.
        """
        patience = self._dead_after + 2 * self._beat + 1 if seconds is None else seconds
        with self._changed:
            self._handles = True
            self._changed.wait_for(lambda: self.verdict, patience if self._post else 0)
            self._handles = self.verdict is not None
        return self.verdict

    # Agreement. All of it under the lock; the threads alone bring it about, so that a rank whose
    # main thread waits in a collective for another one takes part.

    def _settle(self, step: int) -> bool:
        """Wait until the stop is known; whether ``step`` lies before it."""
        with self._changed:
            self._deciding = True
            self._changed.wait_for(lambda: self._stop is not None)
            self._deciding = False
            if step >= self._stop:
                return False
            self._running = step + 1
            return True

    def _hear_stop(self, number: int, reason: str) -> None:
        self.signal, self.reason = number, reason
        if self._proposal is None:
            # The main thread ends the step it is in, and makes no other until all have said so.
            self._limit = self._proposal = self._running

    def _decide(self) -> None:
        """stop = the largest proposal; of a rank that has left, the last step."""
        if self._proposal is None or self._stop is not None:
            return
        proposals: list[int | None] = [self._proposal]
        if self._post and not (self._post.error and self._post.parted):
            statuses = [beat.status for beat in self._post.beats.values()]
            proposals += [s.step if s.left else s.proposal for s in statuses]
            if self._post.absent or None in proposals:
                return
        self._limit = self._stop = max(proposals)
        self._changed.notify_all()

    def _status(self) -> Status:
        """What the main thread does: the post's thread tells the others."""
        with self._lock:
            still = time.monotonic() - self._moved_at
            inside, proposal = waiting.depth > 0, self._proposal
            doing = "in a collective" if inside else self._phase
            return Status(self._running, doing, inside, still, proposal, self._left)

    def _news(self) -> None:
        """In the post's thread, after each exchange."""
        with self._changed:
            if self._post.stop:
                self._hear_stop(*self._post.stop)
            self._decide()
            self._changed.notify_all()
        if self._post.verdict or self._post.error:
            self._wakeup.wake()

    # The thread that judges.

    def _keep(self) -> None:
        while not self._closed:
            self._heed(self._wakeup.wait(self._beat))
            now = time.monotonic()
            if now - self._awake > self._beat + self._dead_after / 2:
                # This process was stopped, or starved: what it has not heard proves nothing.
                self._paused, self._excused = now - self._awake, now
            self._awake = now
            self._notice(now)
            if self._post and not self._left and (verdict := self._judge(now)):
                return self._carry_out(verdict)

    def _heed(self, numbers: Sequence[int]) -> None:
        """Turn signals, and launchers that have gone, into a request to stop."""
        if signal.SIGTERM in numbers and signal.SIGINT in self._signals:
            # Ctrl-C reaches a launcher, too, which passes it on as SIGTERM. Of signals that came
            # while this process did not run, the last one is handled first.
            numbers = sorted([*numbers, *self._wakeup.wait(_BEHIND)], key=signal.SIGINT.__ne__)
        self._interrupts += numbers.count(signal.SIGINT)
        if self._interrupts > 1:
            os._exit(128 + signal.SIGINT)
        reasons = [(n, f"{signal.Signals(n).name} on {self._name()}") for n in numbers]
        for pid, started in self._parents.items():
            state, now_started = process(pid)
            if state in _GONE or now_started != started:
                reason = f"the launcher of {self._name()} (process {pid}) has ended"
                reasons.append((signal.SIGTERM, reason))
        if not reasons or self._proposal is not None:
            return
        with self._changed:
            self._hear_stop(*reasons[0])
            self._decide()
        if self._post:
            self._post.ask_stop(*reasons[0])

    def _notice(self, now: float) -> None:
        """Whether the main thread has moved since the last look."""
        moved = (self._running, self._touches, waiting.count, waiting.depth, self._deciding)
        if moved != self._moved or self._deciding or now == self._excused:
            with self._lock:
                self._moved, self._moved_at = moved, now

    def _judge(self, now: float) -> Verdict | None:
        """The verdict to carry out now."""
        post = self._post
        if post.settled:
            return post.verdict
        if post.error:
            return None if post.parted else self._by_me(self._store_lost())
        if post.verdict:
            return None  # others are being told
        if now - max(post.read, self._excused) > self._dead_after + self._beat:
            return self._by_me(self._store_silent())
        if text := self._accusation(now):
            post.accuse(self._by_me(text))
        return None

    def _by_me(self, text: str) -> Verdict:
        note = ""
        if self._paused:
            note = f" ({self._name()} was itself held up for {self._paused:.0f} s before)"
        return Verdict(self._rank, f"{text}{note}; {self._advice}")

    def _accusation(self, now: float) -> str:
        """Who is lost, as seen from here; "" while nobody is."""
        post = self._post
        for rank, beat in post.beats.items():
            if beat.status.left:
                continue
            if beat.process.state(post.process) in _GONE:
                # It may have taken leave just now: that has been read when an exchange began later.
                if post.began > post.gone.setdefault(rank, now):
                    return self._died(rank)
            elif post.read - max(post.changed[rank], self._excused) > self._dead_after:
                return self._silent(rank)
        waited = now - max(post.started, self._excused)
        if post.absent and waited > self._stall_after:
            absent = ranks_text(sorted(post.absent))
            return f"{absent} did not begin to train within {waited:.0f} s: hangs or has died"
        return self._stalled(now)

    def _stalled(self, now: float) -> str:
        """Whether this rank hangs, or all wait for each other."""
        still, status = now - self._moved_at, self._status()
        if still <= self._stall_after:
            return ""
        if not status.collective:
            return (
                f"{self._name()} hangs ({status.doing} at step {status.step}, without progress "
                f"for {still:.0f} s)"
            )
        beats = self._post.beats
        others = {rank: beat.status for rank, beat in beats.items() if not beat.status.left}
        if not all(s.collective and s.still > self._stall_after for s in others.values()):
            return ""
        steps = {rank: s.step for rank, s in others.items()} | {self._rank: status.step}
        last, most = min(steps.values()), max(steps.values())
        behind = sorted(rank for rank, step in steps.items() if step == last)
        named = ", ".join(self._name(rank) for rank in behind)
        where = f"at step {last}" + (f", the others up to step {most}" if last < most else "")
        return f"all ranks have waited in a collective for {still:.0f} s: {named} {where}"

    # What is said.

    def _name(self, rank: int | None = None) -> str:
        host, rank = self._host, self._rank if rank is None else rank
        if rank != self._rank and rank in self._post.beats:
            host = self._post.beats[rank].process.host
        return f"rank {rank} on {host}"

    def _last(self, rank: int) -> str:
        status = self._post.beats[rank].status
        return f"last at step {status.step}, {status.doing}"

    def _died(self, rank: int) -> str:
        pid = self._post.beats[rank].process.pid
        return f"{self._name(rank)} has died (process {pid} has gone; {self._last(rank)})"

    def _silent(self, rank: int) -> str:
        stopped = self._post.beats[rank].process.state(self._post.process) in ("T", "t")
        what = "is stopped" if stopped else "has died or hangs"
        seconds = f"no sign of life for {self._dead_after:g} s"
        return f"{self._name(rank)} {what} ({seconds}; {self._last(rank)})"

    def _store_lost(self) -> str:
        """Why the store's connection broke: a process that dies closes it before it has gone."""
        keeper, post = self._post.keeper, self._post
        if keeper is None:
            error = " ".join(str(post.error).split())[:200]
            if 0 in post.absent:
                return f"rank 0, or a launcher, has died before it began, and the store ({error})"
            return f"{self._name()} has lost the store: its keeper, a launcher, has died ({error})"
        for _ in range(20):
            state = post.beats[keeper].process.state(post.process)
            if state is None or state in _GONE:
                break
            time.sleep(0.05)
        if state in _GONE:
            return self._died(keeper)
        return f"{self._name(keeper)} has died (connection lost; {self._last(keeper)})"

    def _store_silent(self) -> str:
        keeper = self._post.keeper
        if keeper is None:
            return f"{self._name()} hears nothing from the store for {self._dead_after:g} s"
        return self._silent(keeper)

    # The end.

    def _carry_out(self, verdict: Verdict) -> None:
        """End this process, unless its main thread is about to do so itself."""
        with self._changed:
            self.verdict, self.first = verdict.text, verdict.by == self._rank
            self._changed.notify_all()
        if verdict.failure:  # where all ranks raise the same, each may say so itself
            self._wait(lambda: self._handles or self.failed or self._left, 2 * self._beat)
        if self._handles or self.failed:
            self._wait(lambda: self._left, self._stall_after)
        if not self._left:
            self._on_death(verdict.text)

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for the main thread, with an ear for the second SIGINT."""
        end = time.monotonic() + seconds
        while not condition() and (rest := end - time.monotonic()) > 0:
            self._heed(self._wakeup.wait(min(rest, self._beat)))

    def _end(self, message: str) -> NoReturn:
        """Print and exit. Nothing here can wait for the main thread, or for a full pipe."""
        flush = threading.Thread(target=_print, args=(message if self.first else "",), daemon=True)
        flush.start()
        flush.join(1.0)
        os._exit(DEAD)


def _of_others(error: BaseException) -> bool:
    """Whether an error, or one that it comes from, is of what ranks have in common.

    A collective, or the store: any thread may have asked that when its keeper was gone.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, (dist.DistError, CollectiveError, AbsentRankError)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _print(message: str) -> None:
    """Write the line, then what the program has printed so far."""
    if message:
        os.write(2, f"{message}\n".encode())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
