"""The mathematics again, in float64 NumPy, sharing no code with the library.

A run is simulated on stacked replicas: ``x`` has the shape (m, d), one flat vector per replica.
A rule is a class below, and its settings are entries in `CASES` under the name of the library's
class. The contract test asks for nothing else: a rule in ``localopt/sync/`` without an entry here
is a failing test.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import localopt
from localopt.compression import Bfloat16, Int8

Array = NDArray[np.float64]
Settings = dict[str, Any]


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
    ``noise`` (steps, m), repeated, is added to the losses, as if by the samples of a batch: what
    is lowest changes from round to round, and differs between a round's mean and its last step.
    """

    a: Array
    b: Array
    x0: Array
    noise: Array

    @classmethod
    def make(cls, m: int, d: int, seed: int = 0) -> Quadratics:
        rng = np.random.default_rng(seed)
        orthogonal = np.linalg.qr(rng.normal(size=(m, d, d)))[0]
        eigenvalues = rng.uniform(0.05, 1.0, size=(m, 1, d))
        a = (orthogonal * eigenvalues) @ orthogonal.transpose(0, 2, 1)
        b, x0 = rng.normal(size=(m, d)), rng.normal(size=d)
        return cls(a, b, x0, 25 * rng.normal(size=(23, m)))

    def losses(self, x: Array, step: int) -> Array:
        e = x - self.b
        quadratic = 0.5 * np.einsum("mi,mij,mj->m", e, self.a, e)
        return quadratic + self.noise[step % len(self.noise)]

    def gradients(self, x: Array) -> Array:
        return np.einsum("mij,mj->mi", self.a, x - self.b)


# Rules.


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


class Average(RuleOracle):
    """x_i ← x̄; named optimizer state too, or to zero."""

    def end_round(self, x: Array, this: Round) -> Array:
        return everywhere(self.finish(x), self.m)

    def finish(self, x: Array) -> Array:
        state = self.inner.state
        for name in self.settings.get("state_fields", ()):
            state[name] = everywhere(state[name].mean(axis=0), self.m)
        for name in self.settings.get("reset_fields", ()):
            state[name] = np.zeros_like(x)
        return x.mean(axis=0)


