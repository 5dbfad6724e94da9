"""CoCoD-SGD: averaging behind the next round, whose progress is added on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rule import Rule


@dataclass(eq=False)
class CoCoDSGD(Rule):
    """Replace what a replica had one round ago by the mean of that; keep what it did since.

    At the end of a round:
        wait for the mean of s launched one round ago: x_i ← mean(s) + (x_i - s_i);
        s_i ← x_i; launch the mean of s, and train on.

    The first round's end only launches. Replicas never agree; what is evaluated is their mean.

    Source: Shen et al., IJCAI 2019, arXiv 1906.12043.
    """

    agrees = False
    overlaps = True

    def attach(self, replica: Any) -> None:
        super().attach(replica)
        # While a mean is in flight s_i; once it has landed the correction mean(s) - s_i.
        self.s = self.zeros("s")
        self.mean = self.mean_of_copies()
        self._corrects = False

    @torch.no_grad()
    def end_round(self) -> None:
        self.land()
        if self._corrects:
            for x, s in zip(self.replica.flat.params, self.s.data, strict=True):
                x.add_(s)
            self._corrects = False  # where the launch fails it is made again, and this is not
        self.s.copy_(self.replica.flat.params)
        self.mean.launch()
        self.replicas_agree = False

    @torch.no_grad()
    def land(self) -> None:
        mean = self.mean.land()
        if mean is not None:
            correction_(self.s.data, mean)
            self._corrects = True

    def finish(self) -> None:
        super().finish()
        self._corrects = False  # the mean has it all

    def start_over(self) -> None:
        super().start_over()
        self._corrects = False

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "corrects": self._corrects}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        # Replicas that agree, as those of a merged state do, have nothing to correct.
        self._corrects = state["corrects"] and not state["replicas_agree"]


def correction_(s: Sequence[Tensor], mean: Sequence[Tensor]) -> None:
    """s_i ← mean(s) - s_i: with that added, x_i = mean(s) + (x_i - s_i)."""
    for own, average in zip(s, mean, strict=True):
        torch.sub(average.to(own.dtype), own, out=own)
