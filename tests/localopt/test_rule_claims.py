"""What a rule's docstring says is the same as another rule, or as training alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from localopt import (
    BMUF,
    EASGD,
    LSGD,
    Average,
    BlockMomentum,
    Constant,
    DiLoCo,
    HierarchicalAverage,
    LocalOptimizer,
    OverlapLocalSGD,
    Rule,
    SlowMo,
    Streaming,
)
from tests.support import oracle
from tests.support.one_parameter import FLAT, trajectory
from tests.support.ranks import run

pytestmark = pytest.mark.slow

Array = oracle.Array
M = 4


# What is claimed to be the same: two rules, how they are run, and whether to the last bit.
Pair = tuple[Callable[[], Rule], Callable[[], Rule] | None, dict[str, Any], bool]
SAME: dict[str, Pair] = {
    "block momentum with η = 0 and ζ = 1 is averaging": (
        lambda: BlockMomentum(partial(torch.optim.SGD, lr=1.0)), Average, {}, False
    ),
    "BMUF with momentum 0 is averaging": (lambda: BMUF(0.0), Average, {}, False),
    "SlowMo at a constant rate is BMUF's delta form": (
        lambda: SlowMo(0.6), lambda: BMUF(0.6), {"rates": FLAT}, False
    ),
    "so it is with a slow rate": (
        lambda: SlowMo(0.6, 0.8), lambda: BMUF(0.6, 0.8), {"rates": FLAT}, False
    ),
    "DiLoCo without momentum and with rate 1 is averaging": (
        lambda: DiLoCo(1.0, 0.0), Average, {}, False
    ),
    "DiLoCo is BMUF with Nesterov momentum": (
        lambda: DiLoCo(0.7, 0.9), lambda: BMUF(0.9, 0.7, nesterov=True), {}, False
    ),
    "BMUF's default momentum is 1 - 1/m": (BMUF, lambda: BMUF(1 - 1 / M), {}, True),
    "so it is with Nesterov momentum": (
        lambda: BMUF(nesterov=True), lambda: BMUF(1 - 1 / M, nesterov=True), {}, True
    ),
    "EASGD overlapped is blocking, bit for bit": (
        EASGD, lambda: EASGD(overlap=False), {}, True
    ),
    "so it is in float32, with other strengths": (
        lambda: EASGD(0.3, 0.8), lambda: EASGD(0.3, 0.8, overlap=False),
        {"dtype": torch.float32}, True,
    ),
    "Overlap's momentum by rates is the same at a constant rate": (
        OverlapLocalSGD, lambda: OverlapLocalSGD(normalize_by_lr=True), {"rates": FLAT}, False
    ),
    "Overlap with α = 0 is independent replicas": (
        lambda: OverlapLocalSGD(alpha=0.0), None, {}, True
    ),
    "so it is with AdamW in float32": (
        lambda: OverlapLocalSGD(alpha=0.0), None,
        {"inner": torch.optim.AdamW, "dtype": torch.float32}, True,
    ),
    "hierarchical averaging of all every time is averaging": (
        lambda: HierarchicalAverage(2, 1), Average, {}, False
    ),
    "so it is in one group": (lambda: HierarchicalAverage(M, 3), Average, {}, False),
    "so it is in groups of one": (lambda: HierarchicalAverage(1, 1), Average, {}, False),
    "streaming one fragment is DiLoCo": (
        lambda: Streaming(1, 0.7, 0.9), lambda: DiLoCo(0.7, 0.9), {}, False
    ),
    "without momentum and with rate 1 it is averaging": (lambda: Streaming(1), Average, {}, False),
    "streaming any number of fragments at every step is DiLoCo at every step": (
        lambda: Streaming(3, 0.7, 0.5), lambda: DiLoCo(0.7, 0.5), {"period": Constant(1)}, False
    ),
    "leaders of groups of one, and of all every time, are leaders of all": (
        lambda: LSGD(1.0, 0.0, group_size=1, c_global=0.3, p_global=0.2, global_every=1),
        lambda: LSGD(0.3, 0.2), {}, False,
    ),
}  # fmt: skip


def all_pairs(rank: int, m: int, problem: oracle.Quadratics) -> dict[str, tuple[Array, Array]]:
    return {
        claim: (
            trajectory(rank, problem, one(), **options),
            trajectory(rank, problem, other() if other else None, **options),
        )
        for claim, (one, other, options, _) in SAME.items()
    }


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, tuple[Array, Array]]]:
    return run(all_pairs, M, oracle.Quadratics.make(M, 20))


@pytest.mark.parametrize("claim", SAME)
def test_is_the_same(claim: str, pairs: list[dict[str, tuple[Array, Array]]]) -> None:
    exactly = SAME[claim][-1]
    for seen in pairs:
        one, other = seen[claim]
        one = one[: len(other)]  # a bare optimizer has no finish()
        if exactly:
            assert np.array_equal(one, other)
        else:
            assert np.linalg.norm(one - other) < 1e-12 * np.linalg.norm(other)


def heuristic(rank: int, m: int) -> list[float]:
    seen = []
    for rule in (
        BMUF(),
        BMUF(nesterov=True),
        BlockMomentum(partial(torch.optim.SGD, lr=1.0, momentum=0.1), heuristic_momentum=True),
        BMUF(0.3),
    ):
        p = nn.Parameter(torch.zeros(3))
        optimizer = LocalOptimizer(torch.optim.SGD([p], 0.1), Constant(1), rule)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        groups = rule.outer_optimizer.param_groups
        assert sum(len(group["params"]) for group in groups) == 2
        seen += [group["momentum"] for group in groups]
    return seen


@pytest.mark.parametrize("m", [1, 4])
def test_heuristic_momentum(m: int) -> None:
    """"set the outer momentum to 1 - 1/m, for m replicas"; also for what is added later."""
    ranks = run(heuristic, m) if m > 1 else [heuristic(0, 1)]
    for seen in ranks:
        assert seen == [1 - 1 / m] * 6 + [0.3] * 2
