"""BMUF: blockwise model-update filtering, momentum on what a round has changed."""

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
class BMUF(Rule):
    """Step on the mean of what the replicas have changed, with momentum.

    v ← η v + ζ (x̄ - z);  z ← z + v, or with Nesterov momentum z ← z + ζ (x̄ - z) + η v;  x_i ← z

    z is the model at the round's start, the same on all replicas. It is `BlockMomentum` with SGD,
    and what is said there of rounds of growing length holds here too.

    Args:
        momentum: η, the outer momentum, in [0, 1); None for 1 - 1/m, with m replicas.
        lr: ζ, the outer learning rate.
        nesterov: the textbook's Nesterov form.
        compress: None, "bf16" or "int8": send z - x̄ in half or a quarter of the bytes, with error
            feedback, as `Average` does; or a codec of `localopt.compression`.

    Attributes:
        outer_optimizer: the outer SGD, once a `LocalOptimizer` has this rule.

    Raises:
        ValueError: for settings that diverge.

    Source: Chen & Huo, ICASSP 2016.
    """

    was_named = "BlockMomentum"

    momentum: float | None = None
    lr: float = 1.0
    nesterov: bool = False
    compress: str | Codec | None = None

    def __post_init__(self) -> None:
        codec(self.compress)
        eta = 0.5 if self.momentum is None else self.momentum
        make = partial(SGD, lr=self.lr, momentum=eta, nesterov=self.nesterov and eta > 0)
        self.outer = Outer(make, heuristic_momentum=self.momentum is None)

    def attach(self, replica: Replica) -> None:
        super().attach(replica)
        self.z = self.anchor("z")
        self.change = self.mean_change()
        self.outer_optimizer = self.outer_step(self.outer)

    @torch.no_grad()
    def end_round(self) -> None:
        with self.change.mean_change(self.z, self.outer.settings()):
            self.outer.step(self.replica.flat.views)  # where x_i were there is z - x̄
            self.z.write_to(self.replica.flat.params)
        self.replicas_agree = True
