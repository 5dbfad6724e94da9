"""PostLocal and SWAP beside torch's post-local SGD: what the docstring of PostLocal says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

from localopt import SWAP, LocalOptimizer, Period, PostLocal
from tests.support.ranks import run
from tests.support.small_network import vector

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
    from torch.distributed.optim import PostLocalSGDOptimizer

pytestmark = pytest.mark.slow

SWITCH, H, STEPS = 4, 3, 11  # two rounds of H, and a step into the third

INNERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01),
}
# The period, and the length of its rounds after the switch.
PERIODS: dict[str, tuple[Period, int]] = {
    "post-local": (PostLocal(SWITCH, H), H),
    "swap": (SWAP(SWITCH, total_steps=STEPS), STEPS - SWITCH),
}

every_inner = pytest.mark.parametrize("inner", INNERS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def backward(model: nn.Module, step: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64) + rank  # (B, 4)
    (model(x) - x[:, :2] * (1 + rank)).square().mean().backward()


def documented(
    rank: int, m: int, inner: str, period: str, averaged: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loop of the docstring: weights after every step, optimizer state at the switch."""
    model = network()
    made = INNERS[inner](model.parameters())
    optimizer = LocalOptimizer(made, PERIODS[period][0], model=model)
    seen, state = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step, rank)
        if averaged and step < SWITCH:
            for p in model.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                    p.grad /= dist.get_world_size()
        optimizer.step()
        seen.append(vector(model))
        if step + 1 == SWITCH:
            state = [t.clone() for fields in optimizer.state.values() for t in fields.values()]
    return torch.stack(seen), state


def by_torch(rank: int, m: int, inner: str, period: str) -> Tensor:
    """Weights after every step, (STEPS, d)."""
    model = network()
    wrapped = DistributedDataParallel(model)
    hooked = PostLocalSGDState(None, None, SWITCH, post_local_gradient_allreduce=False)
    wrapped.register_comm_hook(hooked, post_localSGD_hook)
    h = PERIODS[period][1]
    # Counting from 0, it averages first after step warmup_steps, `PostLocal` after SWITCH + h - 1.
    averager = PeriodicModelAverager(period=h, warmup_steps=SWITCH + h - 1)
    optimizer = PostLocalSGDOptimizer(INNERS[inner](model.parameters()), averager)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(wrapped, step, rank)
        optimizer.step()
        seen.append(vector(model))
    return torch.stack(seen)


def both(
    rank: int, m: int, inner: str, period: str, averaged: bool
) -> tuple[list[float], Tensor, list[Tensor]]:
    """How far the weights are from torch's after every step, relative to how far these moved."""
    ours, state = documented(rank, m, inner, period, averaged)
    theirs = by_torch(rank, m, inner, period)
    moved = (theirs - vector(network())).norm(dim=1)
    return ((ours - theirs).norm(dim=1) / moved).tolist(), ours, state


@every_inner
@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("m", [2, 3])
def test_with_averaged_gradients_it_is_torchs(m: int, period: str, inner: str) -> None:
    """After every step, also within rounds; "equal weights and equal optimizer state"."""
    ranks = run(both, m, inner, period, True)
    _, first, common = ranks[0]
    for errors, weights, state in ranks:
        assert max(errors) < 1e-12, errors
        assert torch.equal(weights[SWITCH - 1], first[SWITCH - 1])
        assert common and all(map(torch.equal, state, common))
    assert not torch.allclose(ranks[1][1][SWITCH], first[SWITCH]), "replicas part afterwards"


@every_inner
@pytest.mark.parametrize("period", PERIODS)
def test_without_it_is_another_method(period: str, inner: str) -> None:
    """The same up to the switch with SGD only; not after it, also where replicas are equal."""
    ranks = run(both, 2, inner, period, False)
    for errors, _, _ in ranks:
        if inner == "sgd":
            assert max(errors[:SWITCH]) < 1e-12, errors
        else:
            assert min(errors[:SWITCH]) > 1e-4, errors
        assert min(errors[SWITCH:]) > 1e-4, errors
    assert not all(map(torch.allclose, ranks[0][2], ranks[1][2])), "a momentum of its own"
