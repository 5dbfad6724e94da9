"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import Config


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from ``min_lr`` to ``max_lr``, then a decay; ``schedule(step)`` is the rate.

    For step < W: η = η_min + (η_max - η_min) · step / W. Afterwards, with
    t = (step - W) / (T - W) in [0, 1]:

    - cosine: η_min + (η_max - η_min) · (1 + cos πt) / 2
    - linear: η_min + (η_max - η_min) · (1 - t)
    - cosine-step: the cosine, rounded to the nearest power of 2
    - step: η_max · γ^k, k the number of decay points at or before the step
    - const: η_max

    Attributes:
        kind: the decay's name.
        max_lr, min_lr: peak and final rate.
        warmup_steps: W.
        decay_steps: T, steps that warm-up and decay span.
        total_steps: steps of the run, at most T for a full decay.
        decay_at: steps at which "step" decays.
        gamma: its factor.
    """

    kind: str
    max_lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    total_steps: int
    decay_at: tuple[int, ...] = ()
    gamma: float = 0.1

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int) -> Schedule:
        """The schedule that ``config`` asks for, with ``steps_per_epoch`` optimizer steps."""
        span = config.epochs if config.epochs_for_sche == -1 else config.epochs_for_sche
        warmup = config.warmup_steps
        if warmup == -1:
            warmup = round(config.warmup_epochs * steps_per_epoch)
        return cls(
            kind=config.scheduler, max_lr=config.max_lr, min_lr=config.min_lr, gamma=config.gamma,
            warmup_steps=warmup, decay_steps=span * steps_per_epoch,
            total_steps=config.epochs * steps_per_epoch,
            decay_at=tuple(round(point * steps_per_epoch) for point in config.decay_points),
        )  # fmt: skip

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.min_lr + (self.max_lr - self.min_lr) * step / self.warmup_steps
        span = self.decay_steps - self.warmup_steps
        t = min(1.0, (step - self.warmup_steps) / span) if span > 0 else 1.0
        return self._decayed(step, t)

    def _decayed(self, step: int, t: float) -> float:
        if self.kind == "const":
            return self.max_lr
        if self.kind == "step":
            return self.max_lr * self.gamma ** sum(step >= point for point in self.decay_at)
        if self.kind == "linear":
            return self.min_lr + (self.max_lr - self.min_lr) * (1 - t)
        cosine = self.min_lr + (self.max_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * t))
        return 2.0 ** round(math.log2(cosine)) if self.kind == "cosine-step" else cosine
