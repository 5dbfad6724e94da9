"""What must hold of the parts before a `LocalOptimizer` is built of them."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch.optim import Optimizer

from .collective import Collective
from .environment import announced_ranks
from .sync import Rule


def check_inner(inner: Optimizer, period: Callable[[int, float], int]) -> None:
    if not isinstance(inner, Optimizer):
        raise TypeError(f"inner must be a torch.optim.Optimizer, not {type(inner).__name__}")
    if not callable(period):
        raise TypeError(f"period must be a callable (step, lr) -> H, not {period!r}")
    if getattr(period, "needs_lr", False):
        group = inner.param_groups[0]
        free = next((t.__name__ for t in type(inner).__mro__ if "ScheduleFree" in t.__name__), None)
        if "lr" not in group or free:
            raise ValueError(
                f"{type(period).__name__} follows the decay of the learning rate, and "
                f"{type(inner).__name__} has none: use Constant or PostLocal with it"
            )


def check_group(process_group: dist.ProcessGroup | None, *, alone: bool) -> None:
    """Raise unless it is clear whom this process's replica meets."""
    if alone and process_group is not None:
        raise ValueError("alone=True and process_group exclude each other")
    together = process_group is not None or (dist.is_available() and dist.is_initialized())
    if not alone and not together and announced_ranks() > 1:
        raise RuntimeError(
            f"the launcher has started {announced_ranks()} processes (WORLD_SIZE), and "
            "torch.distributed is not initialised: replicas would never meet. Call "
            "torch.distributed.init_process_group() before building the optimizer, or give "
            "alone=True to train each process by itself"
        )


def check_modes(inner: Optimizer, sync: Rule, collective: Collective) -> None:
    """Refuse an optimizer with an evaluation mode whose weights replicas would not agree on."""
    if not callable(getattr(inner, "eval", None)) or collective.world_size == 1:
        return
    if not getattr(sync, "state_fields", ()):
        raise ValueError(
            f"{type(inner).__name__} evaluates other weights than it trains: they depend on its "
            "state, which each replica has of its own, and replicas that agree in train() would "
            "not in eval(). Average that state as well, for schedule-free optimizers with "
            'sync=Average(state_fields=("z",))'
        )
