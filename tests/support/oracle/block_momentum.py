"""Block momentum: any outer optimizer on what a round has changed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

import localopt

from .bmuf import Bmuf
from .case import Case
from .inner import Array
from .outer import BlockMomentum
from .rule import Round


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


def heuristic() -> Any:
    outer = functools.partial(torch.optim.SGD, lr=1.0, momentum=0.5)
    return localopt.BlockMomentum(outer, heuristic_momentum=True)


CASES = {
    "BlockMomentum": [
        Case(Bmuf, {}, constructor=heuristic),
        Case(OuterAdam, {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}, ["AdamW"], outer_adam),
    ]
}
