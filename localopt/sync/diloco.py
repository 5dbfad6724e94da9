"""DiLoCo: Nesterov momentum on what H local steps have changed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.optim import SGD

from ..compression import Codec, codec
from ..outer import Outer
from ..replica import Replica
from .rule import Rule


@dataclass(eq=False)
class DiLoCo(Rule):
    """Step on the mean of what the replicas have changed, with Nesterov momentum.

    Δ = z - x̄;  v ← η v + Δ;  z ← z - ζ (Δ + η v);  x_i ← z

    z is the model at the round's start, the same on all replicas. Made for AdamW inside. It is
    `BlockMomentum` with SGD, and what is said there of rounds of growing length holds here too.

    Args:
        lr: ζ, the outer learning rate.
        momentum: η, the outer momentum, in [0, 1).
        compress: None, "bf16" or "int8": send Δ in half or a quarter of the bytes, with error
            feedback, as `Average` does; or a codec of `localopt.compression`.

    Attributes:
        outer_optimizer: the outer SGD, once a `LocalOptimizer` has this rule.

    Raises:
        ValueError: for settings that diverge.

    Source: Douillard et al., arXiv 2311.08105.
    """

    was_named = "BlockMomentum"

    lr: float = 0.7
    momentum: float = 0.9
    compress: str | Codec | None = None

    def __post_init__(self) -> None:
        codec(self.compress)
        nesterov = self.momentum > 0
        self.outer = Outer(partial(SGD, lr=self.lr, momentum=self.momentum, nesterov=nesterov))

    def attach(self, replica: Replica) -> None:
        super().attach(replica)
        self.z = self.anchor("z")
        self.change = self.mean_change()
        self.outer_optimizer = self.outer_step(self.outer)

    @torch.no_grad()
    def end_round(self) -> None:
        with self.change.mean_change(self.z, self.outer.settings()):
            self.outer.step(self.replica.flat.views)  # where x_i were there is Δ
            self.z.write_to(self.replica.flat.params)
        self.replicas_agree = True
