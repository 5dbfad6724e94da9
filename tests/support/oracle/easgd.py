"""Elastic averaging."""

from __future__ import annotations

from .case import Case
from .inner import Array
from .rule import Round, RuleOracle


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


CASES = {
    "EASGD": [
        Case(Easgd, {}, delay=1),
        Case(Easgd, {"alpha": 0.3, "beta": 0.8}, ["AdamW"], delay=1),
        Case(Easgd, {"alpha": 0.2, "pull": 0.5}),
    ]
}
