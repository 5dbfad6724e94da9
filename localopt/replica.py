"""One model copy: its flat memory, its place in the round, and how it meets the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import header as headers_
from .buffers import Buffers
from .collective import Collective, Traffic, clock
from .flat import Flat
from .header import Header, Kind, NonFiniteError, ranks_text


class Replica:
    """What a rule works on.

    Attributes:
        flat: the parameters' memory.
        collective: rank, world size, and the collectives.
        inner: the optimizer that makes the local steps.
        step: local steps finished.
        h: local steps in the current round, or in the last one when it has ended.
        remaining: local steps left in the current round; 0 between rounds.
        round: rounds finished.
        traffic: bytes and seconds.
        drift: replica spread just before the last synchronisation, if tracked.
    """

    def __init__(
        self,
        flat: Flat,
        collective: Collective,
        buffers: Buffers,
        inner: Optimizer,
        *,
        check_finite: bool,
        track_drift: bool,
    ) -> None:
        self.flat, self.collective, self.buffers, self.inner = flat, collective, buffers, inner
        self.check_finite, self.track_drift = check_finite, track_drift
        self.step = self.h = self.remaining = self.round = 0
        self.traffic = Traffic()
        self.drift: float | None = None
        self.device = flat.buffers[0].data.device
        self._resumed = clock(self.device)

    @torch.no_grad()
    def equalise(self) -> None:
        """Start from rank 0's parameters and buffers. Collective."""
        started = clock(self.device)
        sent = self.collective.broadcast_([b.data for b in self.flat.buffers])
        self.buffers.equalise(self.collective)
        self._resumed = clock(self.device)
        self.traffic.other_bytes += sent
        self.traffic.other_seconds += self._resumed - started

    @torch.no_grad()
    def mean_(self, kind: Kind = Kind.SYNC, *, ends_round: bool = True) -> None:
        """Replace what is averaged by its mean over the replicas, x ← x̄, in place. Collective.

        Every collective of a replica has this one size, whatever its kind, so that ranks which
        are out of step meet, see each other's headers, and say so.

        Raises:
            ReplicaMismatchError: if the ranks are not at the same call.
            NonFiniteError: if a replica brought NaN or infinity.
        """
        flat, m = self.flat, self.collective.world_size
        flat.check_pointers()
        self.buffers.gather(flat.views, self.collective.rank)
        started = clock(self.device)
        mine = Header(
            kind=kind,
            step=self.step,
            h=self.h,
            busy=started - self._resumed,
            square_norm=flat.square_norm() if self.track_drift else 0.0,
        )
        finite = flat.finite() if self.check_finite else None
        headers_.write(flat.slots, self.collective.rank, mine, finite)
        if m > 1:
            # Before the sum, which then cannot overflow where all replicas are finite.
            for buffer in flat.buffers:
                buffer.averaged.div_(m)
        sent = self.collective.sum_([b.data for b in flat.buffers])
        headers = headers_.read(flat.slots)
        self._resumed = clock(self.device)
        self._count(ends_round, sent, self._resumed - started, headers)
        headers_.check_in_step(headers)
        self._check_finite(headers)
        self.buffers.scatter(flat.views)
        if self.track_drift and ends_round:
            self.drift = headers_.spread(headers, flat.square_norm())

    def _count(self, ends_round: bool, sent: int, seconds: float, headers: list[Header]) -> None:
        traffic = self.traffic
        if ends_round:
            traffic.syncs += 1
            traffic.bytes += sent
            traffic.exposed += seconds
            traffic.count_wait([header.busy for header in headers])
        else:
            traffic.other_bytes += sent
            traffic.other_seconds += seconds

    def _check_finite(self, headers: list[Header]) -> None:
        bad = [rank for rank, header in enumerate(headers) if not header.finite]
        # A scan that overflows on finite values raises the flag too: only names make it an error.
        names = self.flat.non_finite() if bad else []
        if names:
            raise NonFiniteError(
                f"{ranks_text(bad)} brought NaN or infinity into the synchronisation at step "
                f"{self.step}: {_few(names)}"
            )

    @torch.no_grad()
    def check_finite_here(self) -> None:
        """Raise `NonFiniteError` if this replica holds NaN or infinity. No collective."""
        names = [] if bool(self.flat.finite()) else self.flat.non_finite()
        if names:
            raise NonFiniteError(
                f"rank {self.collective.rank} holds NaN or infinity at step {self.step}: "
                f"{_few(names)}"
            )

    def snapshot(self) -> list[Tensor]:
        """Copies of the flat buffers."""
        return [buffer.data.clone() for buffer in self.flat.buffers]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Write a snapshot back."""
        for buffer, saved in zip(self.flat.buffers, snapshot, strict=True):
            buffer.data.copy_(saved)

    def average_for_consensus(self) -> None:
        """Put the mean of the replicas into the parameters. Collective in mid-round only."""
        if self.remaining:
            self.mean_(Kind.CONSENSUS, ends_round=False)

    def finish_at_mean(self) -> None:
        """End an open round at the mean; between rounds only check that all ranks are here.

        Raises:
            ReplicaMismatchError: if another rank is elsewhere.
        """
        saved = None if self.remaining else self.snapshot()
        self.mean_(Kind.FINISH, ends_round=bool(self.remaining))
        if saved is not None:
            # The mean of m equal numbers is not always that number, to the last bit.
            self.restore(saved)


def _few(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
