"""Block momentum: any outer optimizer on what a round has changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..compression import Codec, codec
from ..outer import Maker, Outer
from ..replica import Replica
from .rule import Rule


@dataclass(eq=False, repr=False)
class BlockMomentum(Rule):
    """Step with an outer optimizer on the pseudo-gradient Δ = z - x̄; every replica gets the result.

    z ← outer step on Δ;  x_i ← z

    z is the model at the round's start, the same on all replicas. With an outer SGD of rate ζ and
    momentum η this is v ← η v + ζ (x̄ - z), z ← z + v; with η = 0 and ζ = 1 it is averaging. With
    ``normalize_by_lr``, Δ = (z - x̄)/γ and the outer rate is multiplied by γ, the mean learning
    rate over the round: the same while γ is constant, and under a schedule v keeps the scale of
    gradients. `DiLoCo`, `SlowMo` and `BMUF` are this with SGD.

    A fixed outer momentum, and the division by γ, suppose rounds of one length. Where H grows, as
    with QSR, Δ grows with it, and v mixes rounds of all lengths: nothing is refused, but neither is
    the published method any more; try a smaller momentum. The outer optimizer steps on all
    parameters, also on those that do not require gradients, so an outer weight decay shrinks these
    as well.

    Args:
        outer: makes the outer optimizer from a list of parameters, such as
            ``functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)``.
        normalize_by_lr: divide Δ by γ and multiply the outer rate by it.
        heuristic_momentum: set the outer momentum to 1 - 1/m, for m replicas.
        compress: None, "bf16" or "int8": send Δ in half or a quarter of the bytes, with error
            feedback, as `Average` does; or a codec of `localopt.compression`.

    Attributes:
        outer_optimizer: what ``outer`` has made, once a `LocalOptimizer` has this rule; its
            ``param_groups`` may be scheduled, on all ranks alike.

    Raises:
        TypeError: if ``outer`` does not make a torch optimizer.
        ValueError: if the outer optimizer needs a closure, or is SGD with settings that diverge;
            at a synchronisation, if γ is 0 and should be divided by.

    Source: Chen & Huo 2016 (BMUF); Wang et al., arXiv 1910.00643 (SlowMo); Douillard et al., arXiv
    2311.08105 (DiLoCo).
    """

    outer: Maker
    normalize_by_lr: bool = False
    heuristic_momentum: bool = False
    compress: str | Codec | None = None

    def __post_init__(self) -> None:
        codec(self.compress)
        self._step = Outer(
            self.outer,
            normalize_by_lr=self.normalize_by_lr,
            heuristic_momentum=self.heuristic_momentum,
        )

    def __repr__(self) -> str:
        return (
            f"BlockMomentum({self._step}, normalize_by_lr={self.normalize_by_lr}, "
            f"heuristic_momentum={self.heuristic_momentum}, compress={self.compress!r})"
        )

    def attach(self, replica: Replica) -> None:
        super().attach(replica)
        self.z = self.anchor("z")
        self.change = self.mean_change()
        self.outer_optimizer = self.outer_step(self._step)

    @torch.no_grad()
    def end_round(self) -> None:
        replica, gamma = self.replica, self.replica.round.lr
        settings = self._step.settings(gamma)
        with self.change.mean_change(self.z, settings, lambda: self._check_rate(gamma)):
            self._step.step(replica.flat.views, gamma)  # where x_i were there is Δ
            self.z.write_to(replica.flat.params)
        self.replicas_agree = True

    def _check_rate(self, gamma: float) -> None:
        self._step.check_rate(gamma, self.replica.round.step)
