"""What each rule's docstring claims: degenerate cases, refusals, and what overlaps.

That a rule follows its equation is `test_contract.py`'s; that the equations there are the published
ones is tested here first, in NumPy, in the form of mixing matrices.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from localopt import (
    BMUF,
    EASGD,
    LSGD,
    Average,
    BlockMomentum,
    CoCoDSGD,
    Constant,
    DiLoCo,
    HierarchicalAverage,
    LocalOptimizer,
    NonFiniteError,
    OverlapLocalSGD,
    PostLocal,
    Rule,
    SlowMo,
)
from tests.dist import oracle, test_contract
from tests.dist.ranks import outcomes_of, run

Array = oracle.Array


# The oracles, against the mixing matrices of the papers.

M, D = 4, 6
RNG = np.random.default_rng(0)
ROUNDS = RNG.normal(size=(5, M, D))  # what the local steps of each round add, x-independent
LOSSES = RNG.normal(size=(5, M))
MEAN = np.full((M, M), 1 / M)
ONE, COLUMN = np.ones((1, M)), np.ones((M, 1))


def rounds_of(kind: type[oracle.RuleOracle], **settings: Any) -> tuple[Array, oracle.RuleOracle]:
    """The replicas after each of the rounds, (rounds, m, d)."""
    rule = kind(np.zeros(D), M, oracle.Sgd(), **settings)
    x, after = np.zeros((M, D)), []
    for k, moved in enumerate(ROUNDS):
        this = oracle.Round(k, 1, [0.5 ** (k % 2)], [LOSSES[k]])
        x = rule.after_step(x + moved, this)
        x = rule.end_round(x, this)
        after.append(x)
    return np.stack(after), rule


def by_matrices(state: Array, mix: Callable[[int], Array]) -> Array:
    """state ← W_k (state + moves of the replicas), the replicas first among its rows."""
    after = []
    for k, moved in enumerate(ROUNDS):
        state = mix(k) @ (state + np.pad(moved, ((0, len(state) - M), (0, 0))))
        after.append(state[:M])
    return np.stack(after)


def test_oracle_of_easgd() -> None:
    """Rows x_1 … x_m, z: W is symmetric and doubly stochastic where β = mα (elastic symmetry)."""
    alpha, beta, pull = 0.2, 0.7, 0.3

    def mixing(a: float, b: float) -> Array:
        return np.block([[(1 - a) * np.eye(M), a * COLUMN], [b / M * ONE, np.eye(1) * (1 - b)]])

    pulled = np.block([[(1 - pull) * np.eye(M), pull * COLUMN], [0 * ONE, np.eye(1)]])
    start = np.zeros((M + 1, D))
    for settings, w in (
        ({}, mixing(0.9 / M, 0.9)),
        ({"alpha": alpha}, mixing(alpha, M * alpha)),
        ({"alpha": alpha, "beta": beta}, mixing(alpha, beta)),
        ({"alpha": alpha, "beta": beta, "pull": pull}, mixing(alpha, beta) @ pulled),
    ):
        expected = by_matrices(start, lambda k, w=w: w)
        assert np.allclose(rounds_of(oracle.Easgd, **settings)[0], expected, rtol=0, atol=1e-13)
    for w in (mixing(0.9 / M, 0.9), mixing(alpha, M * alpha)):
        assert np.allclose(w, w.T) and np.allclose(w.sum(axis=0), 1)


def test_oracle_of_overlap() -> None:
    """Rows x_1 … x_m, z, v, and the z and v of one boundary later, which are in flight."""
    alpha, beta = 0.6, 0.7
    eye, nil = np.eye(1), np.zeros((1, 1))
    no, pulled = np.zeros((1, M)), np.block([(1 - alpha) * np.eye(M), alpha * COLUMN])
    # First x_i ← (1 - α)x_i + αz with the z that has arrived, then v' and z' from their mean.
    pull = np.block([[pulled, 0 * COLUMN], [no, eye, nil], [no, nil, eye]])
    land = np.block([
        [np.eye(M), 0 * COLUMN, 0 * COLUMN],
        [ONE / M, nil, beta * eye],
        [ONE / M, -eye, beta * eye],
    ])  # fmt: skip
    expected = by_matrices(np.zeros((M + 2, D)), lambda k: land @ pull)
    actual, _ = rounds_of(oracle.Overlap, alpha=alpha, beta=beta)
    assert np.allclose(actual, expected, rtol=0, atol=1e-13)
    # Normalised, v is in units of the rate of the round that was launched.
    expected_z, v, x = np.zeros(D), np.zeros(D), np.zeros((M, D))
    for k, moved in enumerate(ROUNDS):
        x = 0.4 * (x + moved) + 0.6 * expected_z
        gamma = 0.5 ** (k % 2)
        v = 0.7 * v + (expected_z - x.mean(axis=0)) / gamma
        expected_z = expected_z - gamma * v
    actual, _ = rounds_of(oracle.Overlap, normalize_by_lr=True)
    assert np.allclose(actual[-1], x, rtol=0, atol=1e-13)


def test_oracle_of_cocod() -> None:
    """Rows x_1 … x_m, s_1 … s_m: x ← x + (J - I)s, s ← x."""
    mix = np.block([[np.eye(M), MEAN - np.eye(M)]] * 2)
    expected = by_matrices(np.zeros((2 * M, D)), lambda k: mix)
    assert np.allclose(rounds_of(oracle.CoCoD)[0], expected, rtol=0, atol=1e-13)


def test_oracles_of_block_momentum() -> None:
    """Rows x_1 … x_m, z, v as companion matrices: v' = ηv + ζ(Jx - z), z' = z + v', x' = z'."""
    eta, zeta = 0.6, 0.8
    eye = np.eye(1)
    change = np.block([zeta * ONE / M, -zeta * eye, eta * eye])  # v'
    stay = np.block([0 * ONE, eye, 0 * eye])

    def companion(look: Array) -> Callable[[int], Array]:
        return lambda k: np.vstack([COLUMN @ look, look, change])

    nesterov = stay + np.block([zeta * ONE / M, -zeta * eye, 0 * eye]) + eta * change
    start = np.zeros((M + 2, D))
    for kind, settings, look in (
        (oracle.Bmuf, {"momentum": eta, "lr": zeta}, stay + change),
        (oracle.Bmuf, {"momentum": eta, "lr": zeta, "nesterov": True}, nesterov),
        (oracle.DiLoCo, {"momentum": eta, "lr": zeta}, nesterov),
    ):
        expected = by_matrices(start, companion(look))
        assert np.allclose(rounds_of(kind, **settings)[0], expected, rtol=0, atol=1e-13), kind
    # SlowMo's v is minus that, in units of the rate γ: here γ halves and doubles.
    z, u = np.zeros(D), np.zeros(D)
    for k, moved in enumerate(ROUNDS):
        gamma = 0.5 ** (k % 2)
        u = eta * u - moved.mean(axis=0) / gamma
        z = z - zeta * gamma * u
    actual, _ = rounds_of(oracle.SlowMo, beta=eta, lr=zeta)
    assert np.allclose(actual[-1], z, rtol=0, atol=1e-13)