def to_bfloat16(x: Array) -> Array:
    """Rounded to the nearest with 8 significant bits, ties to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def to_int8(x: Array, block: int) -> Array:
    """A multiple of max |x| / 127 over each block, which is a 32-bit float."""
    told = np.zeros_like(x)
    for first in range(0, len(x), block):
        part = x[first : first + block]
        scale = float(np.float32(np.abs(part).max() / 127))
        if scale > 0:
            told[first : first + block] = np.clip(np.rint(part / scale), -127, 127) * scale
    return told


class Wire:
    """What arrives of the replicas' changes d_i + e_i: each rank averages one shard.

    e_i is what rank i has not yet told: of its own change, and, in the shard that it averages, of
    the sum. ``compress`` has a block, and is named for what it sends.
    """

    PARTS = (7, 1, 15, 33)  # sizes of the parameters, each of which begins at a multiple of 8

    def __init__(self, compress: Any, m: int) -> None:
        self.block = compress.block
        self.tell = {
            "Bfloat16": to_bfloat16,
            "Int8": functools.partial(to_int8, block=self.block),
        }[type(compress).__name__]
        ends = np.cumsum([-(-size // 8) * 8 for size in self.PARTS])
        starts = [0, *ends[:-1]]
        self.places = np.concatenate(
            [np.arange(a, a + n) for a, n in zip(starts, self.PARTS, strict=True)]
        )
        self.n = int(ends[-1])
        self.left = np.zeros((m, self.n))

    def mean(self, d: Array) -> Array:
        m = len(d)
        whole = np.zeros((m, self.n))
        whole[:, self.places] = d
        whole += self.left
        size = math.ceil(math.ceil(self.n / self.block) / m) * self.block
        result = np.zeros(self.n)
        for owner in range(m):
            shard = slice(owner * size, (owner + 1) * size)
            if m == 1:
                return d[0]
            total = whole[owner, shard].copy()
            for rank in range(m):
                if rank != owner:
                    told = self.tell(whole[rank, shard])
                    total += told
                    self.left[rank, shard] = whole[rank, shard] - told
            result[shard] = self.tell(total / m)
            self.left[owner, shard] = total - m * result[shard]
        return result[self.places]


class CompressedAverage(Average):
    """z ← z - what arrives of z - x_i;  x_i ← z."""

    def start(self, x0: Array) -> None:
        self.z, self.wire = x0, Wire(self.settings["compress"], self.m)

    def end_round(self, x: Array, this: Round) -> Array:
        self.z = self.z - self.wire.mean(self.z - x)
        return everywhere(self.z, self.m)

    def finish(self, x: Array) -> Array:
        self.z = super().finish(x)
        return self.z


class BlockMomentum(RuleOracle):
    """z ← what `update` makes of z and x̄; x_i ← z. The forms differ in `update` alone."""

    def start(self, x0: Array) -> None:
        self.z, self.v = x0, np.zeros_like(x0)
        compress = self.settings.get("compress")
        self.wire = None if compress is None else Wire(compress, self.m)

    def update(self, mean: Array, this: Round) -> None:
        raise NotImplementedError

    def end_round(self, x: Array, this: Round) -> Array:
        mean = x.mean(axis=0)
        if self.wire is not None:
            mean = self.z - self.wire.mean(self.z - x)
        self.update(mean, this)
        return everywhere(self.z, self.m)

    def finish(self, x: Array) -> Array:
        self.z = x.mean(axis=0)  # z itself where a round has just ended
        return self.z


class Bmuf(BlockMomentum):
    """Chen & Huo 2016, the delta form: v ← ηv + ζ(x̄ - z), z ← z + v; by default η = 1 - 1/m.

    Nesterov, the textbook form: z ← z + ζ(x̄ - z) + ηv with the new v.
    """

    def update(self, mean: Array, this: Round) -> None:
        eta, zeta = self.settings.get("momentum"), self.settings.get("lr", 1.0)
        eta = 1 - 1 / self.m if eta is None else eta
        move = zeta * (mean - self.z)
        self.v = eta * self.v + move
        if self.settings.get("nesterov", False):
            self.z = self.z + move + eta * self.v
        else:
            self.z = self.z + self.v


class SlowMo(BlockMomentum):
    """Wang et al., arXiv 1910.00643: u ← βu + (z - x̄)/γ, z ← z - αγu, γ the mean rate."""

    def update(self, mean: Array, this: Round) -> None:
        gamma = this.lr
        self.v = self.settings["beta"] * self.v + (self.z - mean) / gamma
        self.z = self.z - self.settings.get("lr", 1.0) * gamma * self.v


class DiLoCo(BlockMomentum):
    """Douillard et al., arXiv 2311.08105: SGD with Nesterov momentum on the gradient z - x̄."""

    def update(self, mean: Array, this: Round) -> None:
        lr, mu = self.settings.get("lr", 0.7), self.settings.get("momentum", 0.9)
        gradient = self.z - mean
        self.v = mu * self.v + gradient
        self.z = self.z - lr * (gradient + mu * self.v)


class OuterAdam(BlockMomentum):
    """Kingma & Ba, arXiv 1412.6980, algorithm 1, on the gradient z - x̄."""

    def start(self, x0: Array) -> None:
        super().start(x0)
        self.second, self.t = np.zeros_like(x0), 0

    def update(self, mean: Array, this: Round) -> None:
        (beta1, beta2), gradient = self.settings["betas"], self.z - mean
        self.t += 1
        self.v = beta1 * self.v + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        first_hat = self.v / (1 - beta1**self.t)
        second_hat = self.second / (1 - beta2**self.t)
        step = first_hat / (np.sqrt(second_hat) + self.settings["eps"])
        self.z = self.z - self.settings["lr"] * step


class Easgd(RuleOracle):
    """x_i ← x_i - α(x_i - z), z ← z + β(x̄ - z), both with the old z.

    With a pull p, x_i ← x_i - (p/H)(x_i - z) after every inner step.
    Zhang, Choromanska, LeCun 2015, arXiv 1412.6651.
    """

    def start(self, x0: Array) -> None:
        self.z = x0

    def after_step(self, x: Array, this: Round) -> Array:
        return x - self.settings.get("pull", 0.0) / this.h * (x - self.z)

    def end_round(self, x: Array, this: Round) -> Array:
        alpha = self.settings.get("alpha", 0.9 / self.m)
        beta = self.settings.get("beta", self.m * alpha)
        old = self.z
        self.z = old + beta * (x.mean(axis=0) - old)
        return x - alpha * (x - old)

    def consensus(self, x: Array) -> Array:
        return self.z


class Overlap(RuleOracle):
    """Wang, Liang, Joshi 2020, arXiv 2002.09539.

    At a boundary: z, v from the models pulled one boundary ago; x_i ← (1 - α)x_i + αz; and the
    mean of these is what the next boundary uses: v ← βv + (x̄' - z), z ← z + v. Normalised:
    v ← βv + (z - x̄')/γ, z ← z - γv, γ the mean rate of the round that ended when x̄' left.
    """

    sends_result = True

    def start(self, x0: Array) -> None:
        self.z, self.v = x0, np.zeros_like(x0)
        self.flight: tuple[Array, float] | None = None

    def end_round(self, x: Array, this: Round) -> Array:
        alpha = self.settings.get("alpha", 0.6)
        if self.flight is not None:
            self.land(*self.flight)
        x = (1 - alpha) * x + alpha * self.z
        self.flight = x.mean(axis=0), this.lr
        return x

    def land(self, mean: Array, gamma: float) -> None:
        beta = self.settings.get("beta", 0.7)
        if self.settings.get("normalize_by_lr", False):
            self.v = beta * self.v + (self.z - mean) / gamma
            self.z = self.z - gamma * self.v
        else:
            self.v = beta * self.v + (mean - self.z)
            self.z = self.z + self.v

    def finish(self, x: Array) -> Array:
        if self.flight is not None:
            self.land(*self.flight)
        self.flight, self.z = None, x.mean(axis=0)  # replicas and anchor go on from one place
        return self.z


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


class Streaming(RuleOracle):
    """Douillard et al. 2025, arXiv 2501.18512: the parameters in fragments k = 0 … K - 1, of which
    each is looked at after step ⌈(k + 1) H / K⌉ of a round, and used at once, or when the next
    one is due: v ← μv + (z - x̄), z ← z - ζ(z - x̄ + μv), x_i ← (1 - α)x_i + αz.
    """

    def start(self, x0: Array) -> None:
        self.z, self.v = x0.copy(), np.zeros_like(x0)
        self.late: tuple[slice, Array] | None = None
        self.square_drift = 0.0

    def after_step(self, x: Array, this: Round) -> Array:
        number, done = self.settings["fragments"], len(this.lrs)
        cuts = [k * x.shape[1] // number for k in range(number + 1)]
        for k in range(number):
            if math.ceil((k + 1) * this.h / number) == done:
                x = self.take(x)
                part = slice(cuts[k], cuts[k + 1])
                self.late = part, x[:, part].mean(axis=0)
                if k == 0:
                    self.square_drift = 0.0
                self.square_drift += float(drift(x[:, part], self.m)[0] ** 2)
                if not self.settings.get("overlap", False):
                    x = self.take(x)
        return x

    def take(self, x: Array) -> Array:
        if self.late is None:
            return x
        part, mean = self.late
        zeta = self.settings.get("outer_lr", 1.0)
        mu = self.settings.get("outer_momentum", 0.0)
        alpha = self.settings.get("alpha", 0.5 if self.settings.get("overlap") else 1.0)
        gradient = self.z[part] - mean
        self.v[part] = mu * self.v[part] + gradient
        self.z[part] -= zeta * (gradient + mu * self.v[part])
        x = x.copy()
        x[:, part] = (1 - alpha) * x[:, part] + alpha * self.z[part]
        self.late = None
        return x

    def end_round(self, x: Array, this: Round) -> Array:
        return x

    def drift(self, brought: Array, this: Round) -> Array:
        return np.full(self.m, math.sqrt(self.square_drift))

    def finish(self, x: Array) -> Array:
        if self.late is not None:  # it has arrived: the momentum goes on, the replicas are the mean
            self.take(x)
        self.z = x.mean(axis=0)
        return self.z.copy()


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


class Hierarchical(GroupedOracle):
    """Lin et al., arXiv 1808.07217: x_i ← the mean of those that meet."""

    def end_round(self, x: Array, this: Round) -> Array:
        size = self.group_size(this)
        groups = x.reshape(-1, size, x.shape[1])
        return np.repeat(groups.mean(axis=1), size, axis=0)


# Cases.


@dataclass(frozen=True)
class Launches:
    """How many collectives a rule launches: each is (in any case, for each parameter dtype).

    Args:
        syncs: by the ends of successive rounds; these repeat.
        steps: by the first two steps of a round of three.
        consensus: by consensus(), where replicas differ.
        agreeing: by consensus() where they agree, between rounds.
        finish: by finish().
    """

    syncs: Sequence[tuple[int, int]] = ((0, 1),)
    steps: Sequence[tuple[int, int]] = ((0, 0), (0, 0))
    consensus: tuple[int, int] = (0, 1)
    agreeing: tuple[int, int] = (0, 0)
    finish: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Case:
    """One setting of one rule, as the contract test runs it.

    Args:
        oracle: its mathematics.
        settings: keyword arguments of the library's rule, and of the oracle; a function of the
            number of replicas where that matters.
        inners: the keys of `INNERS` it is run with.
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

    def settings_for(self, m: int) -> Settings:
        return self.settings(m) if callable(self.settings) else self.settings

    def launches_for(self, m: int) -> Launches:
        return self.launches(m) if callable(self.launches) else self.launches

    def rule(self, cls: type, m: int) -> Any:
        """A new rule of the library for this case."""
        make = self.constructor or cls
        make = getattr(localopt, make) if isinstance(make, str) else make
        return make(**self.settings_for(m))


def outer_adam(**settings: Any) -> Any:
    return localopt.BlockMomentum(functools.partial(torch.optim.Adam, **settings))


def in_groups(group_size: Callable[[int], int], **settings: Any) -> Callable[[int], Settings]:
    return lambda m: {"group_size": group_size(m), **settings}


def pairs(m: int) -> int:
    """Ranks in a group: two where there are as many."""
    return min(m, 2)


def halves(m: int) -> int:
    """Ranks in a group, where there are two groups."""
    return max(m // 2, 1)


# The losses are exchanged first; whether replicas happen to agree is not looked at.
ONE_LEADER = Launches(((1, 1),), consensus=(1, 1), agreeing=(1, 1), finish=(1, 1))

# The headers, then the shards to those that average them, and their means to all.
IN_SHARDS = Launches(((1, 2),), consensus=(1, 1), finish=(1, 1))


def two_levels_of_leaders(group_size: Callable[[int], int], every: int) -> Any:
    """In the group, and then among all; nothing travels in a group of one."""

    def launches(m: int) -> Launches:
        inside = int(group_size(m) > 1)
        everywhere_ = (inside + 1, 1)
        local, both = (inside, inside), (inside + 1, inside + 1)
        syncs = (*[local] * (every - 1), both)
        return Launches(syncs, consensus=everywhere_, agreeing=everywhere_, finish=everywhere_)

    return launches


def two_levels_of_means(group_size: Callable[[int], int], every: int) -> Any:
    """A sum in the group; a shard's among the groups, and each member's shard to the others."""

    def launches(m: int) -> Launches:
        size = group_size(m)
        inside = int(size > 1)
        across = 1 + inside * size if m > size else 0
        both = (0, inside + across)
        return Launches((*[(0, inside)] * (every - 1), both), consensus=both, finish=both)

    return launches


def streamed(first: int, second: int, last: int) -> Launches:
    """Fragments by the steps of a round of three; finish() and consensus() exchange headers first,
    in collectives as large as a fragment's."""
    headers = (0, 2)
    return Launches(((0, last),), ((0, first), (0, second)), headers, headers, headers)


# Inner optimizers are shared out where a variant has nothing to do with them.
CASES: dict[str, list[Case]] = {
    "Average": [
        Case(Average),
        Case(Average, {"state_fields": ("exp_avg", "exp_avg_sq")}, ["AdamW"]),
        Case(Average, {"state_fields": ("momentum_buffer",)}, ["SGD"]),
        Case(Average, {"reset_fields": ("momentum_buffer",)}, ["SGD"]),
        Case(CompressedAverage, {"compress": Bfloat16(16)}, launches=IN_SHARDS, coarse=1e-2),
        Case(CompressedAverage, {"compress": Int8(16)}, launches=IN_SHARDS, coarse=5e-2),
    ],
    "BlockMomentum": [
        Case(Bmuf, {}, constructor="BMUF"),
        Case(Bmuf, {"momentum": 0.6, "lr": 0.8}, ["SGD"], "BMUF"),
        Case(Bmuf, {"momentum": 0.4, "nesterov": True}, ["AdamW"], "BMUF"),
        Case(SlowMo, {"beta": 0.5, "lr": 0.9}, constructor="SlowMo"),
        Case(DiLoCo, {}, constructor="DiLoCo"),
        Case(DiLoCo, {"compress": Int8(16)}, ["AdamW"], "DiLoCo", IN_SHARDS, coarse=5e-2),
        Case(
            SlowMo,
            {"beta": 0.5, "compress": Bfloat16(16)},
            ["SGD"],
            "SlowMo",
            IN_SHARDS,
            coarse=1e-2,
        ),
        Case(
            OuterAdam, {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}, ["AdamW"], outer_adam
        ),
    ],
    "EASGD": [
        Case(Easgd, {}, delay=1),
        Case(Easgd, {"alpha": 0.3, "beta": 0.8}, ["AdamW"], delay=1),
        Case(Easgd, {"alpha": 0.2, "pull": 0.5}),
    ],
    "OverlapLocalSGD": [
        Case(Overlap, {}, delay=1),
        Case(Overlap, {"beta": 0.0}, ["AdamW"], delay=1),
        Case(Overlap, {"alpha": 0.0}, ["SGD"], delay=1),
        Case(Overlap, {"alpha": 0.5, "beta": 0.4, "normalize_by_lr": True}, delay=1),
    ],
    "CoCoDSGD": [Case(CoCoD, {}, delay=1)],
    "Streaming": [
        Case(Streaming, {"fragments": 2}, launches=streamed(0, 1, 1), bad=3),
        Case(
            Streaming,
            {"fragments": 3, "outer_lr": 0.7, "outer_momentum": 0.5},
            ["AdamW"],
            launches=streamed(1, 1, 1),
            bad=3,
        ),
        Case(
            Streaming,
            {"fragments": 4, "overlap": True, "outer_lr": 0.8, "outer_momentum": 0.4},
            launches=streamed(1, 1, 2),
            delay=1,
            out_of_step=9,
            bad=3,
        ),
        Case(
            Streaming,
            {"fragments": 2, "overlap": True, "alpha": 0.8},
            ["SGD"],
            launches=streamed(0, 1, 1),
            delay=1,
            out_of_step=11,
            bad=4,
        ),
        Case(
            Streaming,
            {"fragments": 1, "outer_lr": 0.7, "outer_momentum": 0.6},
            ["SGD"],
            launches=Launches(consensus=(0, 2), finish=(0, 2)),
        ),
    ],
    "LSGD": [
        Case(Leader, {}, launches=ONE_LEADER),
        Case(Leader, {"c": 0.4, "p": 0.0}, ["SGD"], launches=ONE_LEADER),
        Case(Leader, {"c": 1.0, "p": 0.0}, ["AdamW"], launches=ONE_LEADER),
        Case(
            Leader,
            in_groups(pairs, c=0.3, p=0.4, c_global=0.2, p_global=0.5, global_every=2),
            launches=two_levels_of_leaders(pairs, 2),
        ),
        Case(
            Leader,
            in_groups(halves, c=0.1, p=0.1, c_global=0.1, p_global=0.1, global_every=3),
            ["SGD"],
            launches=two_levels_of_leaders(halves, 3),
        ),
    ],
    "HierarchicalAverage": [
        Case(
            Hierarchical,
            in_groups(pairs, global_every=3),
            launches=two_levels_of_means(pairs, 3),
        ),
        Case(
            Hierarchical,
            in_groups(halves, global_every=2),
            ["SGD"],
            launches=two_levels_of_means(halves, 2),
        ),
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


def drift(x: Array, group_size: int) -> Array:
    groups = x.reshape(-1, group_size, x.shape[1])
    square = ((groups - groups.mean(axis=1, keepdims=True)) ** 2).sum(axis=2).mean(axis=1)
    return np.repeat(np.sqrt(square), group_size)


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
