"""One model copy: its flat memory, its place in the round, and how it meets the others."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
import weakref
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import control
from . import header as headers_
from .buffers import Buffers
from .collective import Across, Collective, Pending, Traffic, synchronised_clock
from .errors import (
    CollectiveError,
    NonFiniteError,
    ReplicaMismatchError,
    SyncError,
    ranks_text,
)
from .flat import Flat, Fragments, Memory, square_norm, total
from .header import Header, Kind


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


# How the bytes and seconds of a meeting are counted: as those of a synchronisation that ends a
# round, of a part of one, or of something beside.
Count = Literal["round", "part", "other"]

# By process group: the names of the optimizers that were built, and the headers that have been
# launched and not been read, in that order.
_built: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
_unread: weakref.WeakKeyDictionary[Any, list[_Headers]] = weakref.WeakKeyDictionary()


class Replica:
    """What a rule works on.

    Whenever replicas meet they first tell each other what they have come for (`meet`). Only then
    are parameters touched, and what overwrites them does so in `changing`: after an error a replica
    holds what it held before, or is lost, and says so to whoever goes on with it.

    Attributes:
        flat: the parameters' memory.
        collective: rank, world size, and the collectives.
        levels: the sums that one after another make the sum over all replicas.
        meets: whom with headers are exchanged before, one after another.
        fragments: of the parameters, where they are sent one at a time.
        inner: the optimizer that makes the local steps.
        step: local steps finished.
        h: local steps in the current round, or in the last one when it has ended.
        open: whether a round is open.
        remaining: local steps left in the open round; 0 where only its synchronisation is owed.
        start: a sample of the parameters at the round's start, where all ranks should have the
            same; else 0.
        round: rounds finished.
        lost: why the parameters are lost; None while they are not.
        uneven: who has made how many backward passes in the last round, where that differs.
        alike: whether all replicas were equal bit for bit at the end of a round of several steps.
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
        name: str = "optimizer",
        check_finite: bool,
        track_drift: bool,
    ) -> None:
        self.flat, self.collective, self.buffers, self.inner = flat, collective, buffers, inner
        self.check_finite, self.track_drift = check_finite, track_drift
        self.levels: Sequence[Collective | Across] = [collective]
        self.meets: Sequence[Collective] = [collective]
        self.fragments: Fragments | None = None
        self.step = self.h = self.remaining = self.round = self.start = 0
        self.open = False
        self.lost: str | None = None
        self.uneven: dict[int, int] = {}
        self.alike = self._perhaps_alike = False
        if collective.world_size > 1:
            self._count_backwards()
        self._siblings = _of_group(_built, collective)
        self._identity = len(self._siblings)
        self._siblings.append(f"optimizer {self._identity} ({name})")
        self._flights: Collective | None = None
        self.traffic = Traffic()
        self.report: SyncReport | None = None
        self.device = flat.buffers[0].data.device
        self._landed_report: SyncReport | None = None
        self._flight: _Flight | None = None
        self._sent: Memory | None = None
        self._slots = self._empty_slots()
        self._square_spread = 0.0
        self._resumed = synchronised_clock(self.device)
        self._forget_round()

    def _count_backwards(self) -> None:
        """Count them, by the first parameter that is trained. Cost: 1 µs each."""
        me = weakref.ref(self)

        def count(_: Tensor) -> None:
            if (replica := me()) is not None:
                replica.backwards += 1

        p = next((p for _, p in self.flat.named if p.requires_grad), None)
        if p is not None:
            p.register_post_accumulate_grad_hook(count)

    def use_own_group(self) -> None:
        """Have means that run behind training (`launch`) from now on. Collective.

        They travel in a group of this optimizer's own, where nothing waits behind them. Headers go
        where those of all other optimizers go, so that ranks which bring different ones find out.
        """
        self._flights = self.collective.subgroup(range(self.collective.world_size))

    def use_fragments(self, number: int) -> None:
        """Send the parameters in so many fragments, one at a time, from now on."""
        self.fragments = Fragments(self.flat, number)

    # The place in the round.

    def begin_round(self, h: int, *, equal: bool = False) -> None:
        """A round of ``h`` local steps begins, all replicas being ``equal`` or perhaps not."""
        self.h = self.remaining = h
        self.open = True
        self.start = self.flat.sample() if equal and self.collective.world_size > 1 else 0

    def end_round(self, *, next_loss: bool = False) -> None:
        """The round has ended; ``next_loss``: what was recorded is the loss of the next one."""
        self.remaining = 0
        self.open = False
        self.round += 1
        self.traffic.syncs += 1
        loss = self._step_loss
        self._forget_round()
        self._step_loss = loss if next_loss else None

    def _forget_round(self) -> None:
        self.last_lr = self.lr if hasattr(self, "_rates") else 0.0
        # A 0-dim tensor once a loss or a rate was one: nothing is read before the boundary.
        self._rate_sum: float | Tensor = 0.0
        self._loss_sum: float | Tensor = 0.0
        self._rates = self._losses = self.backwards = 0
        self._step_loss: float | Tensor | None = None

    def record_lr(self, lr: float | Tensor) -> None:
        """Take note of a step's learning rate."""
        if isinstance(lr, Tensor) and lr.device.type != "mps":
            lr = lr.detach().double()
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
            if loss.device.type != "mps":  # a sum of many thousands would stop growing
                loss = loss.double()
        self._step_loss = loss if isinstance(loss, Tensor) else float(loss)

    @property
    def has_loss(self) -> bool:
        """Whether the loss of the step that is being made has been recorded."""
        return self._step_loss is not None

    def count_step(self) -> None:
        """A local step has been made."""
        self.step += 1
        if self._rates == self.h - self.remaining:  # a step that was skipped, but counts
            self.record_lr(self.inner.param_groups[0].get("lr", math.nan))
        if self.remaining:
            self.remaining -= 1
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
    def equalise(self, flat: Flat | None = None, buffers: Buffers | None = None) -> None:
        """Start from rank 0's parameters and buffers; or those of another layout. Collective."""
        started = synchronised_clock(self.device)
        with self.told():
            sent = self.collective.broadcast_([b.data for b in (flat or self.flat).buffers])
            (buffers or self.buffers).equalise(self.collective)
        self._resumed = synchronised_clock(self.device)
        self.traffic.other_bytes += sent
        self.traffic.other_seconds += self._resumed - started

    @torch.no_grad()
    def meet(
        self,
        kind: Kind = Kind.SYNC,
        levels: Sequence[Collective] | None = None,
        *,
        count: Count = "round",
        settings: object = (),
        own: Sequence[Tensor] | None = None,
        square_norm: float | None = None,
        believed_equal: bool = False,
    ) -> list[dict[int, Header]]:
        """Tell each other what for, level by level; return each level's headers. Collective.

        An exchange of a few bytes, the same whatever follows. Nothing is changed by it. Every
        other collective of this class comes after one, or carries one along.

        Args:
            kind: why.
            levels: whom with, one after another; None for all `meets`.
            count: how it is counted.
            settings: what the rule goes by, to be the same on all ranks.
            own: what it is about, tensors (n,); None for all that is averaged.
            square_norm: of that; None: to be computed where drift is tracked.
            believed_equal: whether to tell a fingerprint of the parameters.

        Raises:
            ReplicaMismatchError: if the ranks are not at the same call.
            NonFiniteError: if a replica brings NaN or infinity.
        """
        self.check_usable()
        self.flat.check_pointers()
        started = synchronised_clock(self.device)
        met = self.meets if levels is None else levels
        mine = self._header(kind, started, settings, own, square_norm, believed_equal, len(met))
        sent, seen = self._exchange(mine, self._scan(own), met)
        waits = _waits(seen[-1])
        self._count(count, sent, started, waits)
        self._compare(seen[-1])
        # Only now, or ranks of other groups would wait at the next level for those that raise here.
        self._refuse_non_finite(seen[-1], met[-1])
        headers_.check_start(seen[-1])
        if count == "round":
            self.report = self._report(seen[-1], waits, None)
        return seen

    def _exchange(
        self, mine: Header, scan: Tensor | None, met: Sequence[Collective]
    ) -> tuple[int, list[dict[int, Header]]]:
        """Headers, level by level; ranks that do not fit are told of at the last that they meet."""
        sent, seen = 0, []
        odd: ReplicaMismatchError | None = None
        for number, level in enumerate(met, 1):
            for earlier in _of_group(_unread, level)[-1:]:
                self._hear(earlier)
            headers_.write(self._slots, self.collective.rank, mine, scan)
            try:
                with self.told():
                    rows = level.start_rows_(self._slots)
                    rows.wait()
                    sent += rows.bytes
            except CollectiveError:
                if odd is not None:
                    raise odd from None
                raise
            seen.append(headers_.read(self._slots, level.ranks))
            try:
                headers_.check_in_step(seen[-1], self._name)
            except ReplicaMismatchError as error:
                if not all(header.levels > number for header in seen[-1].values()):
                    raise
                odd = error  # other groups wait at the next level, and see it there
        return sent, seen

    def _hear(self, told: _Headers) -> dict[int, Header]:
        """The headers that went before what was launched, when they have arrived.

        What was launched before it comes first. Where that met another optimizer's, nobody knows
        what answers the rest: it is not waited for.
        """
        unread = _of_group(_unread, self.collective)
        while told in unread:
            first = unread.pop(0)
            try:
                self._read(first)
            except ReplicaMismatchError as error:
                if len({header.identity for header in (first.arrived or {}).values()}) != 1:
                    for later in unread:
                        later.failed = error
                    unread.clear()
                raise
        return self._read(told)

    def _read(self, told: _Headers) -> dict[int, Header]:
        if told.failed is not None:
            raise told.failed
        if told.arrived is None:
            with self.told():
                told.pending.wait()
            told.arrived = headers_.read(told.slots, self.collective.ranks)
        headers_.check_in_step(told.arrived, self._name)
        return told.arrived

    def _compare(self, headers: Mapping[int, Header]) -> None:
        """Take note if some have made more steps than they tell, `uneven`, and if replicas that
        have trained apart are equal, `alike`.

        A sum is compared, which is at hand; where that is the same, fingerprints the next time.
        """
        told = list(headers.values())
        if len(told) == 1 or told[0].kind is not Kind.SYNC:
            return
        made = {rank: header.backwards for rank, header in headers.items()}
        self.uneven = made if len(set(made.values())) > 1 else {}
        if told[0].h == 1:
            return
        self.alike = bool(told[0].fingerprint) and len({h.fingerprint for h in told}) == 1
        self._perhaps_alike = len({h.total for h in told}) == 1  # NaN is never equal

    def _name(self, identity: int) -> str:
        known = 0 <= identity < len(self._siblings)
        return self._siblings[identity] if known else f"optimizer {identity}"

    def _refuse_non_finite(self, headers: Mapping[int, Header], level: Collective) -> None:
        bad = [rank for rank, header in headers.items() if not header.finite]
        if not bad:
            return
        # A scan that overflows on finite values raises the flag too: only names make it an error.
        names = self.flat.non_finite() if self.collective.rank in bad else []
        texts = control.gather(level, _few(names))
        if any(texts):
            raise NonFiniteError(_brought(bad, self.step, next(text for text in texts if text)))

    @contextmanager
    def told(self) -> Iterator[None]:
        """What torch raises in here, where a rank has gone, is told with rank and step."""
        try:
            yield
        except SyncError:
            raise
        except (RuntimeError, ValueError) as error:
            raise CollectiveError(self._failed(error)) from error

    def _failed(self, error: BaseException) -> str:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (
            f"{self._at()} failed, for another rank has died or hangs, or another collective ran "
            f"in this process group: {first}"
        )

    def _at(self) -> str:
        return f"rank {self.collective.rank}: the synchronisation at step {self.step}"

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
        reason = str(error) if isinstance(error, SyncError) else f"{self._at()} failed: {error!r}"
        self.lost = f"{reason}; {what}. Go on from the newest checkpoint"
        return self.lost

    def check_equal(self) -> None:
        """Raise `ReplicaMismatchError` unless all replicas hold the same parameters. Collective."""
        (*_, headers) = self.meet(Kind.CONSENSUS, count="other", believed_equal=True)
        if len({h.fingerprint for h in headers.values()}) > 1:
            raise ReplicaMismatchError(
                f"the replicas hold different weights at step {self.step}, where all should be "
                "equal: some rank has changed its own since the last round, as by loading a "
                "checkpoint. Load on all ranks alike"
            )

    def check_usable(self) -> None:
        """Raise `SyncError` if the parameters are lost."""
        if self.lost is not None:
            raise SyncError(self.lost)

    def mean_(
        self,
        kind: Kind = Kind.SYNC,
        *,
        ends_round: bool = True,
        levels: int | None = None,
        settings: object = (),
        believed_equal: bool = False,
    ) -> bool:
        """Meet, and replace what is averaged by its mean over the replicas, x ← x̄. Collective.

        Args:
            kind: why.
            ends_round: whether this ends a round; else it is counted apart.
            levels: the mean over the replicas that the first so many levels cover; None for all.
            settings: what the rule goes by, to be the same on all ranks.
            believed_equal: whether to look if the replicas hold the same parameters.

        Returns:
            Whether they do, if looked for; else False. If so parameters keep their bits.

        Raises:
            ReplicaMismatchError: if the ranks are not at the same call.
            NonFiniteError: if a replica brought NaN or infinity.
        """
        count: Count = "round" if ends_round else "other"
        sums, met = self.levels[:levels], self.meets[:levels]
        self.gather_buffers(sums[-1])
        seen = self.meet(kind, met, count=count, settings=settings, believed_equal=believed_equal)
        equal = believed_equal and len({h.fingerprint for h in seen[-1].values()}) == 1
        if believed_equal and not equal:
            warnings.warn(
                f"rank {self.collective.rank}: the replicas held different weights at step "
                f"{self.step}, where all should be equal, and are made equal: some rank has "
                "changed its own since the last round, as by loading a checkpoint",
                stacklevel=2,
            )
        if not equal or self.buffers.travel:
            # The mean of m equal numbers is not always that number, to the last bit.
            saved = self.snapshot() if equal else None
            # Who asks for a consensus has a copy, and writes it back whatever happens.
            with self.told() if kind is Kind.CONSENSUS else self.changing():
                self.sum_(seen[-1], sums, count=count)
                if saved is not None:
                    self.restore(saved)
        if not ends_round and kind is Kind.FINISH and self._landed_report is not None:
            self.report = self._landed_report
        return equal

    @torch.no_grad()
    def gather_buffers(self, level: Collective | Across | None = None) -> None:
        """Copy the model's buffers to where they are averaged, before `meet`."""
        ranks = (level or self.collective).ranks
        self.buffers.gather(self.flat.views, from_rank0=self.collective.rank == ranks[0])

    def sum_(
        self,
        headers: Mapping[int, Header],
        levels: Sequence[Collective | Across] | None = None,
        *,
        count: Count = "round",
    ) -> None:
        """The mean that follows `meet`, within `changing`. Collective."""
        started, sent = synchronised_clock(self.device), 0
        wholes, averaged = zip(*((b.data, b.averaged) for b in self.flat.buffers), strict=True)
        with self.told():
            for level in self.levels if levels is None else levels:
                sent += level.mean_(wholes, averaged)
        self.count_part(sent, started, count)
        self.buffers.scatter(self.flat.views)
        if count == "round":
            self._tell_spread(headers, self.flat)

    def _tell_spread(self, headers: Mapping[int, Header], mean: Memory) -> None:
        if self.track_drift and self.report is not None:
            drift = headers_.spread(headers, mean.square_norm())
            self.report = replace(self.report, drift=drift)

    def measure_spread(self, headers: Mapping[int, Header], level: Collective) -> None:
        """The spread where no mean is at hand. Collective, but only where drift is tracked."""
        if self.track_drift:
            started = synchronised_clock(self.device)
            with torch.no_grad(), self.told():
                mean = self._copy(self.flat.params, len(level.ranks))
                sent = level.sum_(mean.params)
            self._count("other", sent, started, {})
            self._tell_spread(headers, mean)

    @torch.no_grad()
    def launch(
        self, settings: object = (), *, fragment: int | None = None, ends_round: bool = True
    ) -> None:
        """Start the mean of the parameters as they are now, x̄, behind training. Collective.

        What is sent is a copy. One mean at a time: `land` the last one before.

        Args:
            settings: as for `meet`.
            fragment: which of the `fragments`; None: all parameters.
            ends_round: whether this ends a round; else it is a part of the synchronisation that
                the round's end will complete.

        Raises:
            RuntimeError: if the parameters were moved out of their memory.
        """
        assert self._flights is not None, "a rule that launches has `overlaps`"
        self.check_usable()
        self.flat.check_pointers()
        started = synchronised_clock(self.device)
        own = self._part(fragment)
        sent = self._copy(own, self.collective.world_size)
        slots = self._empty_slots()
        mine = self._header(Kind.SYNC, started, (settings, fragment), own)
        headers_.write(slots, self.collective.rank, mine, self._scan(own))
        with self.told():
            told = _Headers(self.collective.start_rows_(slots), slots)
            _of_group(_unread, self.collective).append(told)
            pending = self._flights.start_sum_([b.data for b in sent.buffers])
        travels = told.pending.bytes + pending.bytes
        if ends_round:
            self.report = self._landed_report
        self._count("round" if ends_round else "part", travels, started, {})
        flight = _Flight(told, pending, sent, fragment, ends_round, self._resumed)
        self._flight = flight

    def mean(self, *, fragment: int | None = None, ends_round: bool = True) -> list[Tensor]:
        """x̄, in memory of its own, which the next mean writes to. Collective; waits for it.

        Args:
            fragment, ends_round: as for `launch`.
        """
        own = self._part(fragment)
        count: Count = "round" if ends_round else "part"
        (headers,) = self.meet(count=count, settings=fragment, own=own)
        started = synchronised_clock(self.device)
        with torch.no_grad(), self.told():
            sent = self._copy(own, self.collective.world_size)
            travelled = self.collective.sum_([b.data for b in sent.buffers])
        self.count_part(travelled, started)
        self._add_to_report(headers, _waits(headers), sent, ends_round=ends_round)
        if ends_round:
            self.report = self._landed_report
        return self._landed(sent, fragment)

    def _part(self, fragment: int | None) -> list[Tensor]:
        params = self.flat.params
        return params if fragment is None else self._fragments.of(params, fragment)

    def _landed(self, sent: Memory, fragment: int | None) -> list[Tensor]:
        return sent.params if fragment is None else self._fragments.mean(fragment)

    def drop(self) -> None:
        """Wait for what is in flight, if anything, and forget it.

        What was launched where another rank made another call is never answered, or by what that
        rank launches next: then no call goes on with this optimizer.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            self._hear(flight.told)
            with self.told():
                flight.pending.wait()
        except SyncError as error:
            self._sent = None  # it may still be written to
            if self.fragments is not None:
                self.fragments = Fragments(self.flat, self.fragments.number, self.fragments)
            if isinstance(error, ReplicaMismatchError) and not self._answered(flight):
                self.lost = (
                    f"{error}. What was launched then is in flight still: go on from the newest "
                    "checkpoint, in new processes"
                )

    def _answered(self, flight: _Flight) -> bool:
        """Whether all ranks have launched this mean."""
        headers = (flight.told.arrived or {}).values()
        mine = Kind.SYNC, self._identity
        return bool(headers) and all((h.kind, h.identity) == mine for h in headers)

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
        if flight.failed is not None:
            raise flight.failed
        try:
            return self._arrived(flight)
        except Exception as error:
            flight.failed = error
            raise

    def _arrived(self, flight: _Flight) -> list[Tensor]:
        started = synchronised_clock(self.device)
        headers = self._hear(flight.told)
        headers_.check_start(headers)
        self._compare(headers)
        with self.told():
            flight.pending.wait()
        exposed = synchronised_clock(self.device) - started
        self._resumed += exposed  # so that it does not count as busy
        ended = started if flight.ended is None else flight.ended
        self.traffic.exposed += exposed
        if flight.pending.bytes:  # else: one replica, nothing has travelled
            self.traffic.hidden += max(0.0, ended - flight.launched)
        self._check_finite(headers, flight.sent, flight.fragment)
        waits = _waits(headers)
        self.traffic.count_wait(waits, self.collective.world_size)
        self._add_to_report(headers, waits, flight.sent, ends_round=flight.ends_round)
        self._flight = None
        return self._landed(flight.sent, flight.fragment)

    def _add_to_report(
        self,
        headers: Mapping[int, Header],
        waits: Mapping[int, float],
        sent: Memory,
        *,
        ends_round: bool,
    ) -> None:
        """Fragments' spreads add up to that of the whole; each is as its fragment was sent."""
        spread = headers_.spread(headers, sent.square_norm()) if self.track_drift else None
        self._square_spread += (spread or 0.0) ** 2
        if ends_round:
            whole = None if spread is None else math.sqrt(self._square_spread)
            self._landed_report = self._report(headers, waits, whole)
            self._square_spread = 0.0

    @property
    def _fragments(self) -> Fragments:
        assert self.fragments is not None, "use_fragments() comes first"
        return self.fragments

    @torch.no_grad()
    def fetch_(self, into: Sequence[Tensor], level: Collective, rank: int) -> None:
        """Replace ``into``, one tensor (n,) per buffer, by ``rank``'s parameters. Collective."""
        started = synchronised_clock(self.device)
        if self.collective.rank == rank:
            for mine, x in zip(into, self.flat.params, strict=True):
                mine.copy_(x)
        with self.told():
            sent = level.broadcast_(into, list(level.ranks).index(rank))
        self.count_part(sent, started)

    def _empty_slots(self) -> Tensor:
        m = self.collective.world_size
        return torch.zeros(m, headers_.SLOT, dtype=torch.uint8, device=self.device)

    def _header(
        self,
        kind: Kind,
        now: float,
        settings: object,
        own: Sequence[Tensor] | None,
        norm: float | None = None,
        believed_equal: bool = False,
        levels: int = 1,
    ) -> Header:
        looks = self._perhaps_alike and kind is Kind.SYNC
        if norm is None:
            norm = square_norm(own or self.flat.params) if self.track_drift else 0.0
        return Header(
            kind=kind,
            step=self.step,
            h=self.h,
            identity=self._identity,
            busy=now - self._resumed,
            square_norm=norm,
            loss=self.loss,
            settings=_checksum((settings, [mode for _, mode in modes_of(self.inner)])),
            rates=_checksum(self._rates_now()) if kind is Kind.SYNC else 0,
            fingerprint=self.flat.fingerprint() if believed_equal or looks else 0,
            start=self.start,
            backwards=self.backwards,
            levels=levels,
            total=math.nan if self.check_finite or self.round >= 4 else float(self._total(own)),
        )

    def _rates_now(self) -> list[float | None]:
        rates = [group.get("lr") for group in self.inner.param_groups]
        return [self.lr, *(None if rate is None else float(rate) for rate in rates)]

    def _scan(self, own: Sequence[Tensor] | None) -> Tensor | None:
        return self._total(own) if self.check_finite else None

    def _total(self, own: Sequence[Tensor] | None) -> Tensor:
        return self.flat.total() if own is None else total(own)

    def _count(self, count: Count, sent: int, started: float, waits: Mapping[int, float]) -> None:
        """Count a meeting, or the part of one that follows `meet`."""
        traffic, now = self.traffic, synchronised_clock(self.device)
        seconds = now - started
        # What happens within a round is not busy time, and does not begin a new count of it.
        self._resumed = self._resumed + seconds if count == "other" else now
        if count == "other":
            traffic.other_bytes += sent
            traffic.other_seconds += seconds
            return
        traffic.bytes += sent
        traffic.exposed += seconds
        if waits:
            traffic.count_wait(waits, self.collective.world_size)

    def count_part(self, sent: int, started: float, count: Count = "part") -> None:
        """Count bytes and seconds that follow a `meet` which was counted as ``count``."""
        self._count("other" if count == "other" else "part", sent, started, {})

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
        self, headers: Mapping[int, Header], memory: Memory, fragment: int | None
    ) -> None:
        """Raise `NonFiniteError` if a rank brought NaN or infinity into what ``memory`` holds."""
        bad = [rank for rank, header in headers.items() if not header.finite]
        if not bad:
            return
        whole = fragment is None
        names = memory.non_finite() if whole else self._fragments.non_finite(fragment)
        if names:
            raise NonFiniteError(_brought(bad, headers[bad[0]].step, _few(names)))

    @torch.no_grad()
    def check_finite_here(self) -> None:
        """Raise `NonFiniteError` if this replica holds NaN or infinity. No collective."""
        names = [] if bool(torch.isfinite(self.flat.total())) else self.flat.non_finite()
        if names:
            raise NonFiniteError(
                f"rank {self.collective.rank} holds NaN or infinity at step {self.step}: "
                f"{_few(names)}"
            )

    # Memory.

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
        state = {"open": state["remaining"] > 0, "start": 0, **state}  # not in version 3
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
        self.step = self.h = self.remaining = self.round = self.start = 0
        self.open = False
        self._square_spread = 0.0
        self._forget_round()


