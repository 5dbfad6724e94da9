"""Elastic averaging (EASGD): replicas and a centre attract each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..flat import pull_
from ..header import Kind
from .rule import Rule


@dataclass(eq=False)
class EASGD(Rule):
    """Pull every replica to the centre z, and the centre to the replicas' mean.

    x_i ← x_i - α (x_i - z);  z ← z + β (x̄ - z), both with the old z and x_i

    The new z is first used one round later, so its collective runs behind that round, and the
    result is that of waiting for it, bit for bit. With a ``pull`` every local step ends with
    x_i ← x_i - (p/H)(x_i - z), for which z is needed at once: then the boundary waits. Replicas
    never agree; what is evaluated is z. With an inner SGD with Nesterov momentum this is EAMSGD.

    The strengths are per synchronisation: where H grows, as with QSR, replicas are pulled less per
    step.

    Args:
        alpha: α, how far replicas are pulled to the centre; None for 0.9/m, with m replicas.
        beta: β, how far the centre moves to their mean; None for mα.
        pull: p, how far all steps of a round together pull to the centre, in [0, 1].
        overlap: whether the collective runs behind training; None: where there is no pull.

    Raises:
        ValueError: unless α > 0, β > 0, α + β < 2, which is where it is stable; if overlap is asked
            for together with a pull.

    Source: Zhang, Choromanska, LeCun 2015, arXiv 1412.6651; the pull: Teng et al., arXiv
    1905.10395.
    """

    agrees = False
    centre = "z"

    alpha: float | None = None
    beta: float | None = None
    pull: float = 0.0
    overlap: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.pull <= 1:
            raise ValueError(f"EASGD: pull is {self.pull}: it must lie in [0, 1]")
        if self.overlap and self.pull:
            raise ValueError(
                "EASGD: overlap with a pull would need the new centre before it has arrived"
            )
        _check_strengths(
            1e-9 if self.alpha is None else self.alpha, 1e-9 if self.beta is None else self.beta
        )

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return not self.pull if self.overlap is None else self.overlap

    def attach(self, replica: Any) -> None:
        m = replica.collective.world_size
        self.a = 0.9 / m if self.alpha is None else self.alpha
        self.b = m * self.a if self.beta is None else self.beta
        _check_strengths(self.a, self.b)
        super().attach(replica)
        self.z = self.anchor("z")
        self.mean = self.mean_of_copies()

    @torch.no_grad()
    def after_step(self) -> None:
        if self.pull:
            pull_(self.replica.flat.params, self.z.data, self.pull / self.replica.round.h)

    @torch.no_grad()
    def end_round(self) -> None:
        self.land()
        self.mean.launch()
        mean = None if self.overlaps else self.mean.land()
        pull_(self.replica.flat.params, self.z.data, self.a)
        self._move_centre(mean)
        self.replicas_agree = False

    @torch.no_grad()
    def land(self) -> None:
        self._move_centre(self.mean.land())

    def _move_centre(self, mean: Sequence[Tensor] | None) -> None:
        if mean is not None:
            move_centre_(self.z.data, mean, self.b)

    @torch.no_grad()
    def enter_consensus(self) -> None:
        super().enter_consensus()
        self.z.write_to(self.replica.flat.params)

    @torch.no_grad()
    def finish(self) -> None:
        self.land()
        self.in_place.mean_(Kind.FINISH, ends_round=self.replica.round.open)
        self.z.write_to(self.replica.flat.params)
        self.replicas_agree = True


def move_centre_(z: Sequence[Tensor], mean: Sequence[Tensor], beta: float) -> None:
    """z ← z + β (x̄ - z), tensors of one layout; x̄ perhaps of a narrower type."""
    for centre, average in zip(z, mean, strict=True):
        centre.lerp_(average.to(centre.dtype), beta)


def _check_strengths(alpha: float, beta: float) -> None:
    if not (alpha > 0 and beta > 0 and alpha + beta < 2):
        raise ValueError(
            f"EASGD: alpha is {alpha:g} and beta {beta:g}: both must be positive and their sum "
            "less than 2, or replicas and centre diverge"
        )
