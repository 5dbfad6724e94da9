"""How replicas meet: who are you, are we in step, is it finite; and what they report.

Before anything is sent or changed, all ranks exchange headers of one fixed size (`header`). An
exchange is waited for, or it goes before a mean that travels behind training and is read when that
has arrived. Exchanges are read in the order in which they were begun.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import header as headers_
from .collective import Collective, Pending
from .errors import CollectiveError, NonFiniteError, ReplicaMismatchError, SyncError, ranks_text
from .faults import control
from .flat import Flat, square_norm, total
from .header import Header, Kind
from .report import Reports, waits_of
from .round import Round
from .traffic import Count, Meter


@dataclass(eq=False)
class Exchange:
    """Headers on their way.

    Attributes:
        slots: where they arrive, (world_size, SLOT) of bytes.
        headers: by rank, once somebody has read them.
        failed: why they will not be read.
    """

    pending: Pending
    slots: Tensor
    headers: dict[int, Header] | None = None
    failed: ReplicaMismatchError | None = None


# By process group: the names of the optimizers that were built, and the exchanges that have been
# begun behind training and not been read, in that order.
_built: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
_unread: weakref.WeakKeyDictionary[Any, list[Exchange]] = weakref.WeakKeyDictionary()


class Meeting:
    """The protocol, for one optimizer.

    Args:
        collective: all replicas.
        levels: whom with headers are exchanged before, one after another; the last are all.
        round_: the replica's clock.
        flat: its memory.
        inner: the optimizer that makes the local steps.
        name: of the optimizer, for people.
        check_finite: whether to look for NaN and infinity.
        track_drift: whether to measure the replicas' spread.

    Attributes:
        meter: bytes and seconds.
        reports: of the synchronisations, the last one in `reports.last`.
        identity: the optimizer's number among those of the group.
        uneven: who has made how many backward passes in the last round, where that differs.
        alike: whether all replicas were equal bit for bit at the end of a round of several steps.
    """

    def __init__(
        self,
        collective: Collective,
        levels: Sequence[Collective],
        round_: Round,
        flat: Flat,
        inner: Optimizer,
        *,
        name: str = "optimizer",
        check_finite: bool,
        track_drift: bool,
    ) -> None:
        self.collective, self.levels = collective, levels
        self._round, self._flat, self._inner = round_, flat, inner
        self.check_finite, self.track_drift = check_finite, track_drift
        self.meter = Meter(flat.device, collective.world_size)
        self.reports = Reports(collective.world_size)
        self.uneven: dict[int, int] = {}
        self.alike = self._perhaps_alike = False
        self._siblings = _of_group(_built, collective)
        self.identity = len(self._siblings)
        self._siblings.append(f"optimizer {self.identity} ({name})")
        self._slots = self._empty_slots()

    # Headers.

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
        """Exchange headers, level by level, and return each level's. Nothing is changed by it.

        Args:
            kind: why.
            levels: whom with, one after another; None for all of them.
            count: how it is counted.
            settings: what the rule goes by, to be the same on all ranks.
            own: what it is about, tensors (n,); None for all that is averaged.
            square_norm: of that; None: to be computed where drift is tracked.
            believed_equal: whether to send a fingerprint of the parameters.

        Raises:
            ReplicaMismatchError: if the ranks are not at the same call.
            NonFiniteError: if a replica brings NaN or infinity.
        """
        started = self.meter.now()
        met = self.levels if levels is None else levels
        mine = self._header(kind, started, settings, own, square_norm, believed_equal, len(met))
        sent, seen = self._exchange(mine, self._scan(own), met)
        waits = waits_of(seen[-1])
        self.meter.count(count, sent, started, waits)
        self._compare(seen[-1])
        # Only now, or ranks of other groups would wait at the next level for those that raise here.
        self._refuse_non_finite(seen[-1], met[-1])
        headers_.check_start(seen[-1])
        if count == "round":
            self.reports.of_meeting(seen[-1])
        return seen

    def _exchange(
        self, mine: Header, scan: Tensor | None, met: Sequence[Collective]
    ) -> tuple[int, list[dict[int, Header]]]:
        """Headers, level by level; ranks that do not fit are named at the last that they meet."""
        sent, seen = 0, []
        odd: ReplicaMismatchError | None = None
        for number, level in enumerate(met, 1):
            for earlier in _of_group(_unread, level)[-1:]:
                self.read(earlier)
            headers_.write(self._slots, self.collective.rank, mine, scan)
            try:
                with self.explained():
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

    @torch.no_grad()
    def begin(
        self,
        started: float,
        settings: object,
        own: Sequence[Tensor],
        square_norm: float | None = None,
    ) -> Exchange:
        """Begin an exchange that goes before what is about to be launched behind training.

        Args:
            started: when this rank came, of the meter's clock.
            settings, own, square_norm: as for `meet`.
        """
        slots = self._empty_slots()
        mine = self._header(Kind.SYNC, started, settings, own, square_norm)
        headers_.write(slots, self.collective.rank, mine, self._scan(own))
        with self.explained():
            exchange = Exchange(self.collective.start_rows_(slots), slots)
        _of_group(_unread, self.collective).append(exchange)
        return exchange

    def read(self, exchange: Exchange) -> dict[int, Header]:
        """The headers of an exchange, when they have arrived.

        What was begun before it comes first. Where that met another optimizer's, nobody knows
        what answers the rest: it is not waited for.
        """
        unread = _of_group(_unread, self.collective)
        while exchange in unread:
            first = unread.pop(0)
            try:
                self._read(first)
            except ReplicaMismatchError as error:
                if len({header.identity for header in (first.headers or {}).values()}) != 1:
                    for later in unread:
                        later.failed = error
                    unread.clear()
                raise
        return self._read(exchange)

    def _read(self, exchange: Exchange) -> dict[int, Header]:
        if exchange.failed is not None:
            raise exchange.failed
        if exchange.headers is None:
            with self.explained():
                exchange.pending.wait()
            exchange.headers = headers_.read(exchange.slots, self.collective.ranks)
        headers_.check_in_step(exchange.headers, self._name)
        return exchange.headers

    def check(self, headers: Mapping[int, Header]) -> None:
        """What `meet` looks at in headers, for those that were read late."""
        headers_.check_start(headers)
        self._compare(headers)

    def answered(self, exchange: Exchange) -> bool:
        """Whether all ranks have begun this exchange for the same optimizer."""
        headers = (exchange.headers or {}).values()
        mine = Kind.SYNC, self.identity
        return bool(headers) and all((h.kind, h.identity) == mine for h in headers)

    def _compare(self, headers: Mapping[int, Header]) -> None:
        """Take note if some have made more steps than they say, `uneven`, and if replicas that
        have trained apart are equal, `alike`.

        A sum is compared, which is at hand; where that is the same, fingerprints the next time.
        """
        all_ = list(headers.values())
        if len(all_) == 1 or all_[0].kind is not Kind.SYNC:
            return
        made = {rank: header.backwards for rank, header in headers.items()}
        self.uneven = made if len(set(made.values())) > 1 else {}
        if all_[0].h == 1:
            return
        self.alike = bool(all_[0].fingerprint) and len({h.fingerprint for h in all_}) == 1
        self._perhaps_alike = len({h.total for h in all_}) == 1  # NaN is never equal

    def _refuse_non_finite(self, headers: Mapping[int, Header], level: Collective) -> None:
        bad = [rank for rank, header in headers.items() if not header.finite]
        if not bad:
            return
        # A scan that overflows on finite values raises the flag too: only names make it an error.
        names = self._flat.non_finite() if self.collective.rank in bad else []
        texts = control.gather(level, few(names))
        if any(texts):
            found = next(text for text in texts if text)
            raise NonFiniteError(_brought(bad, self._round.step, found))

    def check_finite_landed(
        self, headers: Mapping[int, Header], look: Callable[[], list[str]]
    ) -> None:
        """Raise `NonFiniteError` if a rank brought NaN or infinity into what has landed.

        ``look`` gives the names of what holds them; it is called if a flag is raised.
        """
        bad = [rank for rank, header in headers.items() if not header.finite]
        names = look() if bad else []
        if names:
            raise NonFiniteError(_brought(bad, headers[bad[0]].step, few(names)))

    def _empty_slots(self) -> Tensor:
        m = self.collective.world_size
        return torch.zeros(m, headers_.SLOT, dtype=torch.uint8, device=self._flat.device)

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
        clock, flat = self._round, self._flat
        looks = self._perhaps_alike and kind is Kind.SYNC
        if norm is None:
            norm = square_norm(own or flat.params) if self.track_drift else 0.0
        modes = [mode for _, mode in modes_of(self._inner)]
        unknown = self.check_finite or clock.number >= 4
        return Header(
            kind=kind,
            step=clock.step,
            h=clock.h,
            identity=self.identity,
            busy=now - self.meter.resumed,
            square_norm=norm,
            loss=clock.loss,
            settings=_checksum((settings, modes)),
            rates=_checksum(clock.rates()) if kind is Kind.SYNC else 0,
            fingerprint=flat.fingerprint() if believed_equal or looks else 0,
            start=clock.start,
            backwards=clock.backwards,
            levels=levels,
            total=math.nan if unknown else float(self._total(own)),
        )

    def _scan(self, own: Sequence[Tensor] | None) -> Tensor | None:
        return self._total(own) if self.check_finite else None

    def _total(self, own: Sequence[Tensor] | None) -> Tensor:
        return self._flat.total() if own is None else total(own)

    def _name(self, identity: int) -> str:
        known = 0 <= identity < len(self._siblings)
        return self._siblings[identity] if known else f"optimizer {identity}"

    # Errors.

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What torch raises in here, where a rank has gone, is raised with rank and step."""
        try:
            yield
        except SyncError:
            raise
        except (RuntimeError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = "another rank has died or hangs, or another collective ran in this process "
            reason += f"group: {first}"
            if self.collective.gone:
                reason = "the process group is gone: call finish() before destroy_process_group()"
            raise CollectiveError(f"{self.where()} failed, for {reason}") from error

    def where(self) -> str:
        """This rank and its step, for people."""
        return f"rank {self.collective.rank}: the synchronisation at step {self._round.step}"

    # State.

    def relayout(self, flat: Flat) -> None:
        """Go on with another layout of the memory."""
        self._flat = flat

    def forget_others(self) -> None:
        """Drop what came from ranks that are not those of now."""
        self.meter.forget_waits()
        self.reports.forget()

    def state_dict(self) -> dict[str, Any]:
        return {**self.reports.state_dict(), "traffic": self.meter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.reports.load_state_dict(state)
        self.meter.load_state_dict(state["traffic"])


def modes_of(inner: Optimizer) -> list[tuple[dict[str, Any], Any]]:
    """Where an optimizer with two modes keeps which one it is in, and which that is now."""
    homes = [vars(inner), *inner.param_groups]
    return [(home, home["train_mode"]) for home in homes if "train_mode" in home]


def few(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _of_group(kept: MutableMapping[Any, list[Any]], collective: Collective) -> list[Any]:
    """What is kept of the process group; nothing is where there is one rank."""
    return kept.setdefault(collective.key, []) if collective.key else []


def _checksum(settings: object) -> int:
    return zlib.crc32(repr(settings).encode())


def _brought(ranks: list[int], step: int, what: str) -> str:
    return (
        f"{ranks_text(ranks)} brought NaN or infinity into the synchronisation at step {step}: "
        f"{what}"
    )
