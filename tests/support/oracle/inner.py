"""Inner optimizers, from the published formulas. Elementwise, so one object serves all replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


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
