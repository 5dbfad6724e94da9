"""What rules have in common that step on what a round has changed."""

from __future__ import annotations

import numpy as np

from .inner import Array
from .rule import Round, RuleOracle, everywhere
from .wire import Wire


class BlockMomentum(RuleOracle):
    """z ← what `update` makes of z and x̄; x_i ← z. The forms differ in `update` alone."""

    def start(self, x0: Array) -> None:
        self.z, self.v = x0, np.zeros_like(x0)
        compress = self.settings.get("compress")
        self.wire = None if compress is None else Wire(compress, self.m)

    def update(self, mean: Array, this: Round) -> None:
        raise NotImplementedError

    def end_round(self, x: Array, this: Round) -> Array:
        mean = x.mean(axis=0)
        if self.wire is not None:
            mean = self.z - self.wire.mean(self.z - x)
        self.update(mean, this)
        return everywhere(self.z, self.m)

    def finish(self, x: Array) -> Array:
        self.z = x.mean(axis=0)  # z itself where a round has just ended
        return self.z
