"""Training on quadratics: one parameter, a gradient of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from localopt import Constant, LocalOptimizer, Rule
from tests.support import oracle

STEPS = 22
DECAY = [0.1 * 0.95**step for step in range(STEPS)]
FLAT = [0.1] * STEPS


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, momentum=0.9, weight_decay=0.01)


def trajectory(
    rank: int,
    problem: oracle.Quadratics,
    rule: Rule | None,
    *,
    period: Any = None,
    rates: list[float] = DECAY,
    inner: Callable[[Any], torch.optim.Optimizer] = sgd,
    dtype: torch.dtype = torch.float64,
) -> oracle.Array:
    """Parameters after every step, (steps, d), and after finish(); without a rule, those of the
    bare inner optimizer."""
    p = nn.Parameter(torch.tensor(problem.x0, dtype=dtype))
    optimizer = inner([p])
    if rule is not None:
        optimizer = LocalOptimizer(optimizer, period or Constant(4), rule)
    a, b = (torch.as_tensor(x[rank]).to(dtype) for x in (problem.a, problem.b))
    xs = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = a @ (p.detach() - b)
        if rule is not None:
            optimizer.record_loss(0.5 * (p.detach() - b) @ p.grad + problem.noise[step, rank])
        optimizer.step()
        xs.append(p.detach().double().numpy().copy())
    if rule is not None:
        optimizer.finish()
        xs.append(p.detach().double().numpy().copy())
    return np.stack(xs)
