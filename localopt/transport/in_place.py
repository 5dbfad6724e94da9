"""The mean in the parameters' own memory: whole, in groups, or compressed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..collective import Across, Collective
from ..compression import Codec, CompressedMean
from ..flat import square_norm
from ..header import Header, Kind
from ..replica import Replica
from ..traffic import Count
from ..vector import Vector


class InPlace:
    """x ← x̄ in the parameters' own memory, with all that is averaged with them.

    Args:
        replica: whose.
        sums: those that one after another make the sum over all replicas, such as inside groups
            and across them; None: one over all.
    """

    def __init__(
        self, replica: Replica, sums: Sequence[Collective | Across] | None = None
    ) -> None:
        self._replica = replica
        self._sums = [replica.collective] if sums is None else sums

    def mean_(
        self,
        kind: Kind = Kind.SYNC,
        *,
        ends_round: bool = True,
        levels: int | None = None,
        believed_equal: bool = False,
    ) -> None:
        """Meet, and replace what is averaged by its mean over the replicas. Collective.

        Args:
            kind: why.
            ends_round: whether this ends a round; else it is counted apart.
            levels: the mean over the replicas that the first so many sums cover; None for all.
            believed_equal: whether to look if the replicas hold the same parameters, and warn if
                not. If so parameters keep their bits.

        Raises:
            ReplicaMismatchError: if the ranks are not at the same call.
            NonFiniteError: if a replica brought NaN or infinity.
        """
        replica = self._replica
        count: Count = "round" if ends_round else "other"
        sums, met = self._sums[:levels], replica.meeting.levels[:levels]
        replica.gather_buffers(sums[-1].ranks)
        *_, headers = replica.meet(kind, met, count=count, believed_equal=believed_equal)
        equal = believed_equal and len({h.fingerprint for h in headers.values()}) == 1
        if believed_equal and not equal:
            warnings.warn(
                f"rank {replica.collective.rank}: the replicas held different weights at step "
                f"{replica.round.step}, where all should be equal, and are made equal: some rank "
                "has changed its own since the last round, as by loading a checkpoint",
                stacklevel=2,
            )
        if not equal or replica.buffers.travel:
            # The mean of m equal numbers is not always that number, to the last bit.
            saved = replica.snapshot() if equal else None
            # Who asks for a consensus has a copy, and writes it back whatever happens.
            consensus = kind is Kind.CONSENSUS
            with replica.meeting.explained() if consensus else replica.changing():
                self._sum(headers, sums, count)
                if saved is not None:
                    replica.restore(saved)
        if not ends_round and kind is Kind.FINISH:
            replica.meeting.reports.show_landed()

    @contextmanager
    def mean_change(
        self, z: Vector, settings: object = (), check: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """In here the parameters hold the mean of z - x_i over the replicas. Collective.

        That is averaged rather than x_i: what no replica has changed is then exactly 0, and an
        adaptive outer optimizer leaves it alone.

        Args:
            z: the parameters at the round's start, equal on all replicas.
            settings: what the rule goes by, to be the same on all ranks.
            check: what may raise on all ranks alike, once these have met.
        """
        replica, x = self._replica, self._replica.flat.params
        replica.gather_buffers()
        norm = square_norm(_change(z, x)) if replica.meeting.track_drift else None
        (headers,) = replica.meet(settings=settings, square_norm=norm)
        check()
        with replica.changing():
            _change(z, x, out=x)
            self._sum(headers, self._sums, "round")
            yield

    @torch.no_grad()
    def _sum(
        self, headers: Mapping[int, Header], sums: Sequence[Collective | Across], count: Count
    ) -> None:
        replica, meeting = self._replica, self._replica.meeting
        started, sent = meeting.meter.now(), 0
        wholes, averaged = zip(*((b.data, b.averaged) for b in replica.flat.buffers), strict=True)
        with meeting.explained():
            for level in sums:
                sent += level.mean_(wholes, averaged)
        meeting.meter.count("part" if count == "round" else count, sent, started)
        replica.buffers.scatter(replica.flat.views)
        if count == "round" and meeting.track_drift:
            meeting.reports.add_spread(headers, replica.flat.square_norm())


class Compressed:
    """x ← the mean of the replicas' changes, in fewer bytes (`localopt.compression`).

    It is the mean of d_i = z - x_i + e_i, where e_i is what has been lost of replica i's: with z as
    the start of each round, the sum of all means is that of all changes less mean_i(e_i).

    Args:
        replica: whose parameters.
        compress: the codec, C.
        lost: e, zeros at first.
    """

    def __init__(self, replica: Replica, compress: Codec, lost: Vector) -> None:
        self._replica, self._codec, self._lost = replica, compress, lost

    @contextmanager
    def mean_change(
        self, z: Vector, settings: object = (), check: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """As `InPlace.mean_change`. What is averaged with them (buffers) travels uncompressed."""
        replica = self._replica
        replica.gather_buffers()
        (headers,) = replica.meet(settings=settings)
        check()
        report_spread(replica, headers, replica.collective)
        with replica.changing():
            self._replace(z)
            yield

    def _replace(self, z: Vector) -> None:
        replica, collective = self._replica, self._replica.collective
        flat, meeting = replica.flat, replica.meeting
        started = meeting.meter.now()
        with meeting.explained():
            pending = CompressedMean(
                self._lost.data, flat.params, collective, self._codec, z.data
            )
            pending.wait()
        for buffer in flat.buffers:
            buffer.extra_averaged.div_(collective.world_size)
        with meeting.explained():
            sent = collective.sum_([b.extra for b in flat.buffers if len(b.extra)])
        replica.buffers.scatter(flat.views)
        meeting.meter.count("part", pending.bytes + sent, started)


def _change(z: Vector, x: Sequence[Tensor], out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Δ_i = z - x_i."""
    outs = [None] * len(x) if out is None else out
    return [
        torch.sub(anchor.to(mine.dtype), mine, out=o)
        for anchor, mine, o in zip(z.data, x, outs, strict=True)
    ]


def report_spread(replica: Replica, headers: Mapping[int, Header], level: Collective) -> None:
    """The spread where no mean is at hand. Collective, but only where drift is tracked."""
    if replica.meeting.track_drift:
        norm = mean_square_norm(replica, replica.flat.params, level)
        replica.meeting.reports.add_spread(headers, norm)


@torch.no_grad()
def mean_square_norm(replica: Replica, own: Sequence[Tensor], level: Collective) -> float:
    """|x̄|² of parameters, by a sum that is made for it alone. Collective."""
    meeting = replica.meeting
    started, mean = meeting.meter.now(), [x / len(level.ranks) for x in own]
    with meeting.explained():
        sent = level.sum_(mean)
    meeting.meter.count("other", sent, started)
    return square_norm(mean)


@torch.no_grad()
def fetch_(replica: Replica, into: Sequence[Tensor], level: Collective, rank: int) -> None:
    """Replace ``into``, one tensor (n,) per buffer, by ``rank``'s parameters. Collective."""
    started = replica.meeting.meter.now()
    if replica.collective.rank == rank:
        for mine, x in zip(into, replica.flat.params, strict=True):
            mine.copy_(x)
    with replica.meeting.explained():
        sent = level.broadcast_(into, list(level.ranks).index(rank))
    replica.meeting.meter.count("part", sent, started)
