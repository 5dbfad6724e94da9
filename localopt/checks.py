"""What must hold of the parts before a `LocalOptimizer` is built of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from .collective import Collective
from .environment import announced_ranks
from .errors import LayoutMismatchError, ranks_text
from .faults import control
from .flat import bits_of
from .sync import Rule


def named_parameters(inner: Optimizer, model: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters, each once, with the best names there are."""
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for g, group in enumerate(inner.param_groups):
        given = group.get("param_names") or [f"group{g}.{i}" for i in range(len(group["params"]))]
        for name, p in zip(given, group["params"], strict=True):
            named.setdefault(id(p), (names.get(id(p), name), p))
    return list(named.values())


def homes_of(
    model: nn.Module | None, owned: set[int]
) -> list[tuple[str, dict[str, nn.Parameter | None], str, nn.Parameter]]:
    """Where the model keeps the parameters whose ids are ``owned``: looking there is cheap."""
    return [
        (f"{prefix}.{key}" if prefix else key, module._parameters, key, p)
        for prefix, module in (model.named_modules() if model is not None else ())
        for key, p in module._parameters.items()
        if p is not None and id(p) in owned
    ]


def described(what: object) -> str:
    """A text equal on all ranks for equal periods or rules: some print their address."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(what))


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


def check_order(
    collective: Collective, inner: Optimizer, named: list[tuple[str, nn.Parameter]]
) -> None:
    """Raise if a rank has the parameters in another order, as their initial values show it."""
    if collective.world_size == 1 or any("param_names" in g for g in inner.param_groups):
        return
    values = json.dumps([bits_of(p.detach()) for _, p in named])
    of_ranks = [json.loads(text) for text in control.gather(collective, values)]
    odd = [
        rank
        for rank, theirs in enumerate(of_ranks)
        if theirs != of_ranks[0] and sorted(theirs) == sorted(of_ranks[0])
    ]
    if odd:
        raise LayoutMismatchError(
            f"{ranks_text(odd)} of {collective.world_size} gave the parameters in another order "
            "than rank 0: their initial values are the same, in another order. Give model=, or the "
            "parameters in one order"
        )
