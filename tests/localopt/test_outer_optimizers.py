"""Block momentum on one replica: the inner step's change is the outer optimizer's gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from localopt import (
    BMUF,
    BlockMomentum,
    Constant,
    DiLoCo,
    LocalOptimizer,
    LocalSGD,
    Rule,
    SlowMo,
)
from tests.support import oracle


def outer_against(
    rule: Rule, outer: Callable[[Any], torch.optim.Optimizer], steps: int = 60
) -> None:
    """One replica, H = 1, inner SGD with rate 1: z - x̄ is the gradient, so the rule is ``outer``
    trained directly; a reversed sign would climb."""
    problem = oracle.Quadratics.make(1, 12)
    a, b = torch.as_tensor(problem.a[0]), torch.as_tensor(problem.b[0])
    ours, theirs = (nn.Parameter(torch.tensor(problem.x0)) for _ in range(2))
    optimizer = LocalOptimizer(torch.optim.SGD([ours], 1.0), Constant(1), rule)
    direct = outer([theirs])
    for _ in range(steps):
        for p, stepped in ((ours, optimizer), (theirs, direct)):
            p.grad = a @ (p.detach() - b)
            stepped.step()
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    start = torch.as_tensor(problem.x0) - b
    assert (ours - b) @ a @ (ours - b) < 0.5 * start @ a @ start


@pytest.mark.parametrize("nesterov", [False, True])
def test_diloco_and_bmuf_are_sgd_on_the_pseudo_gradient(nesterov: bool) -> None:
    """"Step with an outer optimizer on the pseudo-gradient Δ = z - x̄": the sign descends."""
    outer = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=nesterov)
    outer_against(BlockMomentum(outer), outer)
    outer_against(BMUF(0.9, 0.7, nesterov), outer)
    if nesterov:
        outer_against(DiLoCo(), outer)


def test_any_outer_optimizer() -> None:
    """The outer optimizer is whatever ``outer`` makes."""
    for make in (
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.AdamW, lr=0.1, amsgrad=True),
        partial(torch.optim.RMSprop, lr=0.02),
        partial(torch.optim.Adagrad, lr=0.2),
    ):
        outer_against(BlockMomentum(make), make)


def test_bmuf_by_hand() -> None:
    """"v ← η v + ζ (x̄ - z);  z ← z + v, or with Nesterov momentum z ← z + ζ (x̄ - z) + η v". Every
    round moves x̄ by 1, with η = 1/2 and ζ = 1."""
    moved = {}
    for nesterov in (False, True):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        rule = BMUF(0.5, nesterov=nesterov)
        optimizer = LocalOptimizer(torch.optim.SGD([p], 0.25), Constant(4), rule)
        seen = []
        for _ in range(12):
            p.grad = -torch.ones_like(p)
            optimizer.step()
            if optimizer.synced:
                seen.append(p[0].item())
        moved[nesterov] = seen
    # v = 1, 1.5, 1.75.
    assert moved[False] == [1.0, 2.5, 4.25]
    assert moved[True] == [1.5, 3.25, 5.125]


def test_slowmo_by_hand() -> None:
    """γ is the mean rate of the round: v ← v/2 + (z - x̄)/γ, z ← z - γv, rates 0.1 and 0.3, then
    0.2 and 0.6. In units of gradients each round moves by 2: v = -2, -3."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = LocalOptimizer(torch.optim.SGD([p], 1.0), Constant(2), SlowMo(0.5))
    seen = []
    for rate in (0.1, 0.3, 0.2, 0.6):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = -torch.ones_like(p)
        optimizer.step()
        seen.append(p[0].item())
    assert seen[1] == pytest.approx(0.2 * 2)
    assert seen[3] == pytest.approx(0.4 + 0.4 * (0.5 * 2 + 2))


def test_a_step_that_failed_has_no_rate() -> None:
    """γ is the mean over the steps that were made."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = LocalSGD([p], 0.5, period=Constant(3), sync=SlowMo(beta=0.5))

    def fails() -> float:
        raise KeyError("no batch")

    p.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 100.0
    with pytest.raises(KeyError):
        optimizer.step(fails)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert optimizer._replica.round.lr == 0.375
