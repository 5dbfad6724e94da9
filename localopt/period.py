"""When to synchronise: periods, pure functions ``(step, lr) -> H``.

A period is asked once a round, at the round's first step: ``step`` is the number of local steps
finished before it, ``lr`` the learning rate that this first step will use. The answer H is the
number of local steps in the round. Any callable of that form is a period; the classes here add
what every period needs: a warm-up, a cap, and a clamp so that the run ends synchronised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Period:
    """Base of the periods: warm-up, then `rounds`, capped and clamped.

    H = min(h, h_max, total_steps - step), at least 1, where h is ``warmup_h`` while
    ``step < warmup_steps`` and `rounds(step, lr)` afterwards. A round that begins in the warm-up
    may run past its end.

    Args:
        warmup_steps: local steps during which H is ``warmup_h``.
        warmup_h: local steps per round in the warm-up; the period's base by default.
        total_steps: local steps of the whole run; the last round is cut to end there.
        h_max: cap on H.

    Raises:
        ValueError: if a setting is out of range.
    """

    warmup_steps: int = 0
    warmup_h: int | None = None
    total_steps: int | None = None
    h_max: int | None = None

    needs_lr: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_count("warmup_steps", self.warmup_steps, least=0)
        for name in ("warmup_h", "total_steps", "h_max"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least=1)

    @property
    def base_h(self) -> int:
        """Local steps per round where nothing makes the round longer."""
        raise NotImplementedError

    def __str__(self) -> str:
        """A few words for a table: its name and its own settings."""
        common = {f.name for f in fields(Period)}
        own = [f for f in fields(self) if f.init and f.name not in common]
        settings = ", ".join(f"{f.name} = {getattr(self, f.name)}" for f in own)
        return f"{type(self).__name__} {settings}".rstrip()

    def rounds(self, step: int, lr: float) -> int | None:
        """H after the warm-up, neither capped nor clamped; None for a round without end."""
        raise NotImplementedError

    def __call__(self, step: int, lr: float) -> int:
        """Return H for the round that begins after ``step`` local steps with rate ``lr``."""
        if step < self.warmup_steps:
            h: int | None = self.base_h if self.warmup_h is None else self.warmup_h
        else:
            h = self.rounds(step, lr)
        left = None if self.total_steps is None else self.total_steps - step
        bounds = [bound for bound in (h, self.h_max, left) if bound is not None]
        if not bounds:
            raise ValueError(
                f"{type(self).__name__}: at step {step} with lr {lr} the round has no end; "
                "give total_steps or h_max"
            )
        return max(1, min(bounds))


@dataclass(frozen=True)
class Constant(Period):
    """H local steps in every round (Local SGD).

    Args:
        h: local steps per round.

    Source: Stich 2018, arXiv 1805.09767.
    """

    h: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("h", self.h, least=1)

    @property
    def base_h(self) -> int:
        return self.h

    def __str__(self) -> str:
        return f"constant H = {self.h}"

    def rounds(self, step: int, lr: float) -> int:
        return self.h


@dataclass(frozen=True)
class PowerRule(Period):
    """Longer rounds as the learning rate decays: H = max(base, floor((alpha / lr) ** power)).

    Args:
        alpha: the learning rate at which the rule gives one step; units of the learning rate.
        base: least H, also the warm-up's.
        power: exponent; 2 is `QSR`, 1 and 3 are its ablations.

    A rate of zero (or so small that H exceeds 64 bits) asks for the longest round there
    is: ``h_max``, or all the steps left.

    Raises:
        ValueError: if a setting is out of range or ``lr`` is not a number.

    Source: Gu et al., ICLR 2024, arXiv 2310.14423.
    """

    alpha: float
    base: int
    power: float

    needs_lr: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("base", self.base, least=1)
        for name in ("alpha", "power"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, not {value!r}")

    @property
    def base_h(self) -> int:
        return self.base

    def __str__(self) -> str:
        return f"power {self.power:g} α = {self.alpha:g}"

    def rounds(self, step: int, lr: float) -> int | None:
        if math.isnan(lr):
            raise ValueError(f"{type(self).__name__}: the learning rate at step {step} is NaN")
        if lr <= 0:
            return None
        try:
            h = math.floor((self.alpha / lr) ** self.power)
        except OverflowError:
            return None
        return max(self.base, h) if h < 2**63 else None


@dataclass(frozen=True)
class QSR(PowerRule):
    """Quadratic Synchronization Rule: H = max(base, floor((alpha / lr)^2)).

    Args:
        alpha: growth coefficient, in units of the learning rate; to be tuned (with peak rate
            0.008 the paper uses 0.0175 for ViT-B, with 0.8 it uses 0.2 to 0.25 for ResNet-152).
        base: least H, also the warm-up's.

    Source: Gu et al., ICLR 2024, arXiv 2310.14423.
    """

    power: float = field(init=False, default=2.0)

    def __str__(self) -> str:
        return f"QSR α = {self.alpha:g}"


@dataclass(frozen=True)
class PostLocal(Period):
    """H = 1 until ``switch_step``, then H = h (post-local SGD).

    With momentum SGD the first phase is data-parallel SGD, but each replica has a momentum of its
    own, from its own gradients, and goes on with it after the switch. So it is in the authors'
    code. In torch's ``PostLocalSGDOptimizer`` with ``post_localSGD_hook`` it is not: gradients are
    averaged until the switch, and all replicas begin the second phase with one common momentum.
    To have that, average the gradients in the first phase::

        optimizer = LocalSGD(
            model.parameters(), lr, period=PostLocal(switch_step, h), momentum=0.9, model=model
        )
        for step, batch in enumerate(batches):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if step < switch_step:
                for p in model.parameters():
                    if p.grad is not None:
                        dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                        p.grad /= dist.get_world_size()
            optimizer.step()

    All replicas then have equal weights and equal optimizer state at the switch. The first phase
    sends twice as much. With AdamW do the same: without it the first phase is not data-parallel
    AdamW, because second moments are not linear in the gradients.

    Args:
        switch_step: local steps before the rounds lengthen.
        h: local steps per round afterwards.

    Source: Lin et al., arXiv 1808.07217.
    """

    switch_step: int
    h: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("switch_step", self.switch_step, least=0)
        _check_count("h", self.h, least=1)

    @property
    def base_h(self) -> int:
        return 1

    def __str__(self) -> str:
        return f"post-local H = {self.h}"

    def rounds(self, step: int, lr: float) -> int:
        return 1 if step < self.switch_step else self.h


@dataclass(frozen=True)
class SWAP(Period):
    """H = 1 until ``switch_step``, then one round to the end of the run.

    Needs ``total_steps``. As published, the first phase trains one model on averaged gradients.
    Here each replica has a momentum of its own, and goes on with it after the switch. To begin
    the last round with one common momentum, average the gradients in the first phase: the loop is
    in `PostLocal`. With AdamW only that makes the first phase data-parallel.

    Args:
        switch_step: local steps before the last round.

    Raises:
        ValueError: if a setting is out of range, or there is no ``total_steps``.

    Source: Gupta et al., arXiv 2001.02312.
    """

    switch_step: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count("switch_step", self.switch_step, least=0)
        if self.total_steps is None:
            raise ValueError("SWAP needs total_steps: its last round lasts to the end of the run")

    @property
    def base_h(self) -> int:
        return 1

    def __str__(self) -> str:
        return "SWAP"

    def rounds(self, step: int, lr: float) -> int | None:
        return 1 if step < self.switch_step else None


# By the name that a recipe gives.
PERIODS: dict[str, Callable[..., Period]] = {
    "qsr": QSR,
    "power": PowerRule,
    "constant": Constant,
    "post-local": PostLocal,
    "swap": SWAP,
}


def _check_count(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
