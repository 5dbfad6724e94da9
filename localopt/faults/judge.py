"""Who is lost, as one rank sees it, and what is said of that."""

from __future__ import annotations

import time

from ..errors import ranks_text
from .beats import BeatExchange, Status, Verdict

GONE = ("", "Z", "X")  # states in /proc of a process that does nothing any more


class Judge:
    """Looks at the other ranks' beats, and at this rank's own progress.

    Args:
        rank: of this process.
        me: this rank, for people.
        post: the beats.
        beat, dead_after, stall_after, advice: as for `Watch`.

    Attributes:
        excused: since when silence counts: this process was held up before.
    """

    def __init__(
        self,
        rank: int,
        me: str,
        post: BeatExchange,
        beat: float,
        dead_after: float,
        stall_after: float,
        advice: str,
    ) -> None:
        self._rank, self._me, self._post = rank, me, post
        self._beat, self._dead_after, self._stall_after = beat, dead_after, stall_after
        self._advice = advice
        self._paused = 0.0
        self.start()

    def start(self) -> None:
        """The watch begins."""
        self._awake = self.excused = time.monotonic()

    def wake(self, now: float) -> None:
        """Take note that this process runs, and whether it was held up since the last time."""
        if now - self._awake > self._beat + self._dead_after / 2:
            # It was stopped, or starved: what it has not heard proves nothing.
            self._paused, self.excused = now - self._awake, now
        self._awake = now

    def judge(self, now: float, status: Status) -> Verdict | None:
        """The verdict to carry out now, if any; ``status`` is this rank's own."""
        post = self._post
        if post.settled:
            return post.verdict
        if post.error:
            return None if post.parted else self._by_me(self._store_lost())
        if post.verdict:
            return None  # it is on its way to the others
        if now - max(post.read, self.excused) > self._dead_after + self._beat:
            return self._by_me(self._store_silent())
        if text := self._accusation(now, status):
            post.accuse(self._by_me(text))
        return None

    def _by_me(self, text: str) -> Verdict:
        note = ""
        if self._paused:
            note = f" ({self._me} was itself held up for {self._paused:.0f} s before)"
        return Verdict(self._rank, f"{text}{note}; {self._advice}")

    def _accusation(self, now: float, status: Status) -> str:
        """Who is lost, as seen from here; "" while nobody is."""
        post = self._post
        for rank, beat in post.beats.items():
            if beat.status.left:
                continue
            if beat.process.state(post.process) in GONE:
                # It may have taken leave just now: that has been read when an exchange began later.
                if post.began > post.gone.setdefault(rank, now):
                    return self._died(rank)
            elif post.read - max(post.changed[rank], self.excused) > self._dead_after:
                return self._silent(rank)
        waited = now - max(post.started, self.excused)
        if post.absent and waited > self._stall_after:
            absent = ranks_text(sorted(post.absent))
            return f"{absent} did not begin to train within {waited:.0f} s: hangs or has died"
        return self._stalled(status)

    def _stalled(self, status: Status) -> str:
        """Whether this rank hangs, or all wait for each other."""
        still = status.still
        if still <= self._stall_after:
            return ""
        if not status.collective:
            return (
                f"{self._me} hangs ({status.doing} at step {status.step}, without progress "
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

    def _name(self, rank: int) -> str:
        known = rank != self._rank and rank in self._post.beats
        host = f" on {self._post.beats[rank].process.host}" if known else ""
        return self._me if rank == self._rank else f"rank {rank}{host}"

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
            return f"{self._me} has lost the store: its keeper, a launcher, has died ({error})"
        for _ in range(20):
            state = post.beats[keeper].process.state(post.process)
            if state is None or state in GONE:
                break
            time.sleep(0.05)
        if state in GONE:
            return self._died(keeper)
        return f"{self._name(keeper)} has died (connection lost; {self._last(keeper)})"

    def _store_silent(self) -> str:
        keeper = self._post.keeper
        if keeper is None:
            return f"{self._me} hears nothing from the store for {self._dead_after:g} s"
        return self._silent(keeper)
