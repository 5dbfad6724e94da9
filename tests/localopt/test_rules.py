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
    Streaming,
)
from tests.localopt import test_contract
from tests.support import oracle
from tests.support.ranks import outcomes_of, run

pytestmark = pytest.mark.slow

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


def test_oracle_of_streaming() -> None:
    """By elements: rows x_1 … x_m, z, v of a fragment; where it is not due, nothing but steps."""
    fragments, h, mu, zeta, alpha = 3, 4, 0.6, 0.8, 0.7
    mean = np.concatenate([ONE / M, [[0.0, 0.0]]], axis=1)
    z, v = np.eye(M + 2)[M : M + 1], np.eye(M + 2)[M + 1 :]
    new_v = mu * v + z - mean
    new_z = z - zeta * (z - mean + mu * new_v)
    moved = np.vstack([np.eye(M + 2)[:M], new_z, new_v])
    pulled = np.eye(M + 2)
    pulled[:M] = (1 - alpha) * np.eye(M + 2)[:M] + alpha * COLUMN @ z
    due = {2: 0, 3: 1, 4: 2}  # after which steps of a round of four which of three
    for overlap in (False, True):
        rule = oracle.Streaming(
            np.zeros(D), M, oracle.Sgd(), fragments=fragments, outer_lr=zeta, outer_momentum=mu,
            alpha=alpha, overlap=overlap,
        )  # fmt: skip
        x, state = np.zeros((M, D)), np.zeros((M + 2, D))
        flying = None
        for step in range(12):
            if step % h == 0:
                this = oracle.Round(step // h, h)
            this.lrs.append(0.1)
            x = rule.after_step(x + ROUNDS[step % 5], this)
            state[:M] += ROUNDS[step % 5]
            k = due.get(step % h + 1)
            if k is None:
                continue
            here = slice(2 * k, 2 * k + 2)  # D is 6
            if overlap:
                if flying is not None:
                    there, arrived = flying
                    state[M:, there] = arrived
                    state[:, there] = pulled @ state[:, there]
                flying = here, (moved @ state[:, here])[M:]
            else:
                state[:, here] = pulled @ moved @ state[:, here]
            assert np.allclose(x, state[:M], rtol=0, atol=1e-13), (overlap, step)
            assert abs(x).max() > 0.1


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


# The forms that need one replica only: the inner step's change is the outer optimizer's gradient.


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


# Saved on some replicas, loaded on another number of them.


def saved_between_rounds(rank: int, m: int) -> dict[Any, tuple[bool, dict, dict]]:
    """Of every case: whether replicas agree, the state then, and the state after finish()."""
    problem = oracle.Quadratics.make(m, test_contract.SIZE)
    seen = {}
    for name in sorted(test_contract.RULES):
        for index, inner in test_contract.cases(name):
            model = test_contract.Model()
            optimizer = test_contract.local_optimizer(name, index, inner, model, Constant(2))
            for step in range(6):
                test_contract.local_step(optimizer, model, problem, rank, step)
            agree, state = optimizer.sync.replicas_agree, optimizer.state_dict()
            rows = stacked(model.vector())
            assert torch.equal(rows[0], rows[1]) or not agree
            optimizer.finish()
            seen[name, index, inner] = agree, state, optimizer.state_dict()
    return seen


@pytest.fixture(scope="module")
def saved_on_two() -> dict[Any, tuple[bool, dict, dict]]:
    return run(saved_between_rounds, 2)[1]


def test_other_numbers_of_replicas(saved_on_two: dict[Any, tuple[bool, dict, dict]]) -> None:
    """A state of replicas that agree loads into any number of them; one of replicas that differ
    belongs to its rank, and says so."""
    for (name, index, inner), (agree, state, finished) in saved_on_two.items():
        model = test_contract.Model()
        optimizer = test_contract.local_optimizer(name, index, inner, model, Constant(2))
        if not agree:
            with pytest.raises(ValueError, match=r"state to load has (rank 1|world_size 2)"):
                optimizer.load_state_dict(state)
        for loadable in [state, finished] if agree else [finished]:
            optimizer.load_state_dict(loadable)
            assert optimizer.round == 3


def test_heuristic_momentum_of_other_numbers_of_replicas(
    saved_on_two: dict[Any, tuple[bool, dict, dict]]
) -> None:
    """1 - 1/m is of the replicas there are, not of those there were."""
    optimizer = test_contract.local_optimizer(
        "BlockMomentum", 0, "SGD", test_contract.Model(), Constant(2)
    )
    optimizer.load_state_dict(saved_on_two["BlockMomentum", 0, "SGD"][1])
    rule = optimizer.sync
    assert isinstance(rule, BlockMomentum) and rule.heuristic_momentum
    assert rule.outer_optimizer.param_groups[0]["momentum"] == 0.0


# What replicas do to each other, seen at the boundary.


class Boundaries:
    """A replica whose parameters are seen before and after each synchronisation.

    Its gradient is its own and does not depend on x; the inner optimizer is SGD with rate 1.
    """

    def __init__(
        self, rank: int, rule: Rule, h: int = 1, dtype: torch.dtype = torch.float64
    ) -> None:
        self.p = nn.Parameter(torch.zeros(5, dtype=dtype))
        inner = torch.optim.SGD([self.p], 1.0)
        self.optimizer = LocalOptimizer(inner, Constant(h), rule, auto=False)
        self.generator = torch.Generator().manual_seed(rank)
        self.h = h

    def round(self, losses: float | list[float] = 0.0) -> tuple[Tensor, Tensor]:
        """One round; parameters before and after its synchronisation."""
        losses = losses if isinstance(losses, list) else [losses] * self.h
        for loss in losses:
            self.p.grad = torch.randn(5, generator=self.generator, dtype=self.p.dtype)
            self.optimizer.record_loss(torch.tensor(loss))
            self.optimizer.step()
            before = self.p.detach().clone()
            ended = self.optimizer.average()
        assert ended
        return before, self.p.detach().clone()

    def consensus(self) -> Tensor:
        with self.optimizer.consensus():
            return self.p.detach().clone()


def stacked(tensor: Tensor) -> Tensor:
    """Every replica's, (m, d); a collective of the test's own."""
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


def elastic_forces(rank: int, m: int) -> None:
    """β = mα by default: what the replicas lose the centre wins, so Σ_i x_i + z stays; with it
    x_i and z are as the equation has them, with the old z in both."""
    replica, z = Boundaries(rank, EASGD()), torch.zeros(5, dtype=torch.float64)
    for _ in range(5):
        before, after = map(stacked, replica.round())
        old, z = z, replica.consensus()
        assert torch.allclose(before.sum(0) + old, after.sum(0) + z, rtol=1e-12)
        assert torch.allclose(after, before - 0.9 / m * (before - old), rtol=1e-12)
        assert torch.allclose(z, old + 0.9 * (before.mean(0) - old), rtol=1e-12)


def anchor_of_pulled_models(rank: int, m: int) -> None:
    """"With β = 0 the anchor is the last mean of pulled replicas", of one boundary ago; at the
    first boundary it is the initial model."""
    replica, z = Boundaries(rank, OverlapLocalSGD(0.6, 0.0)), torch.zeros(5, dtype=torch.float64)
    for _ in range(5):
        before, after = map(stacked, replica.round())
        assert torch.allclose(after, 0.4 * before + 0.6 * z, rtol=1e-12)
        z = after.mean(0)


def corrected_by_the_mean(rank: int, m: int) -> None:
    """"x_i ← mean(s) + (x_i - s_i) … The first round's end only launches"."""
    replica, s = Boundaries(rank, CoCoDSGD()), None
    for _ in range(5):
        before, after = map(stacked, replica.round())
        expected = before if s is None else s.mean(0) + (before - s)
        assert torch.allclose(after, expected, rtol=1e-12)
        s = after


NAN = math.nan
# Each replica's mean loss, who leads, and the leaders of the groups of two.
ELECTIONS = [
    ([1.0, 1.0, 1.0, 1.0], 0, [0, 2]),
    ([2.0, 1.0, 1.0, 3.0], 1, [1, 2]),
    ([NAN, NAN, 3.0, 2.0], 3, None),
    ([NAN, 5.0, 6.0, 7.0], 1, [1, 2]),
    ([-1.0, -2.0, -2.0, NAN], 1, [1, 2]),
]


def elections(rank: int, m: int) -> None:
    """"Among equal losses the lowest rank leads; a NaN never does"; the loss is the round's mean.
    With c = 1 and p = 0 followers have the leader's bits."""
    for losses, leader, of_groups in ELECTIONS:
        for dtype in (torch.float32, torch.float64):
            replica = Boundaries(rank, LSGD(c=1.0, p=0.0), 2, dtype)
            for _ in range(2):
                # The last loss alone would have the order reversed.
                before, after = map(stacked, replica.round([5 * losses[rank], -3 * losses[rank]]))
                assert torch.equal(after, before[leader].expand(m, 5)), losses
            if of_groups is None:
                continue
            settings = {"group_size": 2, "c_global": 1.0, "p_global": 0.0, "global_every": 2}
            replica = Boundaries(rank, LSGD(c=1.0, p=0.0, **settings), 2, dtype)
            for every in (False, True):
                before, after = map(stacked, replica.round([losses[rank]] * 2))
                rows = [leader] * m if every else [of_groups[i // 2] for i in range(m)]
                assert torch.equal(after, before[rows]), (losses, every)
    replica = Boundaries(rank, LSGD())
    with pytest.raises(NonFiniteError, match="training loss that is a number"):
        replica.round(NAN)


def data_parallel_in_groups(rank: int, m: int) -> None:
    """With H = 1 and SGD, momentum included, for it is linear: data-parallel inside the groups,
    and parameters averaged across them every few steps."""
    every, problem = 3, oracle.Quadratics.make(m, 20)
    ours = trajectory(rank, problem, HierarchicalAverage(2, every), period=Constant(1))
    p = nn.Parameter(torch.tensor(problem.x0))
    a, b = torch.as_tensor(problem.a[rank]), torch.as_tensor(problem.b[rank])
    optimizer = sgd([p])
    mine = slice(rank // 2 * 2, rank // 2 * 2 + 2)
    for step, rate in enumerate(DECAY):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = stacked(a @ (p.detach() - b))[mine].mean(0)
        optimizer.step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                p.copy_(stacked(p.detach()).mean(0))
        assert np.allclose(ours[step], p.detach().numpy(), rtol=1e-11), step


def at_a_rate_of_zero(rank: int, m: int) -> None:
    """What is divided by a mean rate of 0 is refused with the reason, and not before the end."""
    for rule in (SlowMo(0.5), OverlapLocalSGD(normalize_by_lr=True)):
        p = nn.Parameter(torch.zeros(3))
        optimizer = LocalOptimizer(torch.optim.SGD([p], 0.0), Constant(2), rule)
        p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(ValueError, match=r"mean learning rate .* step 2 .*0.*divides by it"):
            optimizer.step()


@pytest.mark.parametrize(
    "claim",
    [
        elastic_forces, anchor_of_pulled_models, corrected_by_the_mean, elections,
        data_parallel_in_groups, at_a_rate_of_zero,
    ],
)  # fmt: skip
def test_at_the_boundary(claim: Callable[[int, int], None]) -> None:
    run(claim, M)


# Leaders need losses.


def test_leaders_need_the_loss_of_every_step() -> None:
    """"The loss comes from ``step(closure)`` or `LocalOptimizer.record_loss`, called before the
    step"; where it does not, the first step says so."""

    def new() -> tuple[nn.Parameter, LocalOptimizer]:
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones_like(p)
        return p, LocalOptimizer(torch.optim.SGD([p], 0.1), Constant(2), LSGD())

    _, optimizer = new()
    with pytest.raises(RuntimeError, match=r"step 1 .*step\(closure\).*record_loss"):
        optimizer.step()
    p, optimizer = new()
    optimizer.step(lambda: (p * p).sum())
    with pytest.raises(RuntimeError, match=r"LSGD needs the training loss of every step.* step 2"):
        optimizer.step()
    for loss in (torch.tensor(1.0), 1.0, torch.tensor([1.0], requires_grad=True)):
        _, optimizer = new()
        for _ in range(4):
            optimizer.record_loss(loss)
            optimizer.step()
        assert optimizer.round == 2


# Any period with any rule.


def post_local(rank: int, m: int, problem: oracle.Quadratics) -> dict[Any, Any]:
    seen = {}
    for name in sorted(test_contract.RULES):
        for index, inner in test_contract.cases(name):
            model = test_contract.Model()
            model.set_vector(torch.as_tensor(problem.x0))
            period = PostLocal(5, 7, total_steps=23)
            optimizer = test_contract.local_optimizer(name, index, inner, model, period)
            xs = []
            for step in range(23):
                test_contract.local_step(optimizer, model, problem, rank, step)
                xs.append(model.vector().numpy().copy())
            assert optimizer.synced and optimizer.round == 5 + 3
            seen[name, index, inner] = np.stack(xs)
    return seen


def post_local_h(step: int, lr: float) -> int:
    return min(1 if step < 5 else 7, 23 - step)


def test_rounds_of_all_lengths() -> None:
    """Any period goes with any rule: H = 1 five times, then 7, 7 and the 4 steps that are left.
    (QSR's growing rounds are in the contract test.)"""
    problem = oracle.Quadratics.make(2, test_contract.SIZE)
    ranks = run(post_local, 2, problem)
    for name, index, inner in ranks[0]:
        case = oracle.CASES[name][index]
        expected = oracle.simulate(case, inner, post_local_h, problem, test_contract.LRS[:23])
        assert expected.hs == [1] * 5 + [7, 7, 4]
        for rank, seen in enumerate(ranks):
            what = f"{name} {index} {inner}"
            test_contract.assert_close(
                seen[name, index, inner], expected.x[:, rank], 1e-12, what
            )


# What overlaps with training.

LATE = 0.8  # seconds that rank 1 comes late to the first boundary
OVERLAPPED: dict[str, Callable[[], Rule]] = {
    "EASGD": EASGD, "Overlap": OverlapLocalSGD, "CoCoD": CoCoDSGD,
}  # fmt: skip
BLOCKING: dict[str, Callable[[], Rule]] = {
    "Average": Average, "EASGD without overlap": lambda: EASGD(overlap=False),
    "EASGD with a pull": lambda: EASGD(pull=0.1),
}  # fmt: skip


def late(rank: int, m: int) -> dict[str, tuple[float, float, float, float]]:
    seen = {}
    for name, rule in {**OVERLAPPED, **BLOCKING}.items():
        p = nn.Parameter(torch.zeros(1000))
        optimizer = LocalOptimizer(torch.optim.SGD([p], 0.1), Constant(2), rule())
        p.grad = torch.ones_like(p)
        optimizer.step()
        dist.barrier()
        if rank == 1:
            time.sleep(LATE)
        started = time.perf_counter()
        optimizer.step()
        boundary = time.perf_counter() - started
        optimizer.step()
        if rank == 0:
            time.sleep(LATE)  # its round goes on while rank 1 is on its way
        started = time.perf_counter()
        optimizer.step()
        second = time.perf_counter() - started
        traffic = optimizer.traffic
        seen[name] = boundary, second, traffic.hidden, traffic.exposed
        optimizer.finish()
        assert traffic.syncs == 2 and traffic.bytes > 0
        assert traffic.wait[rank] > 0.5 * LATE or rank == 1
    return seen


def test_overlapped_rules_overlap() -> None:
    """Who comes to a boundary before a late peer does not wait for it, and the time that the
    collective took is hidden; under rules that do not overlap training stands still for it."""
    zero, _ = run(late, 2)
    for name in OVERLAPPED:
        boundary, second, hidden, exposed = zero[name]
        assert max(boundary, second) < 0.5 * LATE, (name, boundary, second)
        assert hidden > 0.75 * LATE > exposed, (name, hidden, exposed)
    for name in BLOCKING:
        boundary, _, hidden, exposed = zero[name]
        assert min(boundary, exposed) > 0.75 * LATE > hidden, (name, boundary, hidden, exposed)


# Groups that do not meet at every synchronisation.

GROUPED: dict[str, Callable[[], Rule]] = {
    "means": lambda: HierarchicalAverage(2, 2),
    "leaders": lambda: LSGD(group_size=2, global_every=2),
}


def trouble_in_a_group(rank: int, m: int, name: str, kind: str) -> None:
    """Rank 1 brings NaN into the third round, in which groups are alone, or ends before it."""
    p = nn.Parameter(torch.zeros(5))
    optimizer = LocalOptimizer(torch.optim.SGD([p], 0.1), Constant(2), GROUPED[name]())
    for step in range(8):
        if rank == 1 and step == 4:
            if kind == "short":
                break
            with torch.no_grad():
                p[3] = NAN
        p.grad = torch.ones_like(p)
        optimizer.record_loss(1.0)
        optimizer.step()
    optimizer.finish()


@pytest.mark.parametrize("kind", ["bad", "short"])
@pytest.mark.parametrize("name", GROUPED)
def test_trouble_in_a_group(name: str, kind: str) -> None:
    """Who meets the replica at the next boundary names it. Other groups cannot know: they find
    their peers gone when they next meet, and do not wait for ever."""
    outcomes = outcomes_of(trouble_in_a_group, 4, name, kind, timeout=25)  # gloo's own is 30 s
    assert not any(ok for ok, _ in outcomes)
    wanted = {
        "bad": ["NonFiniteError: rank 1 brought NaN or infinity", "at step 6"],
        "short": ["ReplicaMismatchError", "rank 0 at step 6", "rank 1 at step 4"],
    }[kind]
    for _, text in outcomes[:2]:
        assert all(part in text for part in wanted), text
    for _, text in outcomes[2:]:
        assert "deadlock" not in text, text


def group_sizes(rank: int, m: int) -> None:
    for size, rule in itertools.product((3, 8), (HierarchicalAverage, LSGD)):
        with pytest.raises(ValueError, match=f"group_size is {size}: it does not divide the 4"):
            LocalOptimizer(
                torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1),
                Constant(1),
                rule(group_size=size, global_every=2),
            )


def test_group_size_divides() -> None:
    run(group_sizes, M)


# Refusals.

SGD = torch.optim.SGD
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "alpha 0": (lambda: EASGD(alpha=0.0), "alpha is 0"),
    "alpha < 0": (lambda: EASGD(alpha=-0.1), "alpha is -0.1"),
    "alpha NaN": (lambda: EASGD(alpha=NAN), "alpha is nan"),
    "beta 0": (lambda: EASGD(alpha=0.5, beta=0.0), "beta 0"),
    "alpha + beta": (lambda: EASGD(alpha=0.9, beta=1.1), "sum less than 2"),
    "beta = m alpha": (lambda: local(EASGD(alpha=1.0)), "sum less than 2"),
    "pull < 0": (lambda: EASGD(pull=-0.1), "pull is -0.1"),
    "pull > 1": (lambda: EASGD(pull=1.1), "pull is 1.1"),
    "pull NaN": (lambda: EASGD(pull=NAN), "pull is nan"),
    "overlap and pull": (lambda: EASGD(pull=0.1, overlap=True), "overlap with a pull"),
    "no fragments": (lambda: Streaming(0), "fragments is 0: there must be at least 1"),
    "half a fragment": (lambda: Streaming(0.5), "fragments is 0.5: it must be an integer"),
    "streaming alpha 0": (lambda: Streaming(2, alpha=0.0), r"alpha is 0.0.* \(0, 1\]"),
    "streaming alpha > 1": (lambda: Streaming(2, alpha=1.1), r"alpha is 1.1.* \(0, 1\]"),
    "streaming momentum 1": (lambda: Streaming(2, outer_momentum=1.0), "outer momentum is 1.0"),
    "streaming rate": (lambda: Streaming(2, 1.4, 0.9), "rate is 1.4.* 1.36"),
    "overlap alpha 1": (lambda: OverlapLocalSGD(alpha=1.0), r"alpha is 1.0.* \[0, 1\)"),
    "overlap alpha < 0": (lambda: OverlapLocalSGD(alpha=-0.1), r"alpha is -0.1.* \[0, 1\)"),
    "overlap beta 1": (lambda: OverlapLocalSGD(beta=1.0), r"beta is 1.0.* \[0, 1\)"),
    "overlap beta < 0": (lambda: OverlapLocalSGD(beta=-0.1), r"beta is -0.1.* \[0, 1\)"),
    "overlap beta NaN": (lambda: OverlapLocalSGD(beta=NAN), "beta is nan"),
    "momentum 1": (lambda: BMUF(1.0), "momentum is 1.0"),
    "momentum > 1": (lambda: BMUF(1.5, nesterov=True), "momentum is 1.5"),
    "momentum < 0": (lambda: BMUF(-0.1), "momentum"),
    "SlowMo beta 1": (lambda: SlowMo(1.0), "momentum is 1.0"),
    "DiLoCo momentum 1": (lambda: DiLoCo(momentum=1.0), "momentum is 1.0"),
    "outer momentum 1": (
        lambda: BlockMomentum(partial(SGD, lr=1.0, momentum=1.0)), "momentum is 1.0"
    ),
    "heuristic Adam": (
        lambda: BlockMomentum(torch.optim.Adam, heuristic_momentum=True), "outer SGD"
    ),
    "LBFGS": (lambda: BlockMomentum(torch.optim.LBFGS), "needs a closure"),
    "not an optimizer": (lambda: BlockMomentum(lambda params: None), "torch.optim.Optimizer"),
    "c > 1": (lambda: LSGD(c=1.1), r"c is 1.1.*\[0, 1\]"),
    "c < 0": (lambda: LSGD(c=-0.1), r"c is -0.1.*\[0, 1\]"),
    "p > 1": (lambda: LSGD(p=1.1), r"p is 1.1.*\[0, 1\]"),
    "p < 0": (lambda: LSGD(p=-0.1), r"p is -0.1.*\[0, 1\]"),
    "c NaN": (lambda: LSGD(c=NAN), "c is nan"),
    "c = p = 0": (lambda: LSGD(c=0.0, p=0.0), "c and p are both 0"),
    "c_global > 1": (lambda: LSGD(group_size=2, global_every=2, c_global=2.0), "c_global is 2.0"),
    "both global 0": (
        lambda: LSGD(group_size=2, global_every=2, c_global=0.0, p_global=0.0),
        "c_global and p_global are both 0",
    ),
    "no global_every": (lambda: LSGD(group_size=2), "global_every"),
    "no group_size": (lambda: LSGD(global_every=2), "group_size"),
    "leaders' group_size 0": (lambda: LSGD(group_size=0, global_every=2), "group_size is 0"),
    "group_size 0": (lambda: HierarchicalAverage(0, 2), "group_size is 0"),
    "group_size 1.5": (lambda: HierarchicalAverage(1.5, 2), "group_size is 1.5"),
    "global_every 0": (lambda: HierarchicalAverage(2, 0), "global_every is 0"),
    "groups of two of one": (lambda: local(HierarchicalAverage(2, 2)), "does not divide the 1"),
}  # fmt: skip


def local(rule: Rule) -> LocalOptimizer:
    return LocalOptimizer(SGD([nn.Parameter(torch.zeros(2))], 0.1), Constant(1), rule)


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    make, reason = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=reason):
        make()


def test_not_refused() -> None:
    """The ends of the ranges that are allowed."""
    for rule in (
        EASGD(alpha=0.99, beta=1.0), EASGD(pull=1.0), OverlapLocalSGD(0.0, 0.0), BMUF(0.0),
        SlowMo(0.0), LSGD(c=1.0, p=0.0), LSGD(c=0.0, p=1.0), HierarchicalAverage(1, 1),
    ):  # fmt: skip
        local(rule)
