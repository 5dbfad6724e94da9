"""SlowMo: slow momentum, in units of gradients."""

from __future__ import annotations

from localopt.compression import Bfloat16

from .case import Case
from .inner import Array
from .outer import BlockMomentum
from .rule import Round
from .wire import IN_SHARDS


class SlowMo(BlockMomentum):
    """Wang et al., arXiv 1910.00643: u ← βu + (z - x̄)/γ, z ← z - αγu, γ the mean rate."""

    def update(self, mean: Array, this: Round) -> None:
        gamma = this.lr
        self.v = self.settings["beta"] * self.v + (self.z - mean) / gamma
        self.z = self.z - self.settings.get("lr", 1.0) * gamma * self.v


CASES = {
    "SlowMo": [
        Case(SlowMo, {"beta": 0.5, "lr": 0.9}),
        Case(
            SlowMo, {"beta": 0.5, "compress": Bfloat16(16)}, ["SGD"], None, IN_SHARDS, coarse=1e-2
        ),
    ]
}
