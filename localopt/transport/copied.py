"""The mean of copies: of all parameters or of a fragment, waited for or behind training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..collective import Collective, Pending
from ..compression import Codec, CompressedMean
from ..errors import ReplicaMismatchError, SyncError
from ..flat import Memory, square_norm
from ..fragments import Fragments
from ..header import Header
from ..meeting import Exchange
from ..replica import Replica
from ..report import waits_of
from ..traffic import Count
from ..vector import Vector
from .in_place import mean_square_norm


@dataclass
class _Flight:
    """A mean that was launched.

    Attributes:
        exchange: the headers that go before it, where they have not been read yet.
        headers: where they have.
        pending, sent: the mean.
        ended: when it was first seen to have ended.
        failed: why it has not arrived.
    """

    exchange: Exchange | None
    headers: dict[int, Header]
    pending: Pending | _Owing
    sent: Memory
    fragment: int | None
    ends_round: bool
    launched: float
    ended: float | None = None
    failed: Exception | None = None


class _Owing(CompressedMean):
    """The mean of changes, and of what is ``lost`` so far, which becomes what is lost now.

    Not before all has arrived: what fails is owed as it was.
    """

    def __init__(
        self, lost: Sequence[Tensor], means: Sequence[Tensor], link: Collective, codec: Codec
    ) -> None:
        means = [d[: len(e)] for d, e in zip(means, lost, strict=True)]
        self._lost, self._changes = lost, [d + e for d, e in zip(means, lost, strict=True)]
        super().__init__(self._changes, means, link, codec)

    def wait(self) -> None:
        super().wait()
        for e, change in zip(self._lost, self._changes, strict=True):
            e.copy_(change)


class Copied:
    """x̄ in memory of its own, of all parameters or of a fragment; `launch`, then `land`.

    Args:
        replica: whose.
        behind: whether it travels behind training, in a group of its own, where nothing waits
            behind it. Headers go where those of all other optimizers go, so that ranks which
            bring different ones find out, and are read when the mean lands. Else they are read
            before anything is sent.
        fragments: into how many the parameters are cut.
        start: z, equal on all replicas: then it is the mean of the changes z - x that is made.
        compress, lost: the codec for these, and the vector that keeps what it loses: see
            `localopt.compression`.
    """

    def __init__(
        self,
        replica: Replica,
        *,
        behind: bool,
        fragments: int | None = None,
        start: Vector | None = None,
        compress: Codec | None = None,
        lost: Vector | None = None,
    ) -> None:
        assert not (behind and compress), "a codec's mean cannot travel behind training"
        self._replica, self._behind, self._start = replica, behind, start
        self._codec, self._lost = compress, lost
        # A codec's mean divides itself, and loses less of whole numbers than of shares.
        self._shares = 1 if compress else replica.collective.world_size
        everyone = replica.collective
        self._link = everyone.subgroup(range(everyone.world_size)) if behind else everyone
        self.fragments = Fragments(replica.flat, fragments) if fragments else None
        self._memory: Memory | None = None
        self._flight: _Flight | None = None

    @torch.no_grad()
    def launch(
        self, settings: object = (), *, fragment: int | None = None, ends_round: bool = True
    ) -> None:
        """Start the mean of the parameters as they are now. Collective.

        What is sent is a copy. One mean at a time: `land` the last one before.

        Args:
            settings: what the rule goes by, to be the same on all ranks.
            fragment: which one; None: all parameters.
            ends_round: whether this ends a round; else it is a part of the synchronisation that
                the round's end will complete.

        Raises:
            RuntimeError: if the parameters were moved out of their memory.
            ReplicaMismatchError, NonFiniteError: as `land`, where headers are read before.
        """
        replica, meeting = self._replica, self._replica.meeting
        replica.check_usable()
        started = meeting.meter.now()
        own = self._part(replica.flat.params, fragment)
        sent = self._copy(own, fragment)
        norm = None
        if self._start is not None and meeting.track_drift and self._codec is None:
            norm = square_norm(sent.params) * self._shares**2
        settings = settings, fragment
        count: Count = "round" if ends_round else "part"
        exchange, headers = None, {}
        if self._behind:
            exchange = meeting.begin(started, settings, own, norm)
        else:
            (headers,) = replica.meet(count=count, settings=settings, own=own, square_norm=norm)
            count, started = "part", meeting.meter.now()
        with meeting.explained():
            pending = self._send(sent, fragment)
        travels = pending.bytes + (exchange.pending.bytes if exchange else 0)
        meeting.meter.count(count, travels, started)
        self._flight = _Flight(
            exchange, headers, pending, sent, fragment, ends_round, meeting.meter.resumed
        )

    def _copy(self, own: Sequence[Tensor], fragment: int | None) -> Memory:
        """What is averaged, as shares of the mean, in the memory that means are made in: zeros
        follow it there."""
        if self.fragments is not None:
            memory = self.fragments.memory
        else:
            memory = self._memory = self._memory or self._replica.flat.twin()
        if self._start is None:
            divide(own, self._shares, memory)
            return memory
        z = self._part(self._start.data, fragment)
        for x, anchor, sent in zip(own, z, memory.params, strict=True):
            torch.sub(anchor.to(x.dtype), x, out=sent[: len(x)])
            sent[len(x) :].zero_()
            sent.div_(self._shares)
        return memory

    def _send(self, sent: Memory, fragment: int | None) -> Pending | _Owing:
        if self._codec is None or self._lost is None:
            return self._link.start_sum_([b.data for b in sent.buffers])
        return _Owing(self._part(self._lost.data, fragment), sent.params, self._link, self._codec)

    def poll(self) -> None:
        """Take note if what was launched has ended. No waiting."""
        flight = self._flight
        if not self._behind or flight is None or flight.ended is not None:
            return
        if isinstance(flight.pending, Pending) and flight.pending.done():
            flight.ended = time.perf_counter()

    @torch.no_grad()
    def land(self) -> list[Tensor] | None:
        """Wait for what `launch` has started; None if nothing is in flight. No new collective.

        Returns:
            x̄, one tensor (n,) per buffer, in memory that the next `launch` writes to.

        Raises:
            ReplicaMismatchError: if the ranks had not launched at the same step.
            NonFiniteError: if a replica brought NaN or infinity.
        """
        self.poll()
        flight = self._flight
        if flight is None:
            return None
        if flight.failed is not None:
            raise flight.failed
        try:
            return self._arrived(flight)
        except Exception as error:
            flight.failed = error
            if not self._behind:  # nothing of it is used: it may be made again
                self._flight = None
                self.relayout()  # its memory may still be written to
            raise

    def _arrived(self, flight: _Flight) -> list[Tensor]:
        meeting = self._replica.meeting
        started, headers = meeting.meter.now(), flight.headers
        if flight.exchange is not None:
            headers = meeting.read(flight.exchange)
            meeting.check(headers)
        with meeting.explained():
            flight.pending.wait()
        ended = started if flight.ended is None else flight.ended
        travelled = self._behind and flight.pending.bytes  # else: one replica, or waited for
        meeting.meter.count_landing(started, ended - flight.launched if travelled else 0.0)
        if flight.exchange is not None:
            meeting.check_finite_landed(headers, lambda: self._non_finite(flight))
            meeting.meter.count_waits(waits_of(headers))
        norm = self._mean_norm(flight) if meeting.track_drift else None
        meeting.reports.of_landing(headers, norm, ends_round=flight.ends_round)
        self._flight = None
        return flight.sent.params if flight.fragment is None else self._cut.mean(flight.fragment)

    def _mean_norm(self, flight: _Flight) -> float:
        if self._codec is None:
            return flight.sent.square_norm()
        own = self._part(self._replica.flat.params, flight.fragment)  # a codec's mean is not exact
        return mean_square_norm(self._replica, own, self._replica.collective)

    def _non_finite(self, flight: _Flight) -> list[str]:
        if flight.fragment is None:
            return flight.sent.non_finite()
        return self._cut.non_finite(flight.fragment)

    def drop(self) -> None:
        """Wait for what is in flight, if anything, and forget it.

        What was launched where another rank made another call is never answered, or by what that
        rank launches next: then no call goes on with this optimizer.
        """
        flight, self._flight = self._flight, None
        if flight is None or flight.exchange is None:
            return
        meeting = self._replica.meeting
        try:
            meeting.read(flight.exchange)
            with meeting.explained():
                flight.pending.wait()
        except SyncError as error:
            self.relayout()  # its memory may still be written to
            if isinstance(error, ReplicaMismatchError) and not meeting.answered(flight.exchange):
                self._replica.give_up(
                    f"{error}. What was launched then is in flight still: go on from the newest "
                    "checkpoint, in new processes"
                )

    def of(self, tensors: Sequence[Tensor], fragment: int) -> list[Tensor]:
        """A fragment of each buffer's (n,)."""
        return self._cut.of(tensors, fragment)

    def pieces(self, tensors: Sequence[Tensor], fragment: int) -> dict[str, Tensor]:
        """A fragment of each buffer's (n,), by the parameters it is made of."""
        return self._cut.pieces(tensors, fragment)

    def landed_pieces(self, fragment: int) -> dict[str, Tensor]:
        """The mean of a fragment that has landed, by parameter."""
        return self._cut.pieces_of_mean(fragment)

    def relayout(self) -> None:
        """Take new memory, for the layout that the replica has now."""
        self._memory = None
        if self.fragments is not None:
            self.fragments = Fragments(self._replica.flat, self.fragments.number, self.fragments)

    @property
    def _cut(self) -> Fragments:
        assert self.fragments is not None, "made without fragments"
        return self.fragments

    def _part(self, tensors: Sequence[Tensor], fragment: int | None) -> Sequence[Tensor]:
        return tensors if fragment is None else self._cut.of(tensors, fragment)


def divide(own: Sequence[Tensor], by: int, memory: Memory) -> None:
    """Write ``own`` divided by a number into memory that may be longer."""
    for x, sent in zip(own, memory.params, strict=True):
        torch.div(x, by, out=sent[: len(x)])
        sent[len(x) :].zero_()
