"""Block momentum: an outer optimizer on what a round has changed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

import localopt
from localopt.compression import Bfloat16, Int8

from .case import Case
from .inner import Array
from .rule import Round, RuleOracle, everywhere
from .wire import IN_SHARDS, Wire


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


def outer_adam(**settings: Any) -> Any:
    return localopt.BlockMomentum(functools.partial(torch.optim.Adam, **settings))


CASES = {
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
        Case(OuterAdam, {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}, ["AdamW"], outer_adam),
    ]
}
