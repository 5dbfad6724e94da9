"""Leader SGD: replicas follow the one with the lowest loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .case import Case, Launches, halves, in_groups, pairs
from .inner import Array
from .rule import GroupedOracle, Round, everywhere


class Leader(GroupedOracle):
    """Teng et al. 2019, arXiv 1905.10395: x_i ← (1 - c)x_i + cL, L the replica with the lowest
    mean loss over the round; x_i ← x_i - (p/H)(x_i - L) after each inner step, L the last leader.

    Two levels: so in each group of ``group_size`` ranks, and among all every ``global_every``
    (g) rounds, with c_global and p_global/(gH). The global pull comes first at a step, the
    group's leader first at a boundary. A loss that is NaN never leads.

    ``lowest`` has each round's leader among all, and ``lowest_last`` whom the losses of its last
    step would have made it, for tests.
    """

    def start(self, x0: Array) -> None:
        self.local = self.all = everywhere(x0, self.m)  # a row per replica
        self.lowest: list[int] = []
        self.lowest_last: list[int] = []

    def after_step(self, x: Array, this: Round) -> Array:
        if "group_size" in self.settings:
            pull = self.settings["p_global"] / (self.settings["global_every"] * this.h)
            x = x - pull * (x - self.all)
        return x - self.settings.get("p", 0.1) / this.h * (x - self.local)

    def end_round(self, x: Array, this: Round) -> Array:
        losses = np.where(np.isnan(this.mean_losses), np.inf, this.mean_losses)
        self.lowest.append(int(np.argmin(losses)))  # the first of equals
        self.lowest_last.append(int(np.argmin(this.losses[-1])))
        size = self.settings.get("group_size", self.m)
        firsts = range(0, self.m, size)
        leaders = [first + int(np.argmin(losses[first : first + size])) for first in firsts]
        self.local = np.repeat(x[leaders], size, axis=0)
        x = self.follow(x, self.local, self.settings.get("c", 0.1))
        if "group_size" in self.settings and self.is_global(this):
            self.all = everywhere(x[self.lowest[-1]], self.m)
            x = self.follow(x, self.all, self.settings["c_global"])
        return x

    @staticmethod
    def follow(x: Array, leader: Array, c: float) -> Array:
        return (1 - c) * x + c * leader


# The losses are exchanged first; whether replicas happen to agree is not looked at.
ONE_LEADER = Launches(agreeing=(1, 1))  # replicas are not known to agree where they do


def two_levels(group_size: Callable[[int], int], every: int) -> Callable[[int], Launches]:
    """In the group, and then among all; nothing travels in a group of one."""

    def launches(m: int) -> Launches:
        inside = int(group_size(m) > 1)
        all_ = (inside + 1, 1)
        local, both = (inside, inside), (inside + 1, inside + 1)
        syncs = (*[local] * (every - 1), both)
        return Launches(syncs, consensus=all_, agreeing=all_, finish=all_)

    return launches


CASES = {
    "LSGD": [
        Case(Leader, {}, launches=ONE_LEADER),
        Case(Leader, {"c": 0.4, "p": 0.0}, ["SGD"], launches=ONE_LEADER),
        Case(Leader, {"c": 1.0, "p": 0.0}, ["AdamW"], launches=ONE_LEADER),
        Case(
            Leader,
            in_groups(pairs, c=0.3, p=0.4, c_global=0.2, p_global=0.5, global_every=2),
            launches=two_levels(pairs, 2),
        ),
        Case(
            Leader,
            in_groups(halves, c=0.1, p=0.1, c_global=0.1, p_global=0.1, global_every=3),
            ["SGD"],
            launches=two_levels(halves, 3),
        ),
    ]
}
