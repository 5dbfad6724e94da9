"""localopt.ring: the mean that large models on CPUs are averaged with."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from localopt import (
    Constant,
    LocalSGD,
    NonFiniteError,
    ReplicaMismatchError,
    collective,
    ring,
)
from tests.support import oracle
from tests.support.contract import LRS, SIZE, Model, compare, local_step
from tests.support.ranks import outcomes_of, run

pytestmark = pytest.mark.slow

TYPES = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def mean_(whole: torch.Tensor, part: torch.Tensor) -> None:
    ours = collective.Collective()
    ring.mean_(whole, part, ours.rank, ours.world_size, ours._to_next, ours._from_last)


def means(rank: int, m: int) -> list[tuple[float, float]]:
    """Errors of parts averaged and parts summed, relative to the largest; equal on all ranks."""
    errors = []
    for chunk, ahead in ((16 * 4, 1), (16 * 4, 3), (1000 * 16, 2)):
        ring.CHUNK, ring.AHEAD = chunk, ahead
        for dtype in TYPES:
            for n in (16 * m, 48 * m, 1040 * m):
                generator = torch.Generator().manual_seed(rank)
                x = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
                expected = x.double()
                dist.all_reduce(expected)
                part = x[n // 10 : n - n // 7]
                expected[n // 10 : n - n // 7] /= m
                mean_(x, part)
                everyone = [torch.empty_like(x) for _ in range(m)]
                dist.all_gather(everyone, x)
                assert all(torch.equal(everyone[0], other) for other in everyone)
                error = (x.double() - expected).abs().max() / expected.abs().max()
                errors.append((float(error), TYPES[dtype]))
    return errors


@pytest.mark.parametrize("m", [2, 3, 4])
def test_means_and_sums(m: int) -> None:
    """Of all types and sizes; messages that end in the middle of what is averaged."""
    for errors in run(means, m):
        assert all(error <= bound for error, bound in errors), max(errors)


def largest(rank: int, m: int) -> torch.Tensor:
    x = torch.full((16 * m,), torch.finfo(torch.float16).max, dtype=torch.float16)
    mean_(x, x)
    return x


@pytest.mark.parametrize("m", [2, 4])
def test_finite_replicas_do_not_overflow(m: int) -> None:
    for x in run(largest, m):
        assert torch.isfinite(x).all()


def small() -> None:
    """Have the ring used for models of any size, in many messages."""
    collective.RING_BYTES, ring.CHUNK = 0, 64


def follow(rank: int, m: int, problem: oracle.Quadratics) -> dict:
    small()
    calls, original = [], ring.mean_
    ring.mean_ = lambda *args: (calls.append(len(args[0])), original(*args))
    model = Model()
    model.set_vector(torch.as_tensor(problem.x0))
    optimizer = LocalSGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.02,
        period=Constant(6), model=model,
    )  # fmt: skip
    xs, ends, hs, consensus = [], [], [], []
    for step in range(len(LRS)):
        fresh = optimizer.synced
        local_step(optimizer, model, problem, rank, step)
        if fresh:
            hs.append(optimizer.h)
        xs.append(model.vector())
        if optimizer.synced:
            ends.append(step + 1)
        with optimizer.consensus():
            consensus.append(model.vector())
    optimizer.finish()
    assert len(calls) == len(LRS) + 1, "the rounds' ends, in mid-round for consensus(), finish()"
    return {
        "x": torch.stack(xs).numpy(),
        "consensus": torch.stack(consensus).numpy(),
        "ends": ends,
        "hs": hs,
        "finished": model.vector().numpy(),
    }


@pytest.mark.parametrize("m", [2, 3, 4])
def test_average_matches_its_oracle(m: int) -> None:
    problem = oracle.Quadratics.make(m, SIZE, seed=m)
    case = oracle.CASES["Average"][0]
    expected = oracle.simulate(case, "SGD", oracle.constant_h(6), problem, LRS)
    compare(run(follow, m, problem), expected, 1e-12, f"{m} ranks")


def out_of_step(rank: int, m: int) -> str:
    small()
    problem, model = oracle.Quadratics.make(m, SIZE), Model()
    optimizer = LocalSGD(model.parameters(), lr=0.1, period=Constant(3), model=model)
    with pytest.raises(ReplicaMismatchError) as caught:
        for step in range(5 if rank else 9):
            local_step(optimizer, model, problem, rank, step)
        optimizer.finish()
    return str(caught.value)


def test_ranks_out_of_step_meet() -> None:
    zero, *others = run(out_of_step, 3)
    assert "rank 0 at step 6" in zero and "ranks 1, 2 at step 5" in zero
    assert others == [zero, zero]


def bad(rank: int, m: int) -> str:
    small()
    problem, model = oracle.Quadratics.make(m, SIZE), Model()
    optimizer = LocalSGD(model.parameters(), lr=0.1, period=Constant(3), model=model)
    with pytest.raises(NonFiniteError) as caught:
        for step in range(3):
            if (rank, step) == (2, 1):
                with torch.no_grad():
                    model.weights[2][1, 3] = float("nan")
            local_step(optimizer, model, problem, rank, step)
    return str(caught.value)


def test_non_finite_replica_is_named() -> None:
    for message in run(bad, 3):
        assert message.startswith("rank 2 brought NaN or infinity") and "weights.2" in message


def one_dies(rank: int, m: int) -> None:
    x = torch.ones(2**22 * m)
    if rank == 1:
        time.sleep(0.2)
        os._exit(1)
    mean_(x, x)


def test_a_lost_rank_is_an_error() -> None:
    """On the ranks that it talks with, at once; not a wait for ever."""
    (ok, told), _ = outcomes_of(one_dies, 2)
    assert not ok and "Connection closed by peer" in told


def test_where_it_is_used() -> None:
    """Not for what one message would hold, nor with one rank."""
    assert not collective.Collective().rings([torch.zeros(2**23)])
    assert run(used, 2) == [[True, False]] * 2


def used(rank: int, m: int) -> list[bool]:
    return [collective.Collective().rings([torch.zeros(n)]) for n in (2**20, 2**19)]
