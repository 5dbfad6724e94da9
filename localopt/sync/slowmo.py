"""SlowMo: slow momentum on what a round has changed, in units of gradients."""

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
class SlowMo(Rule):
    """Step on the mean of what the replicas have changed, with momentum in units of gradients.

    v ← β v + (z - x̄)/γ;  z ← z - ζ γ v;  x_i ← z

    z is the model at the round's start, the same on all replicas, γ the mean learning rate over
    the round. It is `BlockMomentum` with SGD and ``normalize_by_lr``, and what is said there of
    rounds of growing length holds here too.

    Args:
        beta: β, the slow momentum, in [0, 1).
        lr: ζ, the slow learning rate.
        compress: None, "bf16" or "int8": send z - x̄ in half or a quarter of the bytes, with error
            feedback, as `Average` does; or a codec of `localopt.compression`.

    Attributes:
        outer_optimizer: the outer SGD, once a `LocalOptimizer` has this rule.

    Raises:
        ValueError: for settings that diverge; at a synchronisation, if γ is 0.

    Source: Wang et al., ICLR 2020, arXiv 1910.00643.
    """

    was_named = "BlockMomentum"

    beta: float
    lr: float = 1.0
    compress: str | Codec | None = None

    def __post_init__(self) -> None:
        codec(self.compress)
        make = partial(SGD, lr=self.lr, momentum=self.beta)
        self.outer = Outer(make, normalize_by_lr=True)

    def attach(self, replica: Replica) -> None:
        super().attach(replica)
        self.z = self.anchor("z")
        self.change = self.mean_change()
        self.outer_optimizer = self.outer_step(self.outer)

    @torch.no_grad()
    def end_round(self) -> None:
        clock, gamma = self.replica.round, self.replica.round.lr
        settings, check = self.outer.settings(gamma), self.outer.check_rate
        with self.change.mean_change(self.z, settings, lambda: check(gamma, clock.step)):
            self.outer.step(self.replica.flat.views, gamma)  # where x_i were there is z - x̄
            self.z.write_to(self.replica.flat.params)
        self.replicas_agree = True
