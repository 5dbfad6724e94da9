"""Hierarchical averaging: often inside a node, seldom across nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..collective import Across, Collective
from ..traffic import Sending
from .rule import Rule


@dataclass(eq=False)
class HierarchicalAverage(Rule):
    """Average inside a group at the end of every round, over all replicas every few rounds.

    x_i ← mean over i's group; at every ``global_every``-th round's end x_i ← x̄

    With a constant period of H1 the groups meet every global_every H1 steps. A meeting of all is a
    sum inside the group, a sum of one shard per member across groups, and a broadcast of the shards
    inside: between groups a group sends no more than one replica would.

    Args:
        group_size: replicas in a group, those of consecutive ranks: for launchers that number ranks
            host by host, the replicas of a host. It must divide their number.
        global_every: rounds between averages over all replicas.

    Raises:
        ValueError: if either is less than 1; at construction of the optimizer, if group_size does
            not divide the number of replicas.

    Source: Lin et al., arXiv 1808.07217, section 5 (hierarchical local SGD).
    """

    group_size: int
    global_every: int

    def __post_init__(self) -> None:
        for name in ("group_size", "global_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"HierarchicalAverage: {name} is {value!r}: it must be an integer of at least 1"
                )

    def sends(self, parameters: int, extra: int, itemsize: int) -> list[Sending]:
        payload = (parameters + extra) * itemsize
        return [
            Sending("all_reduce", payload, self.group_size),
            Sending("all_reduce", payload, self.group_size, across=True, every=self.global_every),
        ]

    def levels(self, everyone: Collective) -> Sequence[Collective]:
        inside, _ = everyone.split(self.group_size)
        return [inside] if self.group_size == everyone.world_size else [inside, everyone]

    def sums(self, everyone: Collective) -> Sequence[Collective | Across]:
        inside, peers = everyone.split(self.group_size)
        return [inside, Across(inside, peers, everyone.ranks)]

    def end_round(self) -> None:
        meets_all = (self.replica.round.number + 1) % self.global_every == 0
        self.in_place.mean_(levels=None if meets_all else 1)
        one_group = self.group_size == self.replica.collective.world_size
        self.replicas_agree = meets_all or one_group
