"""What the replicas report of a synchronisation, made of the headers that they exchange."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .header import Header, spread


@dataclass(frozen=True)
class SyncReport:
    """What the replicas reported at a synchronisation; equal on all ranks that took part.

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


class Reports:
    """The reports of one replica.

    Args:
        world_size: number of replicas.

    Attributes:
        last: of the last synchronisation; where means travel behind training, of the last one that
            had landed when a round ended.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._square_spread = 0.0
        self.last: SyncReport | None = None
        self._landed: SyncReport | None = None

    def of_meeting(self, headers: Mapping[int, Header]) -> None:
        """A synchronisation begins."""
        self.last = self._made(headers, None)

    def _made(self, headers: Mapping[int, Header], drift: float | None) -> SyncReport:
        first, waits = next(iter(headers.values())), waits_of(headers)
        ranks = range(self._world_size)
        losses = [headers[rank].loss if rank in headers else math.nan for rank in ranks]
        return SyncReport(
            first.step, first.h, drift, losses, [waits.get(rank, math.nan) for rank in ranks]
        )

    def add_spread(self, headers: Mapping[int, Header], mean_square_norm: float) -> None:
        """Add the replicas' spread to the last report."""
        if self.last is not None:
            self.last = replace(self.last, drift=spread(headers, mean_square_norm))

    def of_landing(
        self, headers: Mapping[int, Header], mean_square_norm: float | None, *, ends_round: bool
    ) -> None:
        """A mean has landed; parts' spreads add up to that of the whole."""
        if mean_square_norm is not None:
            self._square_spread += spread(headers, mean_square_norm) ** 2
        if ends_round:
            whole = None if mean_square_norm is None else math.sqrt(self._square_spread)
            self._landed = self._made(headers, whole)
            self._square_spread = 0.0

    def show_landed(self) -> None:
        """`last` is now of what has landed last, if anything has: not as soon as it lands, for a
        look at the state or at the consensus lets it land early."""
        if self._landed is not None:
            self.last = self._landed

    def start_over(self) -> None:
        """As if no step had been made."""
        self._square_spread = 0.0

    def forget(self) -> None:
        """The ranks are not those that reported."""
        self.last = self._landed = None

    def state_dict(self) -> dict[str, Any]:
        reports = {"report": self.last, "landed_report": self._landed}
        return {
            "_square_spread": self._square_spread,
            **{key: None if report is None else asdict(report) for key, report in reports.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._square_spread = state["_square_spread"]
        self.last, self._landed = (
            None if state[key] is None else SyncReport(**state[key])
            for key in ("report", "landed_report")
        )


def waits_of(headers: Mapping[int, Header]) -> dict[int, float]:
    """Seconds that each rank was idle for the one that was busy longest."""
    slowest = max(header.busy for header in headers.values())
    return {rank: slowest - header.busy for rank, header in headers.items()}
