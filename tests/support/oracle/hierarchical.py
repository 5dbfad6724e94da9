"""Hierarchical averaging: often inside a group, seldom across groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .case import Case, Launches, halves, in_groups, pairs
from .inner import Array
from .rule import GroupedOracle, Round


class Hierarchical(GroupedOracle):
    """Lin et al., arXiv 1808.07217: x_i ← the mean of those that meet."""

    def end_round(self, x: Array, this: Round) -> Array:
        size = self.group_size(this)
        groups = x.reshape(-1, size, x.shape[1])
        return np.repeat(groups.mean(axis=1), size, axis=0)


def two_levels(group_size: Callable[[int], int], every: int) -> Callable[[int], Launches]:
    """A sum in the group; a shard's among the groups, and each member's shard to the others;
    headers in the group, then among all."""

    def launches(m: int) -> Launches:
        size = group_size(m)
        inside = int(size > 1)
        across = 1 + inside * size if m > size else 0
        headers = inside + int(m > size)
        both = (headers, inside + across)
        syncs = (*[(inside, inside)] * (every - 1), both)
        return Launches(syncs, consensus=both, agreeing=(headers, 0), finish=both)

    return launches


CASES = {
    "HierarchicalAverage": [
        Case(
            Hierarchical,
            in_groups(pairs, global_every=3),
            launches=two_levels(pairs, 3),
        ),
        Case(
            Hierarchical,
            in_groups(halves, global_every=2),
            ["SGD"],
            launches=two_levels(halves, 2),
        ),
    ]
}
