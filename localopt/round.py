"""The clock of a replica: how far it is, when the round ends, what the round has seen so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Round:
    """The open round, or the last one. The optimizer moves it on, rules read it.

    Attributes:
        step: local steps finished.
        h: local steps in this round.
        remaining: local steps left; 0 where only the synchronisation is owed.
        open: whether a round is open.
        number: rounds finished.
        start: a sample of the parameters at the round's start, where all ranks should have the
            same; else 0.
        backwards: backward passes made in this round.
        last_lr: mean learning rate of the round before.
    """

    def __init__(self, inner: Optimizer) -> None:
        self._inner = inner
        self.last_lr = 0.0
        self.start_over()

    def start_over(self) -> None:
        """Go back to step 0, as if no step had been made."""
        self.step = self.h = self.remaining = self.number = self.start = 0
        self.open = False
        self._clear()

    def _clear(self) -> None:
        # A 0-dim tensor once a loss or a rate was one: nothing is read before the boundary.
        self._rate_sum: float | Tensor = 0.0
        self._loss_sum: float | Tensor = 0.0
        self._rates = self._losses = self.backwards = 0
        self._step_loss: float | Tensor | None = None

    @property
    def done(self) -> int:
        """Local steps made in this round."""
        return self.h - self.remaining

    def begin(self, h: int, *, start: int = 0) -> None:
        """A round of ``h`` local steps begins."""
        self.h = self.remaining = h
        self.open, self.start = True, start

    def end(self, *, next_loss: bool = False) -> None:
        """The round has ended; ``next_loss``: what was recorded is the loss of the next one."""
        self.remaining, self.open = 0, False
        self.number += 1
        self.last_lr, loss = self.lr, self._step_loss
        self._clear()
        self._step_loss = loss if next_loss else None

    def extend(self) -> None:
        """One step more, for the end has failed: gradients are those of this replica still."""
        self.remaining = 1

    def count_step(self) -> None:
        """A local step has been made."""
        if self._rates == self.done:  # a step that was skipped, but counts
            self.record_lr(self._inner.param_groups[0].get("lr", math.nan))
        self.step += 1
        if self.remaining:
            self.remaining -= 1
        if self._step_loss is not None:
            self._loss_sum = self._loss_sum + self._step_loss
            self._losses += 1
            self._step_loss = None

    def count_backward(self) -> None:
        """A backward pass has been made."""
        self.backwards += 1

    def start_at(self, step: int) -> None:
        """Count steps from ``step``."""
        self.step = step

    def record_lr(self, lr: float | Tensor) -> None:
        """Take note of a step's learning rate."""
        if isinstance(lr, Tensor) and lr.device.type != "mps":
            lr = lr.detach().double()
        self._rate_sum = self._rate_sum + lr
        self._rates += 1

    def record_loss(self, loss: float | Tensor) -> None:
        """Take note of a step's training loss. No host synchronisation."""
        if isinstance(loss, Tensor):
            loss = loss.detach() if loss.dim() == 0 else loss.detach().reshape(())
            if loss.device.type != "mps":  # a sum of many thousands would stop growing
                loss = loss.double()
        self._step_loss = loss if isinstance(loss, Tensor) else float(loss)

    @property
    def has_loss(self) -> bool:
        """Whether the loss of the step that is being made has been recorded."""
        return self._step_loss is not None

    @property
    def lr(self) -> float:
        """Mean learning rate over the round's steps so far, of parameter group 0."""
        if not self._rates:
            return float(self._inner.param_groups[0].get("lr", math.nan))
        return float(self._rate_sum) / self._rates

    @property
    def loss(self) -> float:
        """Mean training loss over the round's steps so far; NaN if none was recorded."""
        return float(self._loss_sum) / self._losses if self._losses else math.nan

    def rates(self) -> list[float | None]:
        """The round's mean learning rate, and each group's of now."""
        rates = [group.get("lr") for group in self._inner.param_groups]
        return [self.lr, *(None if rate is None else float(rate) for rate in rates)]

    def state_dict(self) -> dict[str, Any]:
        """Where the replica is in its round."""
        return {
            **{saved: getattr(self, key) for key, saved in _SAVED.items()},
            "rate_sum": float(self._rate_sum),
            "loss_sum": float(self._loss_sum),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._clear()
        state = {"open": state["remaining"] > 0, "start": 0, **state}  # not in version 3
        for key, saved in _SAVED.items():
            setattr(self, key, state[saved])
        self._rate_sum, self._loss_sum = state["rate_sum"], state["loss_sum"]


_SAVED = {
    "step": "step", "h": "h", "open": "open", "remaining": "remaining", "start": "start",
    "number": "round", "_rates": "_rates", "_losses": "_losses",
}  # fmt: skip
