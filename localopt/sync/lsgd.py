"""Leader SGD (LSGD): replicas follow the one with the lowest loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..collective import Collective
from ..errors import NonFiniteError, ranks_text
from ..flat import pull_
from ..header import Header, Kind
from ..replica import Replica
from ..traffic import Sending
from ..transport import fetch_, report_spread
from ..vector import Vector
from .rule import Rule


@dataclass(eq=False)
class LSGD(Rule):
    """Pull every replica towards a leader: the replica with the lowest training loss.

    At the end of a round the replicas exchange their losses, means over the round, and the leader
    sends its parameters: L ← x_leader, x_i ← (1 - c) x_i + c L. After every local step
    x_i ← x_i - (p/H)(x_i - L), in the first round with the initial model for L. Among equal losses
    the lowest rank leads; a NaN never does. There is one leader for the whole model.

    With two levels, groups of ``group_size`` consecutive ranks follow a leader of their own every
    round (c, p), and at every ``global_every``-th round's end also the best of all replicas
    (c_global); each step is pulled to it by p_global / (global_every H), before the pull to the
    group's own.

    Replicas never agree; what is evaluated is their mean. The loss comes from ``step(closure)``
    or `LocalOptimizer.record_loss`, called before the step. The strengths c are per
    synchronisation: where H grows, as with QSR, a step is pulled less.

    Args:
        c: pull at a synchronisation, in [0, 1].
        p: pull over the steps of a round, in [0, 1].
        group_size: replicas in a group; None for one level. It must divide their number.
        c_global, p_global: as c and p, towards the global leader.
        global_every: rounds between synchronisations with it; needed with group_size.

    Raises:
        ValueError: for settings outside these, or where none would pull at all.
        NonFiniteError: at a synchronisation, if no replica has a loss that is a number.

    Source: Teng et al., NeurIPS 2019, arXiv 1905.10395.
    """

    agrees = False
    c: float = 0.1
    p: float = 0.1
    group_size: int | None = None
    c_global: float = 0.1
    p_global: float = 0.1
    global_every: int | None = None

    needs_loss = True

    def __post_init__(self) -> None:
        for name in ("c", "p", "c_global", "p_global"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"LSGD: {name} is {getattr(self, name)}: it must lie in [0, 1]")
        if self.c == self.p == 0:
            raise ValueError("LSGD: c and p are both 0: no replica would follow its leader")
        if (self.group_size is None) != (self.global_every is None):
            raise ValueError(
                f"LSGD: group_size is {self.group_size} and global_every {self.global_every}: "
                "two levels need both, one level neither"
            )
        for name in ("group_size", "global_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"LSGD: {name} is {value!r}: it must be an integer of at least 1")
        if self.group_size and self.c_global == self.p_global == 0:
            raise ValueError("LSGD: c_global and p_global are both 0: groups would never meet")

    def sends(self, parameters: int, extra: int, itemsize: int) -> list[Sending]:
        sent = [Sending("broadcast", parameters * itemsize, self.group_size)]
        if self.global_every is not None:
            sent += [Sending("broadcast", parameters * itemsize, every=self.global_every)]
        return sent

    def levels(self, everyone: Collective) -> Sequence[Collective]:
        if self.group_size is None:
            return [everyone]
        inside, _ = everyone.split(self.group_size)
        return [inside, everyone]

    def attach(self, replica: Replica) -> None:
        super().attach(replica)
        self._group, *_ = self._levels = self.levels(replica.collective)
        # A leader is sent as it is, in the parameters' own type.
        self.leader = self.anchor("leader", wide=False)
        self.global_leader: Vector | None = None
        if self.group_size is not None:
            self.global_leader = self.anchor("global leader", wide=False)

    @torch.no_grad()
    def after_step(self) -> None:
        x, h = self.replica.flat.params, self.replica.round.h
        if self.global_leader is not None and self.global_every and self.p_global:
            pull_(x, self.global_leader.data, self.p_global / (self.global_every * h))
        if self.p:
            pull_(x, self.leader.data, self.p / h)

    @torch.no_grad()
    def end_round(self) -> None:
        rounds = self.replica.round.number + 1
        every = self.global_every
        meets_all = every is not None and rounds % every == 0
        levels = self._levels if meets_all else self._levels[:1]
        seen = self.replica.meet(Kind.SYNC, levels)
        self._check_leaders(seen[-1])
        report_spread(self.replica, seen[-1], levels[-1])
        self._follow(self.leader, self._group, leading(seen[0]), self.c)
        if meets_all and self.global_leader is not None:
            best = leading(seen[1])
            self._follow(self.global_leader, levels[1], best, self.c_global, pulled=True)
        self.replicas_agree = False

    def _check_leaders(self, headers: Mapping[int, Header]) -> None:
        """Raise on all ranks that met if one of their groups has no leader."""
        size = self._group.world_size
        for first in range(min(headers), max(headers) + 1, size):
            leading({rank: headers[rank] for rank in range(first, first + size)})

    def _follow(
        self, leader: Vector, level: Collective, rank: int, strength: float, *, pulled: bool = False
    ) -> None:
        """``pulled``: to a leader already, which cannot be undone."""
        with self.replica.changing(parameters=pulled):
            fetch_(self.replica, leader.data, level, rank)
        pull_(self.replica.flat.params, leader.data, strength)


def leading(headers: Mapping[int, Header]) -> int:
    """The rank with the lowest loss; the lowest such rank; never one whose loss is NaN.

    Raises:
        NonFiniteError: if no loss is a number.
    """
    ranked = [
        (header.loss, rank) for rank, header in headers.items() if not math.isnan(header.loss)
    ]
    if not ranked:
        raise NonFiniteError(
            f"{ranks_text(list(headers))} brought no training loss that is a number at step "
            f"{next(iter(headers.values())).step}: none can lead"
        )
    return min(ranked)[1]
