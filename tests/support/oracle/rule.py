"""Base of the oracles: what a rule may ask, what it may do, and how far replicas are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .inner import AdamW, Array, Sgd


@dataclass
class Round:
    """What a rule may ask about the round: rates and losses (m,) of its steps so far.

    ``index`` counts the rounds finished before it, those that finish() cut short included.
    """

    index: int
    h: int
    lrs: list[float] = field(default_factory=list)
    losses: list[Array] = field(default_factory=list)

    @property
    def lr(self) -> float:
        """The mean rate γ."""
        return math.fsum(self.lrs) / len(self.lrs)

    @property
    def mean_losses(self) -> Array:
        return np.mean(self.losses, axis=0)


class RuleOracle:
    """Base of the oracles: override what the rule does. ``settings`` are the case's."""

    # What is sent is what `end_round` has made of the replicas, and the drift is of that.
    sends_result = False

    def __init__(self, x0: Array, m: int, inner: Sgd | AdamW, **settings: Any) -> None:
        self.m, self.inner, self.settings = m, inner, settings
        self.start(x0)

    def start(self, x0: Array) -> None:
        """What the rule keeps, at the initial model."""

    def after_step(self, x: Array, this: Round) -> Array:
        """What happens at every local step, after the inner one."""
        return x

    def end_round(self, x: Array, this: Round) -> Array:
        """The rule's equation; returns the new (m, d)."""
        raise NotImplementedError

    def consensus(self, x: Array) -> Array:
        """What is evaluated, (d,)."""
        return x.mean(axis=0)

    def finish(self, x: Array) -> Array:
        """What every replica holds after finish(), (d,); training may go on from there."""
        return self.consensus(x)

    def group_size(self, this: Round) -> int:
        """How many ranks, side by side, meet when the round ends."""
        return self.m

    def drift(self, brought: Array, this: Round) -> Array:
        """The spread of what the replicas bring, (m,)."""
        return drift(brought, self.group_size(this))


class GroupedOracle(RuleOracle):
    """All meet every ``global_every`` rounds, groups of ``group_size`` in those between; without
    these settings all meet every time."""

    def is_global(self, this: Round) -> bool:
        return (this.index + 1) % self.settings.get("global_every", 1) == 0

    def group_size(self, this: Round) -> int:
        return self.m if self.is_global(this) else self.settings["group_size"]


def everywhere(x: Array, m: int) -> Array:
    """The same (d,) on m replicas."""
    return np.tile(x, (m, 1))


def drift(x: Array, group_size: int) -> Array:
    groups = x.reshape(-1, group_size, x.shape[1])
    square = ((groups - groups.mean(axis=1, keepdims=True)) ** 2).sum(axis=2).mean(axis=1)
    return np.repeat(np.sqrt(square), group_size)