_PLACE = (
    "step", "h", "open", "remaining", "start", "round", "_rates", "_losses", "_square_spread",
)  # fmt: skip


@dataclass(eq=False)
class _Headers:
    """Headers that were launched.

    Attributes:
        arrived: what has come of them, once somebody has read it.
        failed: why it will not be read.
    """

    pending: Pending
    slots: Tensor
    arrived: dict[int, Header] | None = None
    failed: ReplicaMismatchError | None = None


@dataclass
class _Flight:
    """A mean that was launched.

    Attributes:
        told: the headers that go before it.
        pending, sent: the mean.
        ended: when it was first seen to have ended.
        failed: why it has not arrived.
    """

    told: _Headers
    pending: Pending
    sent: Memory
    fragment: int | None
    ends_round: bool
    launched: float
    ended: float | None = None
    failed: Exception | None = None


def modes_of(inner: Optimizer) -> list[tuple[dict[str, Any], Any]]:
    """Where an optimizer with two modes keeps which one it is in, and which that is now."""
    places = [vars(inner), *inner.param_groups]
    return [(place, place["train_mode"]) for place in places if "train_mode" in place]


def _of_group(kept: MutableMapping[Any, list[Any]], collective: Collective) -> list[Any]:
    """What is kept of the process group; nothing is where there is one rank."""
    return kept.setdefault(collective.key, []) if collective.key else []


def _checksum(settings: object) -> int:
    return zlib.crc32(repr(settings).encode())


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
