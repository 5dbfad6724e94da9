"""Overlap local SGD: an anchor that arrives a round late."""

from __future__ import annotations

import numpy as np

from .case import Case
from .inner import Array
from .rule import Round, RuleOracle


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


CASES = {
    "OverlapLocalSGD": [
        Case(Overlap, {}, delay=1),
        Case(Overlap, {"beta": 0.0}, ["AdamW"], delay=1),
        Case(Overlap, {"alpha": 0.0}, ["SGD"], delay=1),
        Case(Overlap, {"alpha": 0.5, "beta": 0.4, "normalize_by_lr": True}, delay=1),
    ]
}
