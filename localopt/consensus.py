"""The model that should be evaluated, for a while where the replica's own is."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .meeting import modes_of
from .replica import Replica
from .sync import Rule


class Consensus:
    """What `LocalOptimizer.consensus` enters and leaves.

    Attributes:
        inside: whether the parameters are the consensus now.
    """

    def __init__(self, replica: Replica, sync: Rule) -> None:
        self._replica, self._sync = replica, sync
        self.inside = False

    def enter(self, leaving: ExitStack) -> None:
        """Bring it there; ``leaving`` undoes that. Collective."""
        replica, modes = self._replica, modes_of(self._replica.inner)
        agreed = self._sync.replicas_agree and not replica.round.open
        if not agreed:
            self._sync.adopt()
        saved = None if agreed and not modes else replica.snapshot()
        leaving.callback(self._leave, saved, replica.buffers.snapshot(), modes)
        self.inside = True
        if agreed:
            replica.check_equal()
        else:
            self._sync.enter_consensus()

    def _leave(
        self,
        saved: list[Tensor] | None,
        buffers: dict[str, Tensor],
        modes: list[tuple[dict[str, Any], Any]],
    ) -> None:
        self.inside = False
        if saved is not None:
            self._replica.restore(saved)
        for home, mode in modes:  # the weights are those of that mode again
            home["train_mode"] = mode
        with torch.no_grad():
            self._replica.buffers.restore(buffers)
