"""A run of the replicas under a rule, and what it should show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from .case import Case
from .inner import INNERS, Array
from .problems import Quadratics
from .rule import Round, RuleOracle, everywhere


def constant_h(h: int) -> Callable[[int, float], int]:
    return lambda step, lr: h


def qsr_h(alpha: float, base: int) -> Callable[[int, float], int]:
    return lambda step, lr: max(base, math.floor((alpha / lr) ** 2))


@dataclass
class Trajectory:
    """What a run should show.

    Attributes:
        x: after each local step (its synchronisation included), (steps, m, d).
        consensus: what should be evaluated then, (steps, d).
        ends: steps after which a round has ended.
        hs: H of each round begun.
        drifts: at each of ``ends``, sqrt((1/n) Σ_i |x_i - x̄|²) over the n replicas that the
            replica then meets, of what they bring, (m,).
        finished: after each finish(), the last at the end, (times, d).
        rule: the rule, as the run has left it.
    """

    x: Array
    consensus: Array
    ends: list[int]
    hs: list[int]
    drifts: list[Array]
    finished: Array
    rule: RuleOracle

    def agreeing(self, step: int) -> list[tuple[int, int]]:
        """The pairs of replicas that are equal after ``step`` steps."""
        x = self.x[step - 1]
        pairs_ = itertools.combinations(range(len(x)), 2)
        return [(i, j) for i, j in pairs_ if np.array_equal(x[i], x[j])]


def simulate(
    case: Case,
    inner_name: str,
    period: Callable[[int, float], int],
    problem: Quadratics,
    lrs: Sequence[float],
    finish_after: Collection[int] = (),
) -> Trajectory:
    """Run ``len(lrs)`` local steps on every replica; finish after those named, and at the end."""
    make, settings = INNERS[inner_name]
    m, inner = len(problem.b), make(**settings)
    rule = case.oracle(problem.x0, m, inner, **case.settings_for(m))
    x = everywhere(problem.x0, m)
    seen = Trajectory(x, x, [], [], [], x, rule)
    xs, consensus, finished = [], [], []
    this, remaining = Round(0, 0), 0
    for step, lr in enumerate(lrs):
        if remaining == 0:
            remaining = period(step, lr)
            this = Round(len(seen.hs), remaining)
            seen.hs.append(remaining)
        this.lrs.append(lr)
        this.losses.append(problem.losses(x, step))
        x = inner.step(x, problem.gradients(x), lr)
        x = rule.after_step(x, this)
        remaining -= 1
        if remaining == 0:
            before, x = x, rule.end_round(x, this)
            brought = x if rule.sends_result else before
            seen.drifts.append(rule.drift(brought, this))
            seen.ends.append(step + 1)
        xs.append(x)
        consensus.append(rule.consensus(x))
        if step + 1 in finish_after:
            finished.append(rule.finish(x))
            x, remaining = everywhere(finished[-1], m), 0
    finished.append(rule.finish(x))
    seen.x, seen.consensus, seen.finished = np.stack(xs), np.stack(consensus), np.stack(finished)
    return seen
