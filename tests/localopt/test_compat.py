"""SDTL's published calls, on real processes, against its documented equations in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from localopt import CommOptimizer, DistOptimizer, LocalOptimizer
from localopt.saved import own_state
from tests.support.ranks import run

pytestmark = pytest.mark.slow

STEPS, H, P, C, RATE = 14, 3, 0.4, 0.5, 0.1
START = np.array([1.0, -2.0, 0.5])


def targets(m: int) -> np.ndarray:
    return np.random.default_rng(m).normal(size=(m, 3)) * 3


def gradient_step(p: nn.Parameter, target: np.ndarray) -> torch.Tensor:
    error = p.detach() - torch.as_tensor(target)
    p.grad = error.clone()
    return 0.5 * error @ error


def follow(rank: int, m: int, name: Any, manual: bool) -> tuple[np.ndarray, list[int]]:
    p = nn.Parameter(torch.as_tensor(START + rank))  # rank 0's start is everybody's
    inner = torch.optim.SGD([p], lr=RATE)
    optimizer = CommOptimizer(
        local_optimizer=inner, dist_optim_name=name, world_size=m, local_pulling_strength=P,
        dist_pulling_strength=C, comm_period=H,
    )  # fmt: skip
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.local_optimizer is inner
    xs, ends = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.record_loss(gradient_step(p, targets(m)[rank]))
        before = optimizer.round
        if manual:
            optimizer.local_optimizer.step()
            optimizer.local_pulling_step()
            optimizer.dist_train_step()
            if (step + 1) % H == 0:
                optimizer.comm_train_step()
        else:
            optimizer.step()
        if optimizer.round > before:
            ends.append(step + 1)
        xs.append(p.detach().numpy().copy())
    return np.stack(xs), ends


def easgd(m: int) -> np.ndarray:
    """x ← x - (p/H)(x - z) every step; every H-th x ← (1 - c/m) x + (c/m) z,
    z ← (1 - c) z + c x̄."""
    x, z, xs = np.tile(START, (m, 1)), START, []
    for step in range(1, STEPS + 1):
        x = x - RATE * (x - targets(m))
        x = x - P / H * (x - z)
        if step % H == 0:
            x, z = (1 - C / m) * x + C / m * z, (1 - C) * z + C * x.mean(axis=0)
        xs.append(x)
    return np.stack(xs)


def lsgd(m: int) -> np.ndarray:
    x, leader, xs, losses = np.tile(START, (m, 1)), START, [], np.zeros(m)
    for step in range(1, STEPS + 1):
        losses = losses + 0.5 * ((x - targets(m)) ** 2).sum(axis=1)
        x = x - RATE * (x - targets(m))
        x = x - P / H * (x - leader)
        if step % H == 0:
            leader, losses = x[losses.argmin()], np.zeros(m)
            x = (1 - C) * x + C * leader
        xs.append(x)
    return np.stack(xs)


def alone(m: int) -> np.ndarray:
    x, xs = np.tile(START, (m, 1)), []
    for _ in range(STEPS):
        x = x - RATE * (x - targets(m))
        xs.append(x)
    return np.stack(xs)


@pytest.mark.parametrize("manual", [False, True], ids=["step", "each call by hand"])
@pytest.mark.parametrize(
    ("name", "oracle"),
    [("EASGD", easgd), ("LSGD", lsgd), (None, alone)],
    ids=["EASGD", "LSGD", "None"],
)
def test_published_equations(name: str | None, oracle: Any, manual: bool) -> None:
    """With c, p and H as published, and "exactly every H steps"."""
    for m in (1, 2):
        expected = oracle(m)
        for rank, (xs, ends) in enumerate(run(follow, m, name, manual)):
            assert ends == [3, 6, 9, 12]
            np.testing.assert_allclose(xs, expected[:, rank], rtol=1e-12, atol=1e-13)


class Midpoint(DistOptimizer):
    """z ← x̄, then x ← (x + z)/2; counts its hooks."""

    trained = 0

    def dist_train_step(self) -> None:
        self.trained += 1

    def comm_train_step(self) -> None:
        for center, mean in zip(self.center, self.mean(), strict=True):
            center.copy_(mean)
        self.pull(self.center, 0.5)


def own_rule(rank: int, m: int) -> list[float]:
    p = nn.Parameter(torch.full((4,), 8.0))
    optimizer = CommOptimizer(
        torch.optim.SGD([p], lr=1.0), Midpoint, local_pulling_strength=0.5, comm_period=2
    )
    seen = []
    for _ in range(4):
        p.grad = torch.full((4,), 1.0 + rank)
        optimizer.step()
        seen.append(float(p.detach()[0]))
    assert optimizer.dist_optimizer.trained == 4
    state = own_state(optimizer.state_dict())["sync"]["vectors"]["center"]
    assert [float(v[0]) for v in state.values()] == [float(optimizer.dist_optimizer.center[0][0])]
    optimizer.finish()
    seen.append(float(p.detach()[0]))
    return seen


def test_a_rule_of_ones_own() -> None:
    """A subclass of DistOptimizer: its pull, its hooks in their order, its center saved."""
    x, z, expected = np.array([8.0, 8.0]), 8.0, []
    for step in range(1, 5):
        x = x - np.array([1.0, 2.0])
        x = x - 0.25 * (x - z)
        if step % 2 == 0:
            z = x.mean()
            x = (x + z) / 2
        expected.append(x)
    expected.append(np.full(2, x.mean()))
    assert np.allclose(np.array(run(own_rule, 2)).T, expected, rtol=1e-6)


def refusals(rank: int, m: int) -> None:
    def make(name: Any, **settings: Any) -> LocalOptimizer:
        return CommOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1), name, **settings)

    for name in ("EASGD+", "none", LocalOptimizer):
        with pytest.raises(ValueError, match="must be 'EASGD', 'LSGD', None or a subclass"):
            make(name)
    with pytest.raises(ValueError, match="world_size is 3: the process group has 2 replicas"):
        make("EASGD", world_size=3)
    with pytest.raises(ValueError, match="alpha is"):
        make("EASGD", dist_pulling_strength=1.5)
    optimizer = make("LSGD", comm_period=5)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=f"LSGD needs .* step 1 on rank {rank} has none"):
        optimizer.step()
    optimizer = make("LSGD", comm_period=1)
    optimizer.step(lambda: torch.tensor(0.5))


def test_refusals() -> None:
    """Unknown names, another number of replicas, unstable strengths, and LSGD without a loss."""
    run(refusals, 2)
