"""Streaming: a fragment of the parameters at a time, each at its own place in the round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..flat import pull_
from .rule import Rule, Sending, check_outer_lr, check_outer_momentum


@dataclass(eq=False)
class Streaming(Rule):
    """Synchronise K fragments of the parameters one after another, evenly spread over the round.

    After local step ⌈(k + 1) H / K⌉ of a round, of fragment k alone:
        v ← μ v + (z - x̄);  z ← z - ζ (z - x̄ + μ v);  x_i ← (1 - α) x_i + α z.

    Each sends 1/K of what a round sends, so that is all that the link has to carry at once. With
    ``overlap`` x̄ travels behind training until the next fragment is due, H / K steps later; only
    then z and x_i move, and α < 1 keeps a part of what replica i did in between.

    Fragments are cut to equal size in the order of the parameters, across layers where need be.
    With ζ = 1 and μ = 0 this is averaging by fragments; K = 1 without overlap is `DiLoCo`. Replicas
    never agree, except so; what is evaluated is their mean. Where H < K several fragments are due
    at one step. Momentum supposes rounds of one length, as `BlockMomentum` explains.

    Args:
        fragments: K.
        outer_lr: ζ.
        outer_momentum: μ, Nesterov's, in [0, 1).
        overlap: whether a fragment travels behind training.
        alpha: α, in (0, 1]; None for 1, or with ``overlap`` for 0.5.

    Raises:
        ValueError: for settings outside these, or that diverge where rounds are long.

    Source: Douillard et al., arXiv 2501.18512 (Streaming DiLoCo); there α is the other weight.
    """

    agrees = False

    fragments: int
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    overlap: bool = False
    alpha: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.fragments, int) or isinstance(self.fragments, bool):
            raise ValueError(f"Streaming: fragments is {self.fragments!r}: it must be an integer")
        if self.fragments < 1:
            raise ValueError(f"Streaming: fragments is {self.fragments}: there must be at least 1")
        if self.alpha is None:
            self.alpha = 0.5 if self.overlap else 1.0
        if not 0 < self.alpha <= 1:
            raise ValueError(f"Streaming: alpha is {self.alpha}: it must lie in (0, 1]")
        check_outer_momentum(self.outer_momentum)
        check_outer_lr(self.outer_lr, self.outer_momentum, nesterov=True)

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return self.overlap

    def sends(self, parameters: int, beside: int, itemsize: int) -> list[Sending]:
        return [Sending("all_reduce", parameters * itemsize)]  # in all: K fragments

    def attach(self, replica: Any) -> None:
        super().attach(replica)
        replica.use_fragments(self.fragments)
        self.z = self.anchor("z")
        self.v = self.momentum("v") if self.outer_momentum else None
        self._sent = 0  # fragments of this round
        self._flying = 0  # the fragment that was launched last
        self._moved: int | None = None  # whose z has moved, but x not yet

    def before_step(self) -> None:
        self._meet()

    def after_step(self) -> None:
        if self.replica.remaining:
            self._meet()

    def end_round(self) -> None:
        self._meet()
        self._sent = 0
        self.replicas_agree = self.fragments == 1 and not self.overlap and self.alpha == 1

    def _meet(self) -> None:
        """Send the fragments that are due after this step."""
        replica, number = self.replica, self.fragments
        done = replica.h - replica.remaining
        for k in range(self._sent, done * number // replica.h):
            self.land()
            self._pull()
            ends = k == number - 1
            if self.overlap:
                replica.launch(fragment=k, ends_round=ends)
                self._flying = k
            else:
                mean = replica.mean(fragment=k, ends_round=ends)
                self._flying = k
                self._move(mean)
                self._pull()
            self._sent = k + 1

    def land(self) -> None:
        mean = self.replica.land()
        if mean is not None:
            self._move(mean)

    @torch.no_grad()
    def _move(self, mean: Sequence[Tensor]) -> None:
        """z and v of the fragment that has arrived."""
        k, mu, zeta = self._flying, self.outer_momentum, self.outer_lr
        for i, (z, average) in enumerate(zip(self._of(self.z.data, k), mean, strict=True)):
            average = average.to(z.dtype)
            if self.v is None:
                z.lerp_(average, zeta)
                continue
            v = self._of(self.v.data, k)[i]
            v.mul_(mu).add_(z).sub_(average)
            z.lerp_(average, zeta).sub_(v, alpha=zeta * mu)
        self._moved = k

    @torch.no_grad()
    def _pull(self) -> None:
        """x_i towards the z that has moved."""
        if self._moved is not None:
            k, self._moved = self._moved, None
            pull_(self._of(self.replica.flat.params, k), self._of(self.z.data, k), self.alpha)

    def _of(self, tensors: Sequence[Tensor], k: int) -> list[Tensor]:
        return self.replica.fragments.of(tensors, k)

    @torch.no_grad()
    def finish(self) -> None:
        """Make the replicas equal to their mean; the anchor goes on from there."""
        super().finish()
        self._moved, self._sent = None, 0
        if not self.z.equals(self.replica.flat.params):
            self.z.copy_(self.replica.flat.params)

    def start_over(self) -> None:
        super().start_over()
        self._moved, self._sent = None, 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "moved": self._moved, "sent": self._sent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        # Replicas that agree, as those of a merged state do, are where z is.
        self._moved = None if state["replicas_agree"] else state["moved"]
        replica = self.replica
        done = (replica.h - replica.remaining) * self.fragments // max(1, replica.h)
        sent = state.get("sent", done)  # not in version 3
        self._sent = sent if replica.open else 0
