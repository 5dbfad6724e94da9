"""What a replica held when it began to synchronise: after an error it should hold the same."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from localopt import LocalOptimizer

CALLS = ("before_step", "after_step", "end_round", "enter_consensus", "finish")


def held(optimizer: LocalOptimizer) -> list[Tensor]:
    """Copies of the parameters and of all that inner optimizer and rule keep, in a fixed order."""
    rule = optimizer.sync
    params = [p for group in optimizer.param_groups for p in group["params"]]
    vectors = [*rule._anchors.values(), *rule._momenta.values()]
    kept = [view for vector in vectors for view in vector.views.values()]
    outer = getattr(rule, "outer_optimizer", None)
    states = [*optimizer.state.values(), *(outer.state.values() if outer else ())]
    kept += [t for state in states for t in state.values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in (*params, *kept)]


def same_or_nan(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all values are the same; NaN is NaN."""
    return all(
        x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan())
        and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(a, b, strict=True)
    )  # fmt: skip


class Entries:
    """Remembers what ``optimizer`` held whenever something was asked of its rule.

    Local steps and pulls come before that, or are asked for by themselves. What arrives of the
    synchronisation before is no part of this one.

    Attributes:
        last: what was held where a synchronisation last began.
    """

    def __init__(self, optimizer: LocalOptimizer) -> None:
        self._optimizer = optimizer
        self.last = held(optimizer)
        rule = optimizer.sync
        for name in CALLS:
            setattr(rule, name, self._remembering(getattr(rule, name)))
        rule.land = self._remembering(rule.land, afterwards=True)
        replica, copied = optimizer._replica, rule._copied
        replica.check_equal = self._remembering(replica.check_equal)
        if copied is not None:
            copied.land = self._remembering(copied.land)

    def _remembering(self, call: Any, *, afterwards: bool = False) -> Any:
        @functools.wraps(call)
        def remembering(*args: Any, **kwargs: Any) -> Any:
            if not afterwards:
                self.last = held(self._optimizer)
            result = call(*args, **kwargs)
            if afterwards:
                self.last = held(self._optimizer)
            return result

        return remembering

    def unchanged(self) -> bool:
        """Whether all is as it was then."""
        return same_or_nan(self.last, held(self._optimizer))
