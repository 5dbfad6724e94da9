"""Overlap-Local-SGD: replicas are pulled to an anchor that is averaged behind the next round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..flat import pull_
from .rule import Rule


@dataclass(eq=False)
class OverlapLocalSGD(Rule):
    """Pull every replica to the anchor z, which moves by the mean that was launched a round ago.

    At the end of a round:
        wait for the mean x̄' launched one round ago: v ← β v + (x̄' - z), z ← z + v;
        x_i ← (1 - α) x_i + α z;
        launch the mean of these x_i, and train on.

    The anchor is exactly one round old. Replicas never agree; what is evaluated is their mean.
    With α = 0 they are independent; with β = 0 the anchor is the last mean of pulled replicas.

    With ``normalize_by_lr``: v ← β v + (z - x̄')/γ, z ← z - γ v, γ the mean learning rate over the
    round that launched; the same while γ is constant. β supposes rounds of one length: where H
    grows, as with QSR, v mixes rounds of all lengths; a smaller β is safer.

    Args:
        alpha: α, how far replicas are pulled to the anchor, in [0, 1): at 1 a replica would forget
            its round altogether.
        beta: β, the anchor's momentum, in [0, 1).
        normalize_by_lr: keep v in units of gradients, as above.

    Raises:
        ValueError: for settings outside these; at a synchronisation, if γ is 0 and should be
            divided by.

    Source: Wang, Liang, Joshi, ICASSP 2020, arXiv 2002.09539.
    """

    agrees = False
    overlaps = True

    alpha: float = 0.6
    beta: float = 0.7
    normalize_by_lr: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(
                f"OverlapLocalSGD: alpha is {self.alpha}: it must lie in [0, 1), for at 1 every "
                "round's progress would be overwritten"
            )
        if not 0 <= self.beta < 1:
            raise ValueError(f"OverlapLocalSGD: beta is {self.beta}: it must lie in [0, 1)")

    def attach(self, replica: Any) -> None:
        super().attach(replica)
        self.z = self.anchor("z")
        self.v = self.zeros("v")
        self.mean = self.mean_of_copies()
        self._pulled = False

    @torch.no_grad()
    def end_round(self) -> None:
        self.land()
        clock = self.replica.round
        gamma = clock.lr if self.normalize_by_lr else 1.0
        if not gamma > 0:
            self.mean.launch(settings=gamma)  # nobody waits for this rank when it has gone
            self.mean.land()
            raise ValueError(
                f"the mean learning rate of the round that ended at step {clock.step} is {gamma}, "
                f"and normalize_by_lr divides by it: keep the rate above zero"
            )
        self._gamma = gamma
        if not self._pulled:  # else it is the launch alone that has failed, and is made again
            pull_(self.replica.flat.params, self.z.data, self.alpha)
            self._pulled = True
        self.mean.launch(settings=gamma)
        self._pulled = False
        self.replicas_agree = False

    @torch.no_grad()
    def land(self) -> None:
        mean = self.mean.land()
        if mean is None:
            return
        move_anchor_(self.z.data, self.v.data, mean, self.beta, self._gamma)

    def finish(self) -> None:
        """Make the replicas equal to their mean; the anchor goes on from there."""
        super().finish()
        self._pulled = False

    def start_over(self) -> None:
        super().start_over()
        self._pulled = False

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "pulled": self._pulled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._pulled = state.get("pulled", False) and not state["replicas_agree"]


def move_anchor_(
    z: Sequence[Tensor], v: Sequence[Tensor], mean: Sequence[Tensor], beta: float, gamma: float
) -> None:
    """v ← β v + (x̄ - z)/γ;  z ← z + γ v, tensors of one layout; x̄ perhaps of a narrower type.

    With γ = 1 that is the anchor's step without normalisation. v points from z to x̄.
    """
    for anchor, momentum, average in zip(z, v, mean, strict=True):
        momentum.mul_(beta).add_(average.to(anchor.dtype) - anchor, alpha=1 / gamma)
        anchor.add_(momentum, alpha=gamma)