def test_oracle_of_an_outer_adam() -> None:
    settings = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3}
    p = nn.Parameter(torch.zeros(D, dtype=torch.float64))
    adam = torch.optim.Adam([p], **settings)
    for moved in ROUNDS:
        p.grad = -torch.as_tensor(moved.mean(axis=0))
        adam.step()
    actual, _ = rounds_of(oracle.OuterAdam, **settings)
    assert np.allclose(actual[-1], p.detach().numpy(), rtol=0, atol=1e-13)


def test_oracle_of_leaders() -> None:
    """Rows x_1 … x_m, group leaders, leader of all: selection matrices, pulls first."""
    c, p, c_all, p_all, every = 0.3, 0.4, 0.2, 0.5, 2
    eye = np.eye(M)
    groups = np.kron(np.eye(M // 2), np.ones((2, 1)))  # (m, groups)

    def mix(k: int) -> Array:
        pick, best = np.zeros((M // 2, M)), np.zeros((1, M))
        for group in range(M // 2):
            pick[group, 2 * group + np.argmin(LOSSES[k, 2 * group : 2 * group + 2])] = 1
        best[0, np.argmin(LOSSES[k])] = 1
        rest = np.eye(M // 2 + 1)
        to_all = np.block([(1 - p_all / every) * eye, 0 * groups, p_all / every * COLUMN])
        to_group = np.block([(1 - p) * eye, p * groups, 0 * COLUMN])
        stay = np.block([np.zeros((M // 2 + 1, M)), rest])
        pulled = np.vstack([to_group, stay]) @ np.vstack([to_all, stay])
        follow = (1 - c) * eye + c * groups @ pick
        lead = np.block([
            [follow, 0 * groups, 0 * COLUMN],
            [pick, np.zeros((M // 2, M // 2 + 1))],
            [0 * ONE, np.zeros((1, M // 2)), np.eye(1)],
        ])  # fmt: skip
        if (k + 1) % every:
            return lead @ pulled
        everyone = np.vstack([(1 - c_all) * eye + c_all * COLUMN @ best, pick * 0, best])
        meet = np.block([everyone, np.zeros((len(everyone), M // 2 + 1))])
        meet[M:-1, M:-1] = np.eye(M // 2)
        return meet @ lead @ pulled

    expected = by_matrices(np.zeros((M + M // 2 + 1, D)), mix)
    actual, _ = rounds_of(
        oracle.Leader, c=c, p=p, c_global=c_all, p_global=p_all, group_size=2, global_every=every
    )
    assert np.allclose(actual, expected, rtol=0, atol=1e-13)


# Training on quadratics: one parameter, a gradient of one's own.

STEPS = 22


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, momentum=0.9, weight_decay=0.01)


DECAY = [0.1 * 0.95**step for step in range(STEPS)]
FLAT = [0.1] * STEPS


def trajectory(
    rank: int,
    problem: oracle.Quadratics,
    rule: Rule | None,
    *,
    period: Any = None,
    rates: list[float] = DECAY,
    inner: Callable[[Any], torch.optim.Optimizer] = sgd,
    dtype: torch.dtype = torch.float64,
) -> Array:
    """Parameters after every step, (steps, d), and after finish(); without a rule, those of the
    bare inner optimizer."""
    p = nn.Parameter(torch.as_tensor(problem.x0).to(dtype))
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
    "EASGD with α = β = 1 puts every replica at the last mean": (
        lambda: EASGD(0.999999, 0.999999), lambda: OverlapLocalSGD(0.999999, 0.0), {}, None
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
    "leaders of groups of one, and of all every time, are leaders of all": (
        lambda: LSGD(0.0, 1e-300, 1, 0.3, 0.2, 1), lambda: LSGD(0.3, 0.2), {}, False
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
