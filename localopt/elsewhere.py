"""Why replicas never part: somebody else averages the gradients, or all have the same data."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def warning_of(params: Iterable[nn.Parameter], losses: Sequence[float], h: int, step: int) -> str:
    """What to warn of where replicas are equal bit for bit after a round; "" if of nothing.

    Args:
        params: the optimizer's parameters, with the gradients of the last step.
        losses: by rank, mean training loss of the round; NaN where none was recorded.
        h, step: local steps of the round, and since the start.
    """
    if not (reason := reason_of(params, losses)):
        return ""
    return f"all replicas were equal, bit for bit, after {h} local steps (step {step}): {reason}"


def reason_of(params: Iterable[nn.Parameter], losses: Sequence[float]) -> str:
    """Why replicas are equal, and what to do; "" where they have nothing to part them.

    Args:
        params, losses: as for `warning_of`.
    """
    owned = list(params)
    gradients = [p.grad for p in owned if p.grad is not None]
    if gradients and not any(bool(g.any()) for g in gradients):
        return ""
    if not all(bool(g.isfinite().all()) for g in gradients):  # GradScaler has skipped the step
        return ""
    if _wrapped({id(p) for p in owned}):
        return f"DistributedDataParallel, in which the model is wrapped, {_AVERAGES}"
    if not losses or any(math.isnan(loss) for loss in losses):
        return f"either {_SAME_DATA}; or something outside localopt {_AVERAGES}"
    if len(set(losses)) > 1:
        return f"something outside localopt {_AVERAGES}"
    return f"their losses as well, so {_SAME_DATA}"


_AVERAGES = (
    "averages gradients at every step, so that local steps save nothing. Do not wrap the model in "
    "DistributedDataParallel, also not by accelerator.prepare(model) or a Trainer's ddp strategy; "
    "or train within its no_sync()"
)
_SAME_DATA = (
    "all train on the same data, and more replicas learn no more than one: give each data of its "
    "own, by a DistributedSampler or another seed"
)


def _wrapped(owned: set[int]) -> bool:
    """Whether a DistributedDataParallel has one of the parameters: it may wrap the model later
    than the optimizer is built, or where the optimizer was not given its model."""
    things = gc.get_objects()
    # By kind, and then by thing: there may be millions of things, and each kind is judged once.
    kinds = {id(type(thing)): type(thing) for thing in things}
    wrappers = {at for at, kind in kinds.items() if issubclass(kind, DistributedDataParallel)}
    return any(
        id(p) in owned
        for thing in (things if wrappers else ())
        if id(type(thing)) in wrappers
        for p in thing.parameters()
    )
