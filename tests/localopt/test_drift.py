"""How far replicas are apart at a round's end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from localopt import Constant, LocalSGD
from tests.support import oracle
from tests.support.ranks import run

pytestmark = pytest.mark.slow

RATE = 0.05


def drifting(rank: int, m: int, problem: oracle.Quadratics) -> list[float]:
    low = nn.Parameter(torch.as_tensor(problem.x0[:7]))
    rest = nn.Parameter(torch.as_tensor(problem.x0[7:]).float())
    drifts = []
    optimizer = LocalSGD([low, rest], RATE, period=Constant(2), track_drift=True)
    assert optimizer.drift is None
    for step in range(8):
        for p, part in ((low, slice(0, 7)), (rest, slice(7, None))):
            p.grad = torch.as_tensor(problem.b[rank, part] * 2.0 ** -(step // 2)).to(p.dtype)
        optimizer.step()
        if optimizer.synced:
            drifts.append(optimizer.drift)
    return drifts


def test_drift() -> None:
    """"sqrt((1/m) Σ_i |x_i - x̄|²)"; exactly known here, for gradients do not depend on x."""
    m = 4
    problem = oracle.Quadratics.make(m, 20)
    moved = [-RATE * 2 * problem.b * 2.0**-k for k in range(4)]
    expected = [np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()) for x in moved]
    for drifts in run(drifting, m, problem):
        assert drifts == pytest.approx(expected, rel=1e-4)  # part of it in float32


def drifting_double(rank: int, m: int, problem: oracle.Quadratics) -> tuple[float, float]:
    p = nn.Parameter(torch.as_tensor(problem.x0))
    optimizer = LocalSGD([p], 1.0, period=Constant(1), track_drift=True)
    p.grad = torch.as_tensor(problem.b[rank])
    optimizer.step()
    first = optimizer.drift
    p.grad = torch.full_like(p, float("nan") if rank else 0.0)
    blind = LocalSGD([p], 1.0, period=Constant(1), track_drift=True, check_finite=False)
    blind.step()
    return first, blind.drift


def test_drift_in_float64() -> None:
    """In float64 to 1e-8; NaN parameters give NaN, never 0."""
    problem = oracle.Quadratics.make(2, 20)
    expected = np.sqrt(((problem.b - problem.b.mean(0)) ** 2).sum(1).mean())
    for first, blind in run(drifting_double, 2, problem):
        assert first == pytest.approx(expected, rel=1e-8)
        assert np.isnan(blind)
