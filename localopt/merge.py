"""One state from those of all replicas, for a run with another number of them. No process group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .saved import READABLE, own_state

State = Mapping[str, Any]


def merged(states: Iterable[tuple[State, State]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of the model and of its optimizer, for every rank of any number of replicas.

    Saved at any step, also in mid-round, they become what `LocalOptimizer.finish` would have made
    of the replicas, but that optimizer states become one as well. The next step begins a round.

    - Weights are the consensus: x̄, or the anchor that the rule has for its ``centre``.
    - Other floating-point tensors are averaged over the replicas that have them: buffers, inner
      optimizer state, momenta of the rule (alike on all ranks, but where they are about one
      replica). A ``step`` is the latest: replicas may have skipped some. All else, such as
      integers and parameter groups, is rank 0's.
    - Anchors start again at the consensus, leaders too. Steps and finished rounds are counted on;
      what the open round has recorded, the last report and the ranks' waits are forgotten.

    Tensors that are equal on all ranks keep their bits. Means are accumulated in float64.
    `Average` resets its ``reset_fields`` at the next synchronisation, not here.

    States without a round, such as those of data-parallel training, are merged by the same rules.

    Args:
        states: ``(model.state_dict(), optimizer.state_dict())`` of each rank, from rank 0 on. One
            is held at a time, next to the first and, where they differ, the sums.

    Returns:
        Both states; load the model's first. Tensors may share memory with rank 0's.

    Raises:
        ValueError: if the states are not those of all ranks in order, at one step, of one rule and
            of this version, for one model; or if the model does not name what the rule keeps.
    """
    total: dict[str, Any] | None = None
    first: State | None = None
    for rank, (model, optimizer) in enumerate(states):
        own = own_state(optimizer)
        first = own if total is None else first
        _check_own(own, first, rank)
        both = {"model": model, "optimizer": optimizer}
        if total is None:
            total = _opened(both)
        elif model.keys() == total["model"].keys():
            total = _joined(total, both)
        else:
            raise ValueError(f"the states of ranks 0 and {rank} are of different models")
    if total is None:
        raise ValueError("there are no states to merge")
    if first is not None and rank + 1 != first["world_size"]:
        raise ValueError(f"{rank + 1} states, saved by {first['world_size']} replicas")
    closed = _closed(total)
    model, optimizer = closed["model"], closed["optimizer"]
    if (own := own_state(optimizer)) is not None:
        _restart(model, own)
    return model, optimizer


def _check_own(own: State | None, first: State | None, rank: int) -> None:
    if own is None or first is None:
        if own is not first:
            raise ValueError(f"one of the states of ranks 0 and {rank} is no LocalOptimizer's")
        return
    if own["version"] not in READABLE or "anchors" not in own["sync"]:
        raise ValueError(
            f"rank {rank}: the state is of another version: go on once with as many replicas as "
            "saved it, and save again"
        )
    if own["rank"] != rank:
        raise ValueError(f"the state given for rank {rank} is that of rank {own['rank']}")
    for key in ("rule", "world_size"):
        if own[key] != first[key]:
            raise ValueError(f"rank {rank}: {key} is {own[key]!r}, on rank 0 {first[key]!r}")
    steps = [state["replica"]["step"] for state in (first, own)]
    if steps[0] != steps[1]:
        raise ValueError(f"rank {rank} is at step {steps[1]}, rank 0 at {steps[0]}")


# Trees of states, whose floating-point tensors are on the way to their mean.


class _Mean:
    """The mean of tensors that come one at a time; the bits of the first while all are equal."""

    def __init__(self, first: Tensor) -> None:
        self._first: Tensor | None = first
        self._dtype, self._shape = first.dtype, first.shape
        self._sum: Tensor | None = None
        self._count = 1

    def add(self, x: Tensor, name: str) -> None:
        if x.shape != self._shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} on one rank, {tuple(self._shape)} on another"
            )
        if self._sum is None and self._first is not None and not torch.equal(self._first, x):
            wide = torch.complex128 if self._dtype.is_complex else torch.float64
            self._sum = self._first.to(wide) * self._count
            self._first = None
        if self._sum is not None:
            self._sum += x
        self._count += 1

    def value(self) -> Tensor:
        if self._sum is None:
            assert self._first is not None, "dropped only for a sum"
            return self._first
        return (self._sum / self._count).to(self._dtype)


def _opened(value: Any, key: str = "") -> Any:
    """``value`` with a mean begun for each tensor that is averaged."""
    if isinstance(value, Mapping):
        return {k: _opened(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_opened(v) for v in value]
    if isinstance(value, Tensor) and key != "step":
        return _Mean(value) if value.is_floating_point() or value.is_complex() else value
    return value


def _joined(ours: Any, theirs: Any, key: str = "") -> Any:
    """What `_opened` gave, with another rank's ``theirs``."""
    if ours is None:  # such as a momentum that rank 0 has no gradient for
        return _opened(theirs, key)
    if isinstance(ours, _Mean):
        if isinstance(theirs, Tensor):
            ours.add(theirs, str(key))
    elif isinstance(ours, dict) and isinstance(theirs, Mapping):
        for k, v in theirs.items():
            ours[k] = _joined(ours[k], v, k) if k in ours else _opened(v, k)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [_joined(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    elif key == "step":
        return max(ours, theirs)
    return ours


def _closed(value: Any) -> Any:
    """The tree with the means that `_opened` began."""
    if isinstance(value, _Mean):
        return value.value()
    if isinstance(value, dict):
        return {k: _closed(v) for k, v in value.items()}
    return [_closed(v) for v in value] if isinstance(value, list) else value


# A new round.


def _restart(model: dict[str, Any], own: dict[str, Any]) -> None:
    """Put the consensus into ``model``, and the rule and the replica at a round's start."""
    sync, replica = own["sync"], own["replica"]
    anchors = {name: sync["vectors"][name] for name in sync["anchors"]}
    unknown = {name for anchor in anchors.values() for name in anchor} - model.keys()
    if unknown:
        raise ValueError(
            f"the model has no {min(unknown)}, of which {own['rule']} keeps an anchor: build the "
            "optimizer with model= or with named parameters"
        )
    if sync["centre"] is not None:
        _move(model, anchors[sync["centre"]])
    for anchor in anchors.values():
        for name, z in anchor.items():
            # A centre of a wider type is what the weights were rounded from.
            if not torch.equal(z.to(model[name].dtype), model[name]):
                anchor[name] = model[name].to(z.dtype)
    sync["replicas_agree"] = True
    own["rank"] = None  # anybody's
    replica |= {"open": False, "remaining": 0, "start": 0}
    replica |= {"_rates": 0, "_losses": 0, "rate_sum": 0.0, "loss_sum": 0.0}
    replica |= {"report": None, "landed_report": None, "_square_spread": 0.0}
    replica["traffic"]["wait"] = []


def _move(model: dict[str, Any], centre: Mapping[str, Tensor]) -> None:
    """Put the centre in place of the mean, also under a tied parameter's other names."""
    means = {name: model[name] for name in centre}
    for name, tensor in model.items():
        home = name if name in means else _home(tensor, means)
        if home is not None:
            model[name] = centre[home].to(tensor.dtype)


def _home(tensor: Any, means: Mapping[str, Tensor]) -> str | None:
    """The parameter that a tensor of another name is tied to: one of the same values."""
    for name, mean in means.items():
        alike = isinstance(tensor, Tensor) and tensor.dtype == mean.dtype
        if alike and tensor.numel() and torch.equal(tensor, mean):
            return name
    return None
