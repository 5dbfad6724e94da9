"""Streaming: a fragment of the parameters at a time."""

from __future__ import annotations

import math

import numpy as np

from .case import Case, Launches
from .inner import Array
from .rule import Round, RuleOracle, drift


class Streaming(RuleOracle):
    """Douillard et al. 2025, arXiv 2501.18512: the parameters in fragments k = 0 … K - 1, of which
    each is looked at after step ⌈(k + 1) H / K⌉ of a round, and used at once, or when the next
    one is due; with a delay it is looked at that many steps before, and used then:
    v ← μv + (z - x̄), z ← z - ζ(z - x̄ + μv), x_i ← (1 - α)x_i + αz.
    """

    def start(self, x0: Array) -> None:
        self.z, self.v = x0.copy(), np.zeros_like(x0)
        self.late: tuple[slice, Array] | None = None
        self.square_drift = 0.0

    def after_step(self, x: Array, this: Round) -> Array:
        number, done = self.settings["fragments"], len(this.lrs)
        cuts = [k * x.shape[1] // number for k in range(number + 1)]
        delay = self.settings.get("delay", 0)
        due = [math.ceil((k + 1) * this.h / number) for k in range(number)]
        for k in range(number):
            turn = range((due[k - 1] if k else 0) + 1, due[k] + 1)
            looked = max(due[k] - delay, turn[0]) if turn else due[k]
            if looked == done:
                x = self.take(x)
                part = slice(cuts[k], cuts[k + 1])
                self.late = part, x[:, part].mean(axis=0)
                if k == 0:
                    self.square_drift = 0.0
                self.square_drift += float(drift(x[:, part], self.m)[0] ** 2)
                if not self.settings.get("overlap", False) and due[k] == done:
                    x = self.take(x)
        return self.take(x) if delay and done in due else x

    def take(self, x: Array) -> Array:
        if self.late is None:
            return x
        part, mean = self.late
        zeta = self.settings.get("outer_lr", 1.0)
        mu = self.settings.get("outer_momentum", 0.0)
        behind = self.settings.get("overlap") or self.settings.get("delay")
        alpha = self.settings.get("alpha", 0.5 if behind else 1.0)
        gradient = self.z[part] - mean
        self.v[part] = mu * self.v[part] + gradient
        self.z[part] -= zeta * (gradient + mu * self.v[part])
        x = x.copy()
        x[:, part] = (1 - alpha) * x[:, part] + alpha * self.z[part]
        self.late = None
        return x

    def end_round(self, x: Array, this: Round) -> Array:
        return x

    def drift(self, brought: Array, this: Round) -> Array:
        return np.full(self.m, math.sqrt(self.square_drift))

    def finish(self, x: Array) -> Array:
        if self.late is not None:  # it has arrived: the momentum goes on, the replicas are the mean
            self.take(x)
        self.z = x.mean(axis=0)
        return self.z.copy()


def streamed(first: int, second: int, last: int) -> Launches:
    """Fragments by the steps of a round of three."""
    return Launches(((last, last),), ((first, first), (second, second)))


CASES = {
    "Streaming": [
        Case(Streaming, {"fragments": 2}, launches=streamed(0, 1, 1), bad=3),
        Case(
            Streaming,
            {"fragments": 3, "outer_lr": 0.7, "outer_momentum": 0.5},
            ["AdamW"],
            launches=streamed(1, 1, 1),
            bad=3,
        ),
        Case(
            Streaming,
            {"fragments": 4, "overlap": True, "outer_lr": 0.8, "outer_momentum": 0.4},
            launches=streamed(1, 1, 2),
            delay=1,
            out_of_step=9,
            bad=3,
        ),
        Case(
            Streaming,
            {"fragments": 2, "overlap": True, "alpha": 0.8},
            ["SGD"],
            launches=streamed(0, 1, 1),
            delay=1,
            out_of_step=11,
            bad=4,
        ),
        Case(
            Streaming,
            {"fragments": 1, "outer_lr": 0.7, "outer_momentum": 0.6},
            ["SGD"],
        ),
        Case(
            Streaming,
            {"fragments": 2, "delay": 2, "outer_lr": 0.7, "outer_momentum": 0.6, "alpha": 0.75},
            launches=streamed(1, 0, 1),
            bad=3,
        ),
    ]
}
