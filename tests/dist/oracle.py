"""The mathematics again, in float64 NumPy, sharing no code with the library.

A run is simulated on stacked replicas: ``x`` has the shape (m, d), one flat vector per replica.
A rule is one class in `CASES`, registered under the name of the library's class. The contract test
asks for nothing else: a rule in ``localopt/sync/`` without an entry here is a failing test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# Inner optimizers, from the published formulas. Elementwise, so one object serves all replicas.


class Sgd:
    """Sutskever et al. 2013 as PyTorch documents it: v ← μv + (1 - τ)g, x ← x - γv."""

    def __init__(
        self,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.momentum, self.dampening = momentum, dampening
        self.weight_decay, self.nesterov = weight_decay, nesterov
        self.state: dict[str, Array] = {}

    def step(self, x: Array, g: Array, lr: float) -> Array:
        g = g + self.weight_decay * x
        if self.momentum == 0:
            return x - lr * g
        if "momentum_buffer" in self.state:  # the first buffer is the gradient, not dampened
            v = self.momentum * self.state["momentum_buffer"] + (1 - self.dampening) * g
        else:
            v = g
        self.state["momentum_buffer"] = v
        return x - lr * (g + self.momentum * v if self.nesterov else v)


class AdamW:
    """Loshchilov & Hutter, arXiv 1711.05101, algorithm 2."""

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.t = 0
        self.state: dict[str, Array] = {}

    def step(self, x: Array, g: Array, lr: float) -> Array:
        beta1, beta2 = self.betas
        zeros = np.zeros_like(x)
        self.t += 1
        m = beta1 * self.state.get("exp_avg", zeros) + (1 - beta1) * g
        v = beta2 * self.state.get("exp_avg_sq", zeros) + (1 - beta2) * g * g
        self.state = {"exp_avg": m, "exp_avg_sq": v}
        m_hat = m / (1 - beta1**self.t)
        v_hat = v / (1 - beta2**self.t)
        return x - lr * self.weight_decay * x - lr * m_hat / (np.sqrt(v_hat) + self.eps)


INNERS: dict[str, tuple[Callable[..., Sgd | AdamW], dict[str, Any]]] = {
    "SGD": (Sgd, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    "AdamW": (AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}),
}


# Periods.


def constant_h(h: int) -> Callable[[int, float], int]:
    return lambda step, lr: h


def qsr_h(alpha: float, base: int) -> Callable[[int, float], int]:
    return lambda step, lr: max(base, math.floor((alpha / lr) ** 2))


# Problems: m different quadratics.


@dataclass(frozen=True)
class Quadratics:
    """f_i(x) = 0.5 (x - b_i)ᵀ A_i (x - b_i) for replica i.

    ``a`` has the shape (m, d, d), symmetric with eigenvalues in [0.05, 1]; ``b`` (m, d).
    """

    a: Array
    b: Array
    x0: Array

    @classmethod
    def make(cls, m: int, d: int, seed: int = 0) -> Quadratics:
        rng = np.random.default_rng(seed)
        orthogonal = np.linalg.qr(rng.normal(size=(m, d, d)))[0]
        eigenvalues = rng.uniform(0.05, 1.0, size=(m, 1, d))
        a = (orthogonal * eigenvalues) @ orthogonal.transpose(0, 2, 1)
        return cls(a, rng.normal(size=(m, d)), rng.normal(size=d))

    def losses(self, x: Array) -> Array:
        e = x - self.b
        return 0.5 * np.einsum("mi,mij,mj->m", e, self.a, e)

    def gradients(self, x: Array) -> Array:
        return np.einsum("mij,mj->mi", self.a, x - self.b)


# Rules.


@dataclass
class Round:
    """What a rule may ask about the round that ends: rates and losses (m,) of its steps."""

    step: int
    h: int
    lrs: list[float] = field(default_factory=list)
    losses: list[Array] = field(default_factory=list)


class RuleOracle:
    """Base of the oracles: override what the rule does. ``settings`` are the case's."""

    def __init__(self, x0: Array, inner: Sgd | AdamW, **settings: Any) -> None:
        self.inner, self.settings = inner, settings

    def after_step(self, x: Array, this: Round) -> Array:
        """What happens at every local step, after the inner one."""
        return x

    def end_round(self, x: Array, this: Round) -> Array:
        """The rule's equation; returns the new (m, d)."""
        raise NotImplementedError

    def consensus(self, x: Array) -> Array:
        """What is evaluated, (d,)."""
        return x.mean(axis=0)

    def finish(self, x: Array, this: Round) -> Array:
        """What every replica holds after finish(), (d,). ``this.lrs`` is empty between rounds."""
        return self.consensus(x)


