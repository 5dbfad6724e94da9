"""The oracles in tests/support/oracle/: one for every rule, with the published equations.

They are compared with mixing matrices, in NumPy; that a rule follows its oracle is the contract's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.support import oracle
from tests.support.contract import LRS, PERIODS, RULES, SIZE

Array = oracle.Array


def test_every_rule_has_an_oracle() -> None:
    """A new file in localopt/sync/ is tested without being named here, once it has an oracle."""
    assert RULES, "no rule found in localopt/sync/"
    assert set(RULES) == set(oracle.CASES)
    assert all(oracle.CASES.values())


def test_oracles_show_what_they_should() -> None:
    """A leader that never changes, replicas that never differ: nothing would be compared."""
    for m in (2, 4):
        problem = oracle.Quadratics.make(m, SIZE, seed=m)
        for case, (_, period) in itertools.product(oracle.CASES["LSGD"], PERIODS.values()):
            run_ = oracle.simulate(case, case.inners[0], period, problem, LRS)
            rule = run_.rule
            assert isinstance(rule, oracle.Leader)
            assert len({*rule.lowest}) > 1, f"one leader throughout: {rule.lowest}"
            assert rule.lowest != rule.lowest_last, "by the last loss as well as by the mean"
        for name, cases_ in oracle.CASES.items():
            for case in cases_:
                run_ = oracle.simulate(case, case.inners[0], PERIODS["qsr"][1], problem, LRS)
                assert max(np.max(run_.drifts, axis=0)) > 0.1, name


# Against the mixing matrices of the papers.

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


def test_rules_say_whether_they_overlap() -> None:
    """As their oracles have it: what is sent behind training is looked at a round later, or a
    few steps."""
    for name, cases_ in oracle.CASES.items():
        for case in cases_:
            assert case.rule(RULES[name], 2).overlaps is case.behind, (name, case.settings)
