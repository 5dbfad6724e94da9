"""Whether gradients are averaged by somebody else: then replicas never part."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def warning_of(params: Iterable[nn.Parameter], losses: Sequence[float], h: int, step: int) -> str:
    """What to warn of where replicas are equal after ``h`` local steps; "" if of nothing.

    Args:
        params, losses: as for `averaged_elsewhere`.
        h, step: local steps of the round, and since the start.
    """
    who = averaged_elsewhere(params, losses)
    if who is None:
        return ""
    return (
        f"all replicas were equal, bit for bit, after {h} local steps (step {step}): {who} "
        "averages gradients at every step, so that local steps save nothing. Do not wrap the model "
        "in DistributedDataParallel, also not by accelerator.prepare(model) or a Trainer's ddp "
        "strategy; or train within its no_sync()"
    )


def averaged_elsewhere(params: Iterable[nn.Parameter], losses: Sequence[float]) -> str | None:
    """Who averages the gradients, for people; None if nobody is known to do so.

    For replicas that are equal bit for bit after a round of several steps. Their data may be equal
    as well, so that alone says nothing.

    Args:
        params: the optimizer's parameters, with the gradients of the last step.
        losses: by rank, mean training loss of the round; NaN where none was recorded.
    """
    owned = list(params)
    gradients = [p.grad for p in owned if p.grad is not None]
    if gradients and not any(bool(g.any()) for g in gradients):
        return None
    if _wrapped({id(p) for p in owned}):
        return "DistributedDataParallel, in which the model is wrapped,"
    if not any(math.isnan(loss) for loss in losses) and len(set(losses)) > 1:
        return "something outside localopt"
    return None


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
