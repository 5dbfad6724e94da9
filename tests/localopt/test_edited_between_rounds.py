"""Weights that one rank changes between rounds, where all replicas had been equal."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from localopt import (
    EASGD,
    Average,
    Constant,
    DiLoCo,
    HierarchicalAverage,
    LocalOptimizer,
    LocalSGD,
    ReplicaMismatchError,
    Rule,
)
from tests.support.ranks import run

pytestmark = pytest.mark.slow

RULES: dict[str, Callable[[], Rule]] = {
    "Average": Average,
    "compressed": lambda: Average(compress="bf16"),
    "DiLoCo": DiLoCo,
    "hierarchical": lambda: HierarchicalAverage(2, 1),
}


def built(rule: Rule, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, LocalOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 65), nn.BatchNorm1d(65), nn.Linear(65, 3)).to(dtype)
    return model, LocalSGD(model.parameters(), 0.1, period=Constant(2), sync=rule, model=model)


def train(model: nn.Module, optimizer: LocalOptimizer, rank: int, steps: int) -> None:
    torch.manual_seed(rank + 1)
    for _ in range(steps):
        x = torch.randn(8, 9).to(next(model.parameters()))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    model[2].weight.add_(0.5)


def through_data(model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data.mul_(1.5)


def one_bias(model: nn.Module) -> None:
    model[0].bias.data.copy_(torch.ones(65))


def all_loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v + v.dtype.is_floating_point for k, v in model.state_dict().items()})


EDITS = [in_place, through_data, one_bias, all_loaded]


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def edited(rank: int, m: int, name: str, dtype: torch.dtype) -> list[str]:
    told = []
    for edit in EDITS:
        model, optimizer = built(RULES[name](), dtype)
        train(model, optimizer, rank, 4)
        if rank == 1:
            edit(model)
        before = weights(model)
        with pytest.raises(ReplicaMismatchError) as caught, optimizer.consensus():
            pass
        told.append(str(caught.value))
        assert all(map(torch.equal, before, weights(model))), edit
        with pytest.raises(ReplicaMismatchError) as caught:
            train(model, optimizer, rank, 2)
        told.append(str(caught.value))
    return told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_the_edit_of_one_rank_is_named_on_all(name: str, dtype: torch.dtype) -> None:
    """By consensus() at once, and by the next synchronisation; both leave weights alone."""
    zero, one = run(edited, 2, name, dtype)
    assert zero == one and len(zero) == 2 * len(EDITS)
    assert all("different weights at step 4, where all should be equal" in t for t in zero[::2])
    assert all("rank 0 and rank 1 differed at the start of the round" in t for t in zero[1::2])


def allowed(rank: int, m: int) -> None:
    warnings.simplefilter("error")
    for name, rule in {**RULES, "EASGD": EASGD}.items():
        model, optimizer = built(rule())
        with torch.no_grad():
            model[0].weight.add_(float(rank) if name == "Average" else 0.0)  # per-replica weights
        for _ in range(3):
            train(model, optimizer, rank, 2)
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.05, 0.05)  # on all ranks alike
        with optimizer.consensus():
            pass
        state = optimizer.state_dict()
        train(model, optimizer, rank, 1)
        with torch.no_grad():
            model[2].bias.add_(rank)  # in mid-round replicas differ anyway
        train(model, optimizer, rank, 1)
        if name == "EASGD":
            with torch.no_grad():
                model[2].bias.add_(rank)  # its replicas never agree
        optimizer.load_state_dict(state)
        optimizer.finish()
        more = nn.Parameter(torch.full((4,), float(rank)))
        optimizer.add_param_group({"params": [more]})
        train(model, optimizer, rank, 4)
        optimizer.finish()


def test_no_false_alarm() -> None:
    run(allowed, 2)
