"""What a rule is tried with: its settings, and the collectives that it should launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import localopt

from .inner import INNERS
from .rule import RuleOracle

Settings = dict[str, Any]


@dataclass(frozen=True)
class Launches:
    """How many collectives a rule launches: each is (headers, for each parameter dtype).

    Args:
        syncs: by the ends of successive rounds; these repeat.
        steps: by the first two steps of a round of three.
        consensus: by consensus(), where replicas differ.
        agreeing: by consensus() and finish() where they agree, between rounds.
        finish: by finish() elsewhere.
    """

    syncs: Sequence[tuple[int, int]] = ((1, 1),)
    steps: Sequence[tuple[int, int]] = ((0, 0), (0, 0))
    consensus: tuple[int, int] = (1, 1)
    agreeing: tuple[int, int] = (1, 0)
    finish: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Case:
    """One setting of one rule, as the contract test runs it.

    Args:
        oracle: its mathematics.
        settings: keyword arguments of the library's rule, and of the oracle; a function of the
            number of replicas where that matters.
        inners: the keys of `INNERS` it is run with; shared out between cases where a variant has
            nothing to do with them.
        constructor: what makes the library's rule, or its name in localopt; its class if None.
        launches: a function of the number of replicas where that matters.
        delay: rounds that pass before a synchronisation is looked at: 1 where it overlaps with
            the round that follows.
        coarse: relative error allowed with parameters of 32 bits; 0 for what others are.
        out_of_step: step at which rank 0, in rounds of three, learns that rank 1 has made eight
            and calls finish(); None: at a round's end, late by ``delay``.
        bad: step at which, in rounds of two, they learn that rank 1 has brought NaN at the third.
    """

    oracle: type[RuleOracle]
    settings: Settings | Callable[[int], Settings] = field(default_factory=dict)
    inners: Sequence[str] = tuple(INNERS)
    constructor: str | Callable[..., Any] | None = None
    launches: Launches | Callable[[int], Launches] = Launches()
    delay: int = 0
    coarse: float = 0.0
    out_of_step: int | None = None
    bad: int | None = None

    def noticed_at(self) -> tuple[int, int]:
        """``out_of_step`` and ``bad``, or what they are by default."""
        return self.out_of_step or 9 + 3 * self.delay, self.bad or 4 + 2 * self.delay

    @property
    def behind(self) -> bool:
        """Whether what it sends travels behind training: for a round, or a few steps."""
        return bool(self.delay or self.settings_for(2).get("delay", 0))

    def settings_for(self, m: int) -> Settings:
        return self.settings(m) if callable(self.settings) else self.settings

    def launches_for(self, m: int) -> Launches:
        return self.launches(m) if callable(self.launches) else self.launches

    def rule(self, cls: type, m: int) -> Any:
        """A new rule of the library for this case."""
        make = self.constructor or cls
        make = getattr(localopt, make) if isinstance(make, str) else make
        return make(**self.settings_for(m))


def in_groups(group_size: Callable[[int], int], **settings: Any) -> Callable[[int], Settings]:
    return lambda m: {"group_size": group_size(m), **settings}


def pairs(m: int) -> int:
    """Ranks in a group: two where there are as many."""
    return min(m, 2)


def halves(m: int) -> int:
    """Ranks in a group, where there are two groups."""
    return max(m // 2, 1)
