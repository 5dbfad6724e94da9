"""One model copy: its flat memory, its place in the round, and how it meets the others."""

from __future__ import annotations

import copy
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import control
from . import header as headers_
from .buffers import Buffers
from .collective import Across, Collective, Pending, Traffic, clock
from .flat import Flat, Fragments, Memory, finite, square_norm
from .header import Header, Kind, NonFiniteError, ranks_text


@dataclass(frozen=True)
class SyncReport:
    """What the replicas told each other at a synchronisation; equal on all ranks that took part.

    Attributes:
        step: local steps finished when it was begun.
        h: H of the round that it ended; `finish` may have cut it short.
        drift: spread of the replicas then, sqrt((1/m) Σ_i |x_i - x̄|²); None if not tracked.
        losses: by rank, mean training loss of the round; NaN where none was recorded.
        waits: by rank, seconds it was idle for the slowest rank.

    Under a rule that averages in groups, ranks of other groups have NaN.
    """

    step: int
    h: int
    drift: float | None
    losses: list[float]
    waits: list[float]


class Replica:
    """What a rule works on.

    Attributes:
        flat: the parameters' memory.
        collective: rank, world size, and the collectives.
        levels: the sums that one after another make the sum over all replicas.
        headers_apart: whether each collective is begun by an exchange of headers alone, so that
            ranks meet whatever the sizes of what follows.
        fragments: of the parameters, where they are sent one at a time.
        inner: the optimizer that makes the local steps.
        step: local steps finished.
        h: local steps in the current round, or in the last one when it has ended.
        remaining: local steps left in the current round; 0 between rounds.
        round: rounds finished.
        traffic: bytes and seconds.
        report: of the last synchronisation.
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
        self.levels: Sequence[Collective | Across] = [collective]
        self.headers_apart = False
        self.fragments: Fragments | None = None
        self.step = self.h = self.remaining = self.round = 0
        self.traffic = Traffic()
        self.report: SyncReport | None = None
        self.device = flat.buffers[0].data.device
        self._landed_report: SyncReport | None = None
        self._flight: _Flight | None = None
        self._sent: Memory | None = None
        self._square_spread = 0.0
        self._resumed = clock(self.device)
        self._forget_round()

    def use_own_group(self) -> None:
        """Meet in a process group of its own from now on. Collective.

        What runs behind training must not mix with other collectives of the user's group; and as
        all of this replica's are in one group, ranks out of step meet there.
        """
        self.collective = self.collective.subgroup(range(self.collective.world_size))
        self.levels = [self.collective]

    def use_fragments(self, number: int) -> None:
        """Send the parameters in so many fragments, one at a time, from now on.

        A fragment's collective and the exchange that begins any other one are of one size, so that
        ranks out of step meet.
        """
        self.fragments = Fragments(self.flat, number)
        self.headers_apart = True

    # The place in the round.

    def begin_round(self, h: int) -> None:
        """A round of ``h`` local steps begins."""
        self.h = self.remaining = h

    def end_round(self) -> None:
        """The round has ended."""
        self.remaining = 0
        self.round += 1
        self._forget_round()

    def _forget_round(self) -> None:
        # A 0-dim tensor once a loss or a rate was one: nothing is read before the boundary.
        self._rate_sum: float | Tensor = 0.0
        self._loss_sum: float | Tensor = 0.0
        self._rates = self._losses = 0
        self._step_loss: float | Tensor | None = None

    def record_lr(self, lr: float | Tensor) -> None:
        """Take note of a step's learning rate."""
        self._rate_sum = self._rate_sum + lr
        self._rates += 1

    def record_loss(self, loss: float | Tensor) -> None:
        """Take note of a step's training loss. No host synchronisation.

        Raises:
            RuntimeError: if the step has one already.
        """
        if self.has_loss:
            raise RuntimeError(
                f"step {self.step + 1} on rank {self.collective.rank} has a loss already: record "
                "one number for each step, the mean where a step accumulates gradients"
            )
        if isinstance(loss, Tensor):
            loss = loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
            if loss.dtype.itemsize < 4:  # a sum of thousands would stop growing
                loss = loss.float()
        self._step_loss = loss if isinstance(loss, Tensor) else float(loss)

    @property
    def has_loss(self) -> bool:
        """Whether the loss of the step that is being made has been recorded."""
        return self._step_loss is not None

    def count_step(self) -> None:
        """A local step has been made."""
        self.step += 1
        if self._step_loss is not None:
            self._loss_sum = self._loss_sum + self._step_loss
            self._losses += 1
            self._step_loss = None

    @property
    def lr(self) -> float:
        """Mean learning rate over the round's steps so far, of parameter group 0."""
        if not self._rates:
            return float(self.inner.param_groups[0].get("lr", math.nan))
        return float(self._rate_sum) / self._rates

    @property
    def loss(self) -> float:
        """Mean training loss over the round's steps so far; NaN if none was recorded."""
        return float(self._loss_sum) / self._losses if self._losses else math.nan

    # Meeting the others.

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
    def mean_(
        self,
        kind: Kind = Kind.SYNC,
        *,
        ends_round: bool = True,
        levels: int | None = None,
        settings: object = (),
        believed_equal: bool = False,
    ) -> bool:
        """Replace what is averaged by its mean over the replicas, x ← x̄, in place. Collective.

        Every collective of a replica has this one size, whatever its kind, so that ranks which
        are out of step meet, see each other's headers, and say so.

        Args:
            kind: why.
            ends_round: whether this ends a round; else it is counted apart.
            levels: the mean over the replicas that the first so many levels cover; None for all.
            settings: what the rule goes by, to be the same on all ranks.
            believed_equal: whether to look if the replicas hold the same parameters.

        Returns:
            Whether they do, if looked for; else False.

        Raises:
            ReplicaMismatchError: if the ranks are not at the same call.
            NonFiniteError: if a replica brought NaN or infinity.
        """
        if self.headers_apart:
            self.exchange(kind, [self.collective])
        flat, sums = self.flat, self.levels[:levels]
        ranks = sums[-1].ranks
        flat.check_pointers()
        self.buffers.gather(flat.views, from_rank0=self.collective.rank == ranks[0])
        started = clock(self.device)
        fingerprint = flat.fingerprint() if believed_equal else 0
        self._write_header(flat.slots, kind, started, self._scan(), settings, fingerprint)
        wholes, averaged = zip(*((b.data, b.averaged) for b in flat.buffers), strict=True)
        sent = 0
        for level in sums:
            sent += level.mean_(wholes, averaged)
            headers = headers_.read(flat.slots, level.ranks)
            headers_.check_in_step(headers)
        waits = _waits(headers)
        self._count(ends_round, sent, started, waits)
        self._check_finite(headers, flat)
        self.buffers.scatter(flat.views)
        if ends_round:
            self.report = self._report(headers, waits, self._spread(headers, flat))
        elif kind is Kind.FINISH and self._landed_report is not None:
            self.report = self._landed_report
        return believed_equal and all(h.fingerprint == fingerprint for h in headers.values())

    @torch.no_grad()
    def launch(
        self, settings: object = (), *, fragment: int | None = None, ends_round: bool = True
    ) -> None:
        """Start the mean of the parameters as they are now, x̄, behind training. Collective.

        What is sent is a copy. One mean at a time: `land` the last one before.

        Args:
            settings: as for `mean_`.
            fragment: which of the `fragments`; None: all parameters.
            ends_round: whether this ends a round; else it is a part of the synchronisation that
                the round's end will complete.

        Raises:
            RuntimeError: if the parameters were moved out of their memory.
        """
        self.flat.check_pointers()
        started = clock(self.device)
        own = self.flat.params
        if fragment is not None:
            own = self._fragments.of(own, fragment)
        sent = self._copy(own, self.collective.world_size)
        scan = None if not self.check_finite else finite(own)
        self._write_header(sent.slots, Kind.SYNC, started, scan, settings, own=own)
        pending = self.collective.start_sum_([b.data for b in sent.buffers])
        if ends_round:
            self.report = self._landed_report
            self._count(True, pending.bytes, started, {})
        else:
            self.count_part(pending.bytes, started)
        self._flight = _Flight(pending, sent, fragment, ends_round, self._resumed)

    def mean(self, *, fragment: int | None = None, ends_round: bool = True) -> list[Tensor]:
        """x̄, in memory of its own, which the next mean writes to. Collective; waits for it.

        Args:
            fragment, ends_round: as for `launch`.
        """
        self.launch(fragment=fragment, ends_round=ends_round)
        mean = self.land()
        assert mean is not None, "it has just been launched"
        if ends_round:
            self.report = self._landed_report
        return mean

    def drop(self) -> None:
        """Wait for what is in flight, if anything, and forget it."""
        if self._flight is not None:
            self._flight.pending.wait()
            self._flight = None

    def poll(self) -> None:
        """Take note if what was launched has ended. No waiting."""
        flight = self._flight
        if flight is not None and flight.ended is None and flight.pending.done():
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
        self._flight = None
        started = clock(self.device)
        flight.pending.wait()
        exposed = clock(self.device) - started
        self._resumed += exposed  # so that it does not count as busy
        ended = started if flight.ended is None else flight.ended
        self.traffic.exposed += exposed
        if flight.pending.bytes:  # else: one replica, nothing has travelled
            self.traffic.hidden += max(0.0, ended - flight.launched)
        headers = headers_.read(flight.sent.slots)
        headers_.check_in_step(headers)
        self._check_finite(headers, flight.sent, flight.fragment)
        waits = _waits(headers)
        self.traffic.count_wait(waits, self.collective.world_size)
        self._add_to_report(headers, waits, flight)
        if flight.fragment is None:
            return flight.sent.params
        return self._fragments.mean(flight.fragment)

    def _add_to_report(
        self, headers: Mapping[int, Header], waits: Mapping[int, float], flight: _Flight
    ) -> None:
        """Fragments' spreads add up to that of the whole; each is as its fragment was sent."""
        spread = self._spread(headers, flight.sent)
        self._square_spread += (spread or 0.0) ** 2
        if flight.ends_round:
            whole = None if spread is None else math.sqrt(self._square_spread)
            self._landed_report = self._report(headers, waits, whole)
            self._square_spread = 0.0

    @property
    def _fragments(self) -> Fragments:
        assert self.fragments is not None, "use_fragments() comes first"
        return self.fragments

    @torch.no_grad()
    def exchange(
        self,
        kind: Kind,
        levels: Sequence[Collective],
        *,
        ends_round: bool = False,
        settings: object = (),
    ) -> list[dict[int, Header]]:
        """Exchange headers alone, level by level; return each level's, by rank. Collective.

        Args:
            kind, ends_round, settings: as for `mean_`.
            levels: whom with, one after another.

        Raises:
            ReplicaMismatchError: if the ranks are not at the same call.
            NonFiniteError: if a replica holds NaN or infinity.
        """
        self.flat.check_pointers()
        started = clock(self.device)
        names = [] if not self.check_finite or bool(self.flat.finite()) else self.flat.non_finite()
        slots, travelling = self._empty_headers()
        sent, seen = 0, []
        for level in levels:
            self._write_header(slots, kind, started, torch.tensor(not names), settings)
            sent += level.sum_(travelling)
            seen.append(headers_.read(slots, level.ranks))
            headers_.check_in_step(seen[-1])
        waits = _waits(seen[-1])
        self._count(ends_round, sent, started, waits)
        # Only now, or ranks of other groups would wait at the next level for those that raise here.
        bad = [rank for rank, header in seen[-1].items() if not header.finite]
        if bad:
            texts = control.gather(levels[-1], _few(names))
            raise NonFiniteError(_brought(bad, self.step, next(text for text in texts if text)))
        if ends_round:
            self.report = self._report(seen[-1], waits, self._measured(seen[-1], levels[-1]))
        return seen

    def _empty_headers(self) -> tuple[Tensor, list[Tensor]]:
        """Slots to write to, and the tensors that carry them: what a fragment's would be."""
        if self.fragments is None:
            m = self.collective.world_size
            slots = torch.zeros(m, headers_.SLOT, dtype=torch.uint8, device=self.device)
            return slots, [slots]
        memory = self.fragments.memory
        for buffer in memory.buffers:
            buffer.data.zero_()
        return memory.slots, [buffer.data for buffer in memory.buffers]

    def _measured(self, headers: dict[int, Header], level: Collective) -> float | None:
        """The spread where no mean is at hand. Cost: a collective, where drift is tracked."""
        if not self.track_drift:
            return None
        started = clock(self.device)
        mean = self._copy(self.flat.params, len(level.ranks))
        self._count(False, level.sum_(mean.params), started, {})
        return self._spread(headers, mean)

    @torch.no_grad()
    def fetch_(self, into: Sequence[Tensor], level: Collective, rank: int) -> None:
        """Replace ``into``, one tensor (n,) per buffer, by the parameters of ``rank``. Collective.
        """
        started = clock(self.device)
        if self.collective.rank == rank:
            for mine, x in zip(into, self.flat.params, strict=True):
                mine.copy_(x)
        self.count_part(level.broadcast_(into, list(level.ranks).index(rank)), started)

    def count_part(self, sent: int, started: float) -> None:
        """Count bytes and seconds as a part of the synchronisation that `exchange` has begun."""
        self._resumed = clock(self.device)
        self.traffic.bytes += sent
        self.traffic.exposed += self._resumed - started

    def _copy(self, own: Sequence[Tensor], shares: int) -> Memory:
        """``own`` divided by ``shares``, in the memory that means are made in."""
        if self.fragments is not None:
            memory = self.fragments.memory
        else:
            memory = self._sent = self._sent or self.flat.twin()
        for x, sent in zip(own, memory.params, strict=True):
            torch.div(x, shares, out=sent[: len(x)])
            sent[len(x) :].zero_()
        return memory

    def _write_header(
        self,
        slots: Tensor,
        kind: Kind,
        now: float,
        finite: Tensor | None,
        settings: object = (),
        fingerprint: int = 0,
        own: Sequence[Tensor] | None = None,
    ) -> None:
        told = self.flat.params if own is None else own
        mine = Header(
            kind=kind,
            step=self.step,
            h=self.h,
            busy=now - self._resumed,
            square_norm=square_norm(told) if self.track_drift else 0.0,
            loss=self.loss,
            settings=zlib.crc32(repr(settings).encode()),
            fingerprint=fingerprint,
        )
        headers_.write(slots, self.collective.rank, mine, finite)

    def _scan(self) -> Tensor | None:
        return self.flat.finite() if self.check_finite else None

    def _count(
        self, ends_round: bool, sent: int, started: float, waits: Mapping[int, float]
    ) -> None:
        traffic, now = self.traffic, clock(self.device)
        seconds = now - started
        # What happens within a round is not busy time, and does not begin a new count of it.
        self._resumed = now if ends_round else self._resumed + seconds
        if ends_round:
            traffic.syncs += 1
            traffic.bytes += sent
            traffic.exposed += seconds
            traffic.count_wait(waits, self.collective.world_size)
        else:
            traffic.other_bytes += sent
            traffic.other_seconds += seconds

    def _spread(self, headers: Mapping[int, Header], mean: Memory) -> float | None:
        return headers_.spread(headers, mean.square_norm()) if self.track_drift else None

    def _report(
        self, headers: Mapping[int, Header], waits: Mapping[int, float], drift: float | None
    ) -> SyncReport:
        first = next(iter(headers.values()))
        ranks = range(self.collective.world_size)
        losses = [headers[rank].loss if rank in headers else math.nan for rank in ranks]
        return SyncReport(
            first.step, first.h, drift, losses, [waits.get(rank, math.nan) for rank in ranks]
        )

    def _check_finite(
        self, headers: Mapping[int, Header], memory: Memory, fragment: int | None = None
    ) -> None:
        """Raise `NonFiniteError` if a rank brought NaN or infinity into what ``memory`` holds."""
        bad = [rank for rank, header in headers.items() if not header.finite]
        if not bad:
            return
        # A scan that overflows on finite values raises the flag too: only names make it an error.
        whole = fragment is None
        names = memory.non_finite() if whole else self._fragments.non_finite(fragment)
        if names:
            raise NonFiniteError(_brought(bad, headers[bad[0]].step, _few(names)))

    @torch.no_grad()
    def check_finite_here(self) -> None:
        """Raise `NonFiniteError` if this replica holds NaN or infinity. No collective."""
        names = [] if bool(self.flat.finite()) else self.flat.non_finite()
        if names:
            raise NonFiniteError(
                f"rank {self.collective.rank} holds NaN or infinity at step {self.step}: "
                f"{_few(names)}"
            )

    # Memory.

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
        self.flat, self.buffers, self._sent = flat, buffers, None
        if self.fragments is not None:
            self.fragments = Fragments(flat, self.fragments.number, self.fragments)

    def state_dict(self) -> dict[str, Any]:
        """The place in the round; nothing may be in flight."""
        reports = {"report": self.report, "landed_report": self._landed_report}
        return {
            **{key: getattr(self, key) for key in _PLACE},
            "rate_sum": float(self._rate_sum),
            "loss_sum": float(self._loss_sum),
            **{key: None if report is None else asdict(report) for key, report in reports.items()},
            "traffic": asdict(self.traffic),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._forget_round()
        for key in _PLACE:
            setattr(self, key, state[key])
        self._rate_sum, self._loss_sum = state["rate_sum"], state["loss_sum"]
        self.report, self._landed_report = (
            None if state[key] is None else SyncReport(**state[key])
            for key in ("report", "landed_report")
        )
        self.traffic = Traffic(**copy.deepcopy(state["traffic"]))

    def forget_others(self) -> None:
        """Drop what was told by ranks that are not those of now."""
        self.traffic.wait, self.report, self._landed_report = [], None, None

    def start_over(self) -> None:
        """Go back to step 0, as if no step had been made."""
        self.step = self.h = self.remaining = self.round = 0
        self._square_spread = 0.0
        self._forget_round()


_PLACE = ("step", "h", "remaining", "round", "_rates", "_losses", "_square_spread")


@dataclass
class _Flight:
    """A mean that was launched; ``ended`` is when it was first seen to have ended."""

    pending: Pending
    sent: Memory
    fragment: int | None
    ends_round: bool
    launched: float
    ended: float | None = None


def _waits(headers: Mapping[int, Header]) -> dict[int, float]:
    """Seconds that each rank was idle for the one that was busy longest."""
    slowest = max(header.busy for header in headers.values())
    return {rank: slowest - header.busy for rank, header in headers.items()}


def _brought(ranks: list[int], step: int, what: str) -> str:
    return (
        f"{ranks_text(ranks)} brought NaN or infinity into the synchronisation at step {step}: "
        f"{what}"
    )


def _few(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