class Average(RuleOracle):
    """x_i ← x̄; named optimizer state too, or to zero."""

    def end_round(self, x: Array, this: Round) -> Array:
        state = self.inner.state
        for name in self.settings.get("state_fields", ()):
            state[name] = np.broadcast_to(state[name].mean(axis=0), x.shape)
        for name in self.settings.get("reset_fields", ()):
            state[name] = np.zeros_like(x)
        return np.broadcast_to(x.mean(axis=0), x.shape)


@dataclass(frozen=True)
class Case:
    """One setting of one rule, as the contract test runs it.

    Args:
        oracle: its mathematics.
        settings: keyword arguments of the library's class, and of the oracle.
        inners: the keys of `INNERS` it is defined for.
        build: makes the library's rule from its class, where ``cls(**settings)`` does not.
        collectives: launched by one synchronisation, per parameter dtype.
        finish_collectives: launched by finish(), per parameter dtype.
    """

    oracle: type[RuleOracle]
    settings: dict[str, Any] = field(default_factory=dict)
    inners: Sequence[str] = tuple(INNERS)
    build: Callable[[type], Any] | None = None
    collectives: int = 1
    finish_collectives: int = 1

    def rule(self, cls: type) -> Any:
        """A new rule of the library for this case."""
        return cls(**self.settings) if self.build is None else self.build(cls)


CASES: dict[str, list[Case]] = {
    "Average": [
        Case(Average),
        Case(Average, {"state_fields": ("exp_avg", "exp_avg_sq")}, inners=["AdamW"]),
        Case(Average, {"state_fields": ("momentum_buffer",)}, inners=["SGD"]),
        Case(Average, {"reset_fields": ("momentum_buffer",)}, inners=["SGD"]),
    ],
}


@dataclass
class Trajectory:
    """What a run should show.

    Attributes:
        x: after each local step (its synchronisation included), (steps, m, d).
        consensus: what should be evaluated then, (steps, d).
        ends: steps after which a round has ended.
        hs: H of each round begun.
        finished: after finish(), (d,).
    """

    x: Array
    consensus: Array
    ends: list[int]
    hs: list[int]
    finished: Array


def simulate(
    case: Case,
    inner_name: str,
    period: Callable[[int, float], int],
    problem: Quadratics,
    lrs: Sequence[float],
) -> Trajectory:
    """Run ``len(lrs)`` local steps on every replica, then finish."""
    make, settings = INNERS[inner_name]
    inner = make(**settings)
    rule = case.oracle(problem.x0, inner, **case.settings)
    x: Array = np.tile(problem.x0, (len(problem.b), 1))
    xs, consensus, ends, hs = [], [], [], []
    this = Round(0, 0)
    remaining = 0
    for step, lr in enumerate(lrs):
        if remaining == 0:
            remaining = period(step, lr)
            this = Round(step, remaining)
            hs.append(remaining)
        this.lrs.append(lr)
        this.losses.append(problem.losses(x))
        x = inner.step(x, problem.gradients(x), lr)
        x = rule.after_step(x, this)
        remaining -= 1
        if remaining == 0:
            x = rule.end_round(x, this)
            ends.append(step + 1)
            this = Round(step + 1, 0)
        xs.append(x)
        consensus.append(rule.consensus(x))
    finished = rule.finish(x, this)
    return Trajectory(np.stack(xs), np.stack(consensus), ends, hs, finished)
