"""Every rule on a GPU does what its oracle does, through gloo and through NCCL.

Two replicas share one card. Small parameters show the mathematics; large ones, whose collectives
take a while, whether what runs behind training is waited for on the right stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from localopt import LocalOptimizer
from tests.gpu.links import GPU_LINKS
from tests.localopt.test_contract import check, follow
from tests.support import oracle
from tests.support.contract import LRS, PERIODS, SIZE, every_rule, new_rule
from tests.support.ranks import run

pytestmark = pytest.mark.slow
# Rules that send behind training, and one that does not.
STREAMED = ("Average", "CoCoDSGD", "EASGD", "OverlapLocalSGD")
NUMBERS = 2**23


@pytest.mark.parametrize("link", GPU_LINKS)
@every_rule
def test_matches_its_oracle_on_a_gpu(name: str, link: str) -> None:
    problem = oracle.Quadratics.make(2, SIZE, seed=2)
    check(run(follow, 2, name, problem, "cuda", on=link), name, problem)


def plain_cases(name: str) -> list[int]:
    """Those that send numbers as they are."""
    return [i for i, case in enumerate(oracle.CASES[name]) if not case.coarse]


def many_alike(
    rank: int, m: int, name: str, problem: oracle.Quadratics, device: str, numbers: int
) -> dict[int, tuple[list[float], list[float]]]:
    """A problem of one number, ``numbers`` times over: by case, the least and largest after each
    step."""
    a, b = float(problem.a[rank, 0, 0]), float(problem.b[rank, 0])
    seen = {}
    for index in plain_cases(name):
        start = float(problem.x0[0])
        p = nn.Parameter(torch.full((numbers,), start, dtype=torch.float64, device=device))
        inner = oracle.CASES[name][index].inners[0]
        settings = oracle.INNERS[inner][1]
        optimizer = LocalOptimizer(
            getattr(torch.optim, inner)([p], lr=LRS[0], **settings),
            PERIODS["constant"][0],
            new_rule(name, index),
        )
        bounds: list[torch.Tensor] = []
        for step, lr in enumerate(LRS):
            error = p.detach() - b
            p.grad = a * error
            optimizer.param_groups[0]["lr"] = lr
            noise = problem.noise[step % len(problem.noise), rank]
            optimizer.record_loss(0.5 * a * error[0] ** 2 + noise)
            optimizer.step()
            bounds.append(torch.stack(p.detach().aminmax()))  # read at the end: nothing waits
        optimizer.finish()
        least, largest = torch.stack(bounds).cpu().T
        seen[index] = least.tolist(), largest.tolist()
    return seen


@pytest.mark.parametrize("link", ["cpu", *GPU_LINKS])
@pytest.mark.parametrize("name", STREAMED)
def test_what_runs_behind_training_is_waited_for(name: str, link: str) -> None:
    """Every one of many numbers takes the path of the one that it is a copy of."""
    problem = oracle.Quadratics.make(2, 1, seed=5)
    where = ("cpu", 5000) if link == "cpu" else ("cuda", NUMBERS)
    ranks: list[Any] = run(many_alike, 2, name, problem, *where, on=link)
    for index in plain_cases(name):
        case = oracle.CASES[name][index]
        expected = oracle.simulate(case, case.inners[0], PERIODS["constant"][1], problem, LRS)
        for rank, seen in enumerate(ranks):
            for bound in seen[index]:
                np.testing.assert_allclose(bound, expected.x[:, rank, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("link", GPU_LINKS)
def test_fragments_that_run_behind_training_are_waited_for(link: str) -> None:
    """As on CPUs, where every fragment has its own times."""
    problem = oracle.Quadratics.make(2, 1, seed=5)
    expected = run(many_alike, 2, "Streaming", problem, "cpu", NUMBERS)
    ranks: list[Any] = run(many_alike, 2, "Streaming", problem, "cuda", NUMBERS, on=link)
    for seen, on_cpu in zip(ranks, expected, strict=True):
        for index in seen:
            np.testing.assert_allclose(seen[index], on_cpu[index], rtol=1e-9, atol=1e-12)
