"""Which tensors replicas have in common: the same on all ranks, by name, and where they live."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .buffers import BufferPolicy, Buffers
from .collective import Collective
from .entry import entries_of
from .errors import LayoutMismatchError, ranks_text
from .faults import control
from .flat import Flat, bits_of
from .header import Kind
from .replica import Replica
from .sync import Rule


class Layout:
    """The parameters of an optimizer and the buffers of its model.

    Args:
        inner: the optimizer that makes the local steps.
        period, sync: when and how; they must be the same on all ranks.
        model: None where there is none.
        policy: what is done to its buffers.
        collective: all replicas.
        settings: what else must be the same on all ranks.
    """

    def __init__(
        self,
        inner: Optimizer,
        period: Callable[[int, float], int],
        sync: Rule,
        model: nn.Module | None,
        policy: BufferPolicy,
        collective: Collective,
        settings: Mapping[str, Any],
    ) -> None:
        self._inner, self._sync, self._collective = inner, sync, collective
        self._model, self._policy = model, policy
        self._lines = [
            f"rule {_described(sync)}",
            f"period {_described(period)}",
            f"inner optimizer {type(inner).__name__}",
            *(f"{key} {value}" for key, value in {**settings, "buffers": policy}.items()),
        ]

    def describe(self, cls: type) -> str:
        """An optimizer of class ``cls``, for people."""
        named = named_parameters(self._inner, self._model)
        numbers = sum(p.numel() for _, p in named)
        return f"{cls.__name__} of {numbers} parameters, the first of them {named[0][0]}"

    def build(self, *, first: bool = False) -> tuple[Flat, Buffers]:
        """Compare layouts, and move the parameters into flat buffers. Collective.

        Raises:
            ValueError: if the parameters cannot live in flat buffers.
            LayoutMismatchError: if the ranks were built differently.
            AbsentRankError: if one does not arrive.
        """
        named = named_parameters(self._inner, self._model)
        buffers = Buffers(self._model, self._policy, [p for _, p in named])
        extra = [*self._sync.extra(named), *buffers.entries()]
        entries = [*entries_of(named, extra), *extra]
        lines = [*self._lines, *map(str, entries), *buffers.described()]
        control.agree(self._collective, lines, control.TIMEOUT)
        if first and self._model is None:
            _check_order(self._collective, self._inner, named)
        # Nothing has been changed up to here.
        self._homes = _homes_of(self._model, {id(p) for _, p in named})
        return Flat(named, extra, self._collective.world_size), buffers

    def check_model(self) -> None:
        """Raise `RuntimeError` if the model has got other Parameters than the optimizer's."""
        for name, home, key, p in self._homes:
            if home.get(key) is not p:
                raise RuntimeError(
                    f"the model's parameter {name} is no longer the one that the optimizer has: "
                    "load_state_dict(assign=True) or an assignment replaced it. Do that before "
                    "building the optimizer"
                )

    def add(self, replica: Replica, param_group: dict[str, Any]) -> None:
        """Add a parameter group on all ranks; where that fails, all is as it was. Collective."""
        groups, homes = len(self._inner.param_groups), self._homes
        own, buffers = replica.flat, replica.buffers.snapshot()
        try:
            problem = self._problem_with(param_group)
            replica.meet(Kind.ADD_GROUP, count="other")
            said = [f"a group that is {problem or 'fit'}"]
            control.agree(self._collective, said, control.TIMEOUT)
            if problem is not None:
                raise problem
            new, new_buffers = self.build()
            replica.equalise(new, new_buffers)
        except BaseException:
            del self._inner.param_groups[groups:]
            self._homes = homes
            own.take_back()
            raise
        with torch.no_grad():
            for name, p in new.named:
                if name in own.views:  # replicas may differ: only new ones start as rank 0's
                    p.copy_(own.views[name])
            new_buffers.restore(buffers)
        replica.relayout(new, new_buffers)

    def _problem_with(self, param_group: dict[str, Any]) -> Exception | None:
        """Add the group to the inner optimizer; why it cannot be, if so."""
        try:
            self._inner.add_param_group(param_group)
            named = named_parameters(self._inner, self._model)
            entries_of(named, self._sync.extra(named))
        except Exception as error:  # whatever the inner optimizer objects to
            return error
        return None


def named_parameters(inner: Optimizer, model: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters, each once, with the best names there are."""
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for g, group in enumerate(inner.param_groups):
        given = group.get("param_names") or [f"group{g}.{i}" for i in range(len(group["params"]))]
        for name, p in zip(given, group["params"], strict=True):
            named.setdefault(id(p), (names.get(id(p), name), p))
    return list(named.values())


def _homes_of(
    model: nn.Module | None, owned: set[int]
) -> list[tuple[str, dict[str, nn.Parameter | None], str, nn.Parameter]]:
    """Where the model keeps the parameters whose ids are ``owned``: looking there is cheap."""
    return [
        (f"{prefix}.{key}" if prefix else key, module._parameters, key, p)
        for prefix, module in (model.named_modules() if model is not None else ())
        for key, p in module._parameters.items()
        if p is not None and id(p) in owned
    ]


def _described(what: object) -> str:
    """A text equal on all ranks for equal periods or rules: some print their address."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(what))


def _check_order(
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
