"""One model copy: its memory, its clock, and what becomes of it when a synchronisation fails."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .buffers import Buffers
from .collective import Collective
from .errors import CollectiveError, NonFiniteError, ReplicaMismatchError, SyncError
from .flat import Flat
from .header import Header, Kind
from .meeting import Meeting, few
from .round import Round


class Replica:
    """What a rule works on.

    Parameters are touched only after replicas have met, and what overwrites them does so in
    `changing`: after an error a replica holds what it held before, or is lost, and says so to
    whoever goes on with it.

    Attributes:
        flat: the parameters' memory.
        collective: rank, world size, and the collectives.
        buffers: the model's.
        inner: the optimizer that makes the local steps.
        round: the clock.
        meeting: the protocol, with bytes, seconds and the report.
        lost: why the parameters are lost; None while they are not.
    """

    def __init__(
        self,
        flat: Flat,
        collective: Collective,
        buffers: Buffers,
        inner: Optimizer,
        *,
        levels: Sequence[Collective] | None = None,
        name: str = "optimizer",
        check_finite: bool,
        track_drift: bool,
    ) -> None:
        self.flat, self.collective, self.buffers, self.inner = flat, collective, buffers, inner
        self.round = Round(inner)
        self.meeting = Meeting(
            collective, [collective] if levels is None else levels, self.round, flat, inner,
            name=name, check_finite=check_finite, track_drift=track_drift,
        )  # fmt: skip
        self.lost: str | None = None
        if collective.world_size > 1:
            self._count_backwards()

    def _count_backwards(self) -> None:
        """Count them, by the first parameter that is trained. Cost: 1 µs each."""
        clock = weakref.ref(self.round)

        def count(_: Tensor) -> None:
            if (mine := clock()) is not None:
                mine.count_backward()

        p = next((p for _, p in self.flat.named if p.requires_grad), None)
        if p is not None:
            p.register_post_accumulate_grad_hook(count)

    # Meeting the others.

    @torch.no_grad()
    def equalise(self, flat: Flat | None = None, buffers: Buffers | None = None) -> None:
        """Start from rank 0's parameters and buffers; or those of another layout. Collective."""
        started = self.meeting.meter.now()
        with self.meeting.explained():
            sent = self.collective.broadcast_([b.data for b in (flat or self.flat).buffers])
            (buffers or self.buffers).equalise(self.collective)
        self.meeting.meter.count_start(sent, started)

    def meet(
        self, kind: Kind = Kind.SYNC, levels: Sequence[Collective] | None = None, **options: Any
    ) -> list[dict[int, Header]]:
        """`Meeting.meet`, of a replica that is whole: it comes before all that moves."""
        self.check_usable()
        return self.meeting.meet(kind, levels, **options)

    def check_usable(self) -> None:
        """Raise `SyncError` if the parameters are lost, `RuntimeError` if they were moved."""
        self.check_not_lost()
        self.flat.check_pointers()

    def check_not_lost(self) -> None:
        """Raise `SyncError` if the parameters are lost."""
        if self.lost is not None:
            raise SyncError(self.lost)

    def check_equal(self) -> None:
        """Raise `ReplicaMismatchError` unless all replicas hold the same parameters. Collective."""
        (*_, headers) = self.meet(Kind.CONSENSUS, count="other", believed_equal=True)
        if len({h.fingerprint for h in headers.values()}) > 1:
            raise ReplicaMismatchError(
                f"the replicas hold different weights at step {self.round.step}, where all should "
                "be equal: some rank has changed its own since the last round, as by loading a "
                "checkpoint. Load on all ranks alike"
            )

    @torch.no_grad()
    def check_finite_here(self) -> None:
        """Raise `NonFiniteError` if this replica holds NaN or infinity. No collective."""
        names = [] if bool(torch.isfinite(self.flat.total())) else self.flat.non_finite()
        if names:
            raise NonFiniteError(
                f"rank {self.collective.rank} holds NaN or infinity at step {self.round.step}: "
                f"{few(names)}"
            )

    # Overwriting.

    @contextmanager
    def changing(self, *, parameters: bool = True) -> Iterator[None]:
        """In here the ``parameters``, or what the rule keeps, are overwritten.

        Where that fails half-way, they are not what they were and not what they should become:
        parameters become NaN, so that nobody saves them, and no call goes on with this optimizer.
        """
        try:
            with torch.no_grad():
                yield
        except BaseException as error:
            lost = self._lose(error, parameters=parameters)
            if isinstance(error, CollectiveError):
                raise CollectiveError(lost) from error
            error.add_note(lost)
            raise

    def _lose(self, error: BaseException, *, parameters: bool) -> str:
        what = "it had begun to overwrite the parameters, which are NaN now"
        if parameters:
            with torch.no_grad(), contextlib.suppress(RuntimeError):
                for buffer in self.flat.buffers:
                    buffer.data.zero_()  # the gaps too, which stay zero when weights are loaded
                for view in self.flat.views.values():
                    view.fill_(math.nan)
        else:
            what = "what the rule keeps is lost, the parameters are what they were"
        where = self.meeting.where()
        reason = str(error) if isinstance(error, SyncError) else f"{where} failed: {error!r}"
        self.give_up(f"{reason}; {what}. Go on from the newest checkpoint")
        return str(self.lost)

    def give_up(self, why: str) -> None:
        """No call goes on with this optimizer, until a state is loaded."""
        self.lost = why

    def recover(self) -> None:
        """A state is about to be loaded: what was lost comes back."""
        self.lost = None

    def end_round(self, *, next_loss: bool = False) -> None:
        """The round has ended; ``next_loss``: what was recorded is the loss of the next one."""
        self.round.end(next_loss=next_loss)
        self.meeting.meter.count_sync()

    # Memory.

    @torch.no_grad()
    def gather_buffers(self, ranks: Sequence[int] | None = None) -> None:
        """Copy the model's buffers to where they are averaged, before replicas (``ranks``) meet."""
        first = (self.collective.ranks if ranks is None else ranks)[0]
        self.buffers.gather(self.flat.views, from_rank0=self.collective.rank == first)

    def snapshot(self) -> list[Tensor]:
        """Copies of the flat buffers."""
        return [buffer.data.clone() for buffer in self.flat.buffers]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Write a snapshot back."""
        for buffer, saved in zip(self.flat.buffers, snapshot, strict=True):
            buffer.data.copy_(saved)

    def relayout(self, flat: Flat, buffers: Buffers) -> None:
        """Take over another layout of the memory; nothing may be in flight."""
        self.flat, self.buffers = flat, buffers
        self.meeting.relayout(flat)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Where the replica is; nothing may be in flight."""
        return {**self.round.state_dict(), **self.meeting.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.round.load_state_dict(state)
        self.meeting.load_state_dict(state)

    def start_over(self) -> None:
        """Go back to step 0, as if no step had been made."""
        self.round.start_over()
        self.meeting.reports.start_over()
