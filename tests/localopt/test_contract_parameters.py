"""The contract of every rule in localopt/sync/: parameters of every kind, and replicas that do not
fit.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from localopt import Constant, NonFiniteError, ReplicaMismatchError
from tests.support import oracle
from tests.support.contract import (
    SIZE,
    Model,
    cases,
    equal_on_all_ranks,
    every_rule,
    local_optimizer,
    local_step,
)
from tests.support.ranks import run

pytestmark = pytest.mark.slow


# Parameters of every kind.


class Odd(nn.Module):
    """Frozen, tied, channels_last, 0-dim, empty, sometimes unused, and of four types."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.first = nn.Linear(5, 4)
        self.tied = nn.Linear(5, 4)
        self.tied.weight = self.first.weight
        self.conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
        self.transposed = nn.Parameter(torch.randn(4, 6).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.randn(9))
        self.low = nn.Parameter(torch.randn(13).bfloat16())
        self.sixteen = nn.Parameter(torch.randn(17).half())
        self.high = nn.Parameter(torch.randn(11).double())


def odd_parameters(rank: int, m: int, name: str) -> None:
    for index, inner in cases(name):
        odd_case(rank, name, index, inner)


def odd_case(rank: int, name: str, index: int, inner: str) -> None:
    model = Odd()
    strides = [p.stride() for p in model.parameters()]
    frozen = model.frozen.clone()
    optimizer = local_optimizer(name, index, inner, model, Constant(2))
    generator = torch.Generator().manual_seed(rank)
    for _ in range(6):
        for p in model.parameters():
            p.grad = None
            if p.requires_grad and not (p is model.unused and rank == 0):
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.record_loss(torch.tensor(2.0 - rank))  # rank 1 leads
        optimizer.step()
    optimizer.finish()
    for p, stride in zip(model.parameters(), strides, strict=True):
        assert p.stride() == stride
        assert p.numel() == 0 or p.data_ptr() % 64 == 0
        assert torch.isfinite(p).all()
        assert equal_on_all_ranks(p.detach().contiguous())
    assert model.tied.weight is model.first.weight
    assert torch.allclose(model.frozen, frozen, rtol=1e-6)
    with torch.no_grad():
        model.unused -= torch.randn(9, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model.unused, Odd().unused), "the other replica has moved it"


@every_rule
def test_parameters_of_every_kind(name: str) -> None:
    """Whatever the parameters, they keep their strides, start at multiples of 64 bytes, and are
    averaged whether or not a replica has a gradient for them."""
    run(odd_parameters, 2, name)


# Replicas that do not fit.


BATCHES = [(7, 8), (6, 9), (9, 8), (13, 8)]  # of rank 0 and rank 1, in rounds of 3
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


def meeting_cases(name: str, m: int) -> list[tuple[int, str]]:
    """Those in which all replicas meet at every synchronisation, not in groups."""
    settings = [case.settings_for(m) for case in oracle.CASES[name]]
    return [(i, inner) for i, inner in cases(name) if settings[i].get("group_size", m) == m]


def one_batch_short(rank: int, m: int, name: str) -> list[tuple[str, int]]:
    seen = []
    problem = oracle.Quadratics.make(m, SIZE)
    for (index, inner), batches in itertools.product(meeting_cases(name, m), BATCHES):
        model = Model()
        optimizer = local_optimizer(name, index, inner, model, Constant(3))
        done = 0
        with pytest.raises(ReplicaMismatchError) as caught:
            for step in range(batches[rank]):
                done = step + 1
                local_step(optimizer, model, problem, rank, step)
            optimizer.finish()
        seen.append((str(caught.value), done))
    return seen


@every_rule
def test_unequal_numbers_of_batches(name: str) -> None:
    """Named on every rank at the next boundary; one round late where the rule overlaps."""
    ranks = run(one_batch_short, 2, name)
    tried = itertools.product(meeting_cases(name, 2), BATCHES)
    for ((index, _), batches), zero, one in zip(tried, *ranks, strict=True):
        (message, step), (other, other_step) = zero, one
        assert message == other
        assert "rank 0 at step" in message and "rank 1 at step" in message
        assert "(finish)" in message
        if batches == (13, 8):
            assert (step, other_step) == (oracle.CASES[name][index].noticed_at()[0], 8)


def one_goes_bad(rank: int, m: int, name: str) -> list[tuple[str, int]]:
    seen = []
    problem = oracle.Quadratics.make(m, SIZE)
    for (index, inner), value in itertools.product(meeting_cases(name, m), NON_FINITE):
        model = Model(torch.float32)
        optimizer = local_optimizer(name, index, inner, model, Constant(2))
        done = 0
        with pytest.raises(NonFiniteError) as caught:
            for step in range(8):
                if step == 2 and rank == 1:
                    with torch.no_grad():
                        model.weights[2][1, 3] = value
                done = step + 1
                local_step(optimizer, model, problem, rank, step)
        seen.append((str(caught.value), done))
    return seen


@every_rule
def test_non_finite_replica_is_named(name: str) -> None:
    """Named on every rank at the next boundary; one round late where the rule overlaps."""
    ranks = run(one_goes_bad, 2, name)
    tried = itertools.product(meeting_cases(name, 2), NON_FINITE)
    for ((index, _), _), zero, one in zip(tried, *ranks, strict=True):
        assert zero == one
        message, step = zero
        assert step == oracle.CASES[name][index].noticed_at()[1]
        assert message.startswith("rank 1 brought NaN or infinity")
        assert "weights.2" in message
