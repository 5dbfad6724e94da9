"""DiLoCo: Nesterov momentum on what a round has changed."""

from __future__ import annotations

from localopt.compression import Int8

from .case import Case
from .inner import Array
from .outer import BlockMomentum
from .rule import Round
from .wire import IN_SHARDS


class DiLoCo(BlockMomentum):
    """Douillard et al., arXiv 2311.08105: SGD with Nesterov momentum on the gradient z - x̄."""

    def update(self, mean: Array, this: Round) -> None:
        lr, mu = self.settings.get("lr", 0.7), self.settings.get("momentum", 0.9)
        gradient = self.z - mean
        self.v = mu * self.v + gradient
        self.z = self.z - lr * (gradient + mu * self.v)


CASES = {
    "DiLoCo": [
        Case(DiLoCo),
        Case(DiLoCo, {"compress": Int8(16)}, ["AdamW"], None, IN_SHARDS, coarse=5e-2),
    ]
}
