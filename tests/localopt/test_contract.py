"""The contract of every rule in localopt/sync/, on 1, 2 and 4 real processes: it does what its
oracle does, and launches no more collectives than it should.

What a rule should do is its entry in `oracle.CASES`; `test_oracles.py` tests the oracles.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from localopt import Constant, LocalOptimizer, PostLocal
from tests.support import oracle
from tests.support.contract import (
    LRS,
    PERIODS,
    RULES,
    SIZE,
    Model,
    assert_close,
    cases,
    compare,
    every_rule,
    everything,
    local_optimizer,
    local_step,
    same_bits,
)
from tests.support.ranks import run

pytestmark = pytest.mark.slow

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Rounds of equal length have nothing in float32 that rounds of different lengths do not have.
KINDS = [("constant", torch.float64), ("qsr", torch.float64), ("qsr", torch.float32)]


def runs(name: str, m: int) -> list[tuple[tuple[int, str], str, torch.dtype]]:
    """What is run of a rule: case and inner optimizer, period and type. That periods and types are
    nothing to the number of replicas, two show."""
    kinds = KINDS if m <= 2 else [("qsr", torch.float64)]
    return [(case, *kind) for case in cases(name) for kind in kinds]


# Matches its oracle.


def follow(
    rank: int, m: int, name: str, problem: oracle.Quadratics, device: str = "cpu"
) -> dict:
    """All of `runs`; what this rank saw."""
    seen = {}
    for (index, inner), period, dtype in runs(name, m):
        model = Model(dtype).to(device)
        model.set_vector(torch.as_tensor(problem.x0) + rank)  # rank 0's must win
        double = dtype == torch.float64
        optimizer = local_optimizer(
            name, index, inner, model, PERIODS[period][0], track_drift=double
        )
        xs, consensus, ends, hs, drifts = [], [], [], [], []
        for step in range(len(LRS)):
            fresh = optimizer.synced
            local_step(optimizer, model, problem, rank, step)
            if fresh:
                hs.append(optimizer.h)
            xs.append(model.vector().double().cpu().numpy().copy())
            if optimizer.synced:
                ends.append(step + 1)
                drifts.append(optimizer.drift)
            if double and step % 4 == 1:
                before = everything(optimizer, model)
                with optimizer.consensus():
                    consensus.append(model.vector().cpu().numpy().copy())
                assert same_bits(before, everything(optimizer, model)), f"not restored: {step}"
        rounds = optimizer.round
        optimizer.finish()
        assert optimizer.synced and optimizer.round == len(hs) and rounds == len(ends)
        seen[index, inner, period, dtype] = {
            "x": np.stack(xs),
            "consensus": np.array(consensus),
            "ends": ends,
            "hs": hs,
            "drifts": drifts,
            "finished": model.vector().double().cpu().numpy().copy(),
        }
    return seen


@pytest.mark.parametrize("m", [0, 1, 2, 4])
@every_rule
def test_matches_its_oracle(name: str, m: int) -> None:
    """Every rank, step and consensus against the oracle, relative in the norm. Replicas that should
    be equal after a round are so bitwise; after finish() all are.

    0: one replica, without torch.distributed.
    """
    problem = oracle.Quadratics.make(m or 1, SIZE, seed=m)
    check(run(follow, m, name, problem) if m else [follow(0, 1, name, problem)], name, problem)


def check(ranks: list[dict], name: str, problem: oracle.Quadratics) -> None:
    """What the ranks saw, beside the oracles."""
    for (index, inner), period, dtype in runs(name, len(ranks)):
        case = oracle.CASES[name][index]
        expected = oracle.simulate(case, inner, PERIODS[period][1], problem, LRS)
        assert len(expected.ends) >= 8 and expected.ends[-1] < len(LRS), "finish() in mid-round"
        seen = [everything_seen[index, inner, period, dtype] for everything_seen in ranks]
        what = f"case {index} {inner} {period} {dtype}"
        coarse = case.coarse if dtype == torch.float32 else 0.0
        compare(seen, expected, max(TOLERANCE[dtype], coarse), what)
        if dtype == torch.float64:
            drifts = np.array(expected.drifts)[: len(expected.ends) - case.delay]
            for rank, of_rank in enumerate(seen):
                consensus = expected.consensus[1::4]
                assert_close(of_rank["consensus"], consensus, TOLERANCE[dtype], what)
                assert of_rank["drifts"][: case.delay] == [None] * case.delay, what
                arrived = np.array(of_rank["drifts"][case.delay :], dtype=float)  # None is NaN
                assert np.allclose(arrived, drifts[:, rank], rtol=1e-8, atol=1e-6), what


def post_local(rank: int, m: int, problem: oracle.Quadratics) -> dict[Any, Any]:
    seen = {}
    for name in sorted(RULES):
        for index, inner in cases(name):
            model = Model()
            model.set_vector(torch.as_tensor(problem.x0))
            period = PostLocal(5, 7, total_steps=23)
            optimizer = local_optimizer(name, index, inner, model, period)
            xs = []
            for step in range(23):
                local_step(optimizer, model, problem, rank, step)
                xs.append(model.vector().numpy().copy())
            assert optimizer.synced and optimizer.round == 5 + 3
            seen[name, index, inner] = np.stack(xs)
    return seen


def post_local_h(step: int, lr: float) -> int:
    return min(1 if step < 5 else 7, 23 - step)


def test_rounds_of_all_lengths() -> None:
    """Any period goes with any rule: H = 1 five times, then 7, 7 and the 4 steps that are left.
    (QSR's growing rounds are in the contract test.)"""
    problem = oracle.Quadratics.make(2, SIZE)
    ranks = run(post_local, 2, problem)
    for name, index, inner in ranks[0]:
        case = oracle.CASES[name][index]
        expected = oracle.simulate(case, inner, post_local_h, problem, LRS[:23])
        assert expected.hs == [1] * 5 + [7, 7, 4]
        for rank, seen in enumerate(ranks):
            what = f"{name} {index} {inner}"
            assert_close(seen[name, index, inner], expected.x[:, rank], 1e-12, what)


# No collective inside a round.


def count_collectives(rank: int, m: int, name: str) -> list[dict[str, list[int]]]:
    """Collectives launched by each step, consensus and finish, at two levels.

    The sequence numbers of the process groups count whatever is launched, by any way and thread;
    the functions of torch.distributed are wrapped to name it.
    """
    called: list[tuple[str, int]] = []
    for function in dir(dist):
        original = getattr(dist, function)
        if inspect.isfunction(original) and not function.startswith(("is_", "get_", "_")):
            setattr(dist, function, counting(original, called))

    def launched(action: Any) -> int:
        called.clear()
        groups = list(distributed_c10d._world.pg_map)
        before = [group._get_sequence_number_for_group() for group in groups]
        action()
        assert list(distributed_c10d._world.pg_map) == groups, "groups are made at construction"
        after = [group._get_sequence_number_for_group() for group in groups]
        number = sum(after) - sum(before)
        names = [name for name, _ in called]
        messages = [Fraction(1, others) for name, others in called if name == "isend"]
        assert names.count("irecv") == len(messages), called
        assert len(called) == number, called
        return number - 2 * len(messages) + int(sum(messages))  # one to each other: one collective

    ones = torch.ones(1)
    assert launched(lambda: dist.all_reduce(ones)) == 1, "the counters are blind"
    later = []
    assert launched(lambda: later.append(dist.all_reduce(ones, async_op=True))) == 1
    assert launched(later[0].wait) == 0, "counted where it is launched"
    return [count_case(rank, m, name, index, inner, launched) for index, inner in cases(name)]


def count_case(
    rank: int, m: int, name: str, index: int, inner: str, launched: Callable[[Any], int]
) -> dict[str, list[int]]:
    problem = oracle.Quadratics.make(m, SIZE)
    model = Model(torch.float32)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))  # a second type
    model.register_parameter("extra", extra)
    optimizer = local_optimizer(name, index, inner, model, Constant(3))
    counts: dict[str, list[int]] = {"step": [], "mid": [], "boundary": [], "finish": []}
    for step in range(18):
        extra.grad = torch.full_like(extra, rank + 1.0)
        counts["step"].append(
            launched(lambda step=step: local_step(optimizer, model, problem, rank, step))
        )
        if step >= 6:  # the first two rounds show that nothing else happens
            place = "boundary" if optimizer.synced else "mid"
            counts[place].append(launched(lambda: evaluate(optimizer)))
    counts["finish"].append(launched(optimizer.finish))
    local_step(optimizer, model, problem, rank, 18)
    counts["finish"].append(launched(optimizer.finish))
    return counts


