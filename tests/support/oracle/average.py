"""Averaging, of changes that are compressed or not."""

from __future__ import annotations

import numpy as np

from localopt.compression import Bfloat16, Int8

from .case import Case
from .inner import Array
from .rule import Round, RuleOracle, everywhere
from .wire import IN_SHARDS, Wire


class Average(RuleOracle):
    """x_i ← x̄; named optimizer state too, or to zero."""

    def end_round(self, x: Array, this: Round) -> Array:
        return everywhere(self.finish(x), self.m)

    def finish(self, x: Array) -> Array:
        state = self.inner.state
        for name in self.settings.get("state_fields", ()):
            state[name] = everywhere(state[name].mean(axis=0), self.m)
        for name in self.settings.get("reset_fields", ()):
            state[name] = np.zeros_like(x)
        return x.mean(axis=0)


class CompressedAverage(Average):
    """z ← z - what arrives of z - x_i;  x_i ← z."""

    def start(self, x0: Array) -> None:
        self.z, self.wire = x0, Wire(self.settings["compress"], self.m)

    def end_round(self, x: Array, this: Round) -> Array:
        self.z = self.z - self.wire.mean(self.z - x)
        return everywhere(self.z, self.m)

    def finish(self, x: Array) -> Array:
        self.z = super().finish(x)
        return self.z


CASES = {
    "Average": [
        Case(Average),
        Case(Average, {"state_fields": ("exp_avg", "exp_avg_sq")}, ["AdamW"]),
        Case(Average, {"state_fields": ("momentum_buffer",)}, ["SGD"]),
        Case(Average, {"reset_fields": ("momentum_buffer",)}, ["SGD"]),
        Case(CompressedAverage, {"compress": Bfloat16(16)}, launches=IN_SHARDS, coarse=1e-2),
        Case(CompressedAverage, {"compress": Int8(16)}, launches=IN_SHARDS, coarse=5e-2),
    ]
}
