"""BMUF: momentum on what a round has changed."""

from __future__ import annotations

from .case import Case
from .inner import Array
from .outer import BlockMomentum
from .rule import Round


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


CASES = {
    "BMUF": [
        Case(Bmuf),
        Case(Bmuf, {"momentum": 0.6, "lr": 0.8}, ["SGD"]),
        Case(Bmuf, {"momentum": 0.4, "nesterov": True}, ["AdamW"]),
    ]
}
