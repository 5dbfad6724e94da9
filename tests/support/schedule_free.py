"""A small schedule-free SGD: an optimizer that trains other weights than it evaluates."""

from __future__ import annotations

from typing import Any

import torch

BETA, RATE = 0.9, 0.1


class ScheduleFree(torch.optim.Optimizer):
    """y = (1 - β) z + β x. The parameters hold y in train(), where gradients are taken, and x in
    eval(): z ← z - γ g, x ← (1 - 1/t) x + z/t (Defazio et al., arXiv 2405.15682)."""

    def __init__(self, params: Any, lr: float = RATE) -> None:
        super().__init__(params, {"lr": lr, "t": 0, "train_mode": False})

    @torch.no_grad()
    def _move(self, weight: float, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
                group["train_mode"] = train

    def eval(self) -> None:
        self._move(1 - 1 / BETA, train=False)

    def train(self) -> None:
        self._move(1 - BETA, train=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"], "train() comes first"
            group["t"] += 1
            c, lr = 1 / group["t"], group["lr"]
            for y in group["params"]:
                if y.grad is None:
                    continue
                z = self.state[y].setdefault("z", y.clone())
                y.lerp_(z, c)
                y.add_(y.grad, alpha=lr * (BETA * (1 - c) - 1))
                z.sub_(y.grad, alpha=lr)


class Wrapped(ScheduleFree):
    """Keeps its mode in an attribute, as wrappers do."""

    train_mode = False

    def _move(self, weight: float, train: bool) -> None:
        super()._move(weight, train)
        self.train_mode = train
