"""CoCoD-SGD: a mean that arrives a round late, and what was done since."""

from __future__ import annotations

from .case import Case
from .inner import Array
from .rule import Round, RuleOracle


class CoCoD(RuleOracle):
    """Shen et al. 2019, arXiv 1906.12043: x_i ← mean(s) + (x_i - s_i), s_i ← x_i, with mean(s)
    of one boundary ago; the first boundary only takes s_i."""

    sends_result = True

    def start(self, x0: Array) -> None:
        self.s: Array | None = None

    def end_round(self, x: Array, this: Round) -> Array:
        if self.s is not None:
            x = self.s.mean(axis=0) + (x - self.s)
        self.s = x
        return x

    def finish(self, x: Array) -> Array:
        self.s = None  # replicas are equal: there is nothing to correct for
        return x.mean(axis=0)


CASES = {"CoCoDSGD": [Case(CoCoD, {}, delay=1)]}