def evaluate(optimizer: LocalOptimizer) -> None:
    with optimizer.consensus():
        pass


def counting(function: Any, called: list[tuple[str, int]]) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        called.append((function.__name__, dist.get_world_size(kwargs.get("group")) - 1))
        return function(*args, **kwargs)

    return wrapped


WITH_GROUPS = {
    name for name in RULES if any(callable(c.settings) for c in oracle.CASES.get(name, []))
}


@pytest.mark.parametrize(
    ("name", "m"), [*((name, 2) for name in sorted(RULES)), *((n, 4) for n in sorted(WITH_GROUPS))]
)
def test_no_collective_inside_a_round(name: str, m: int) -> None:
    """No collective but at a round's end: headers and then one per type, and for consensus() where
    replicas differ, unless the rule's case says otherwise."""
    dtypes = 2
    problem = oracle.Quadratics.make(m, SIZE)

    def number(launches: tuple[int, int]) -> int:
        return launches[0] + launches[1] * dtypes

    for rank_counts in run(count_collectives, m, name):
        for (index, inner), counts in zip(cases(name), rank_counts, strict=True):
            case = oracle.CASES[name][index]
            expected = oracle.simulate(case, inner, oracle.constant_h(3), problem, LRS[:18])
            launches = case.launches_for(m)
            syncs = itertools.islice(itertools.cycle(launches.syncs), 6)
            agree = [len(expected.agreeing(end)) == m * (m - 1) // 2 for end in (9, 12, 15, 18)]
            consensus = number(launches.consensus)
            assert counts == {
                "step": [number(n) for sync in syncs for n in (*launches.steps, sync)],
                "mid": [consensus] * 8,
                "boundary": [number(launches.agreeing) if a else consensus for a in agree],
                "finish": [
                    number(launches.agreeing if agree[-1] else launches.finish),
                    number(launches.finish),
                ],
            }, (index, inner)
