"""After an error in a synchronisation a replica holds what it held, or says that it is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localopt import (
    Average,
    BlockMomentum,
    CollectiveError,
    Constant,
    LocalOptimizer,
    LocalSGD,
    NonFiniteError,
    ReplicaMismatchError,
    SyncError,
)
from localopt.collective import Collective
from localopt.replica import Replica
from tests.support.contract import Model, every_case, local_optimizer, new_rule
from tests.support.ranks import outcomes_of, run

pytestmark = pytest.mark.slow

H = 2


def step(optimizer: LocalOptimizer, rank: int) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = p.detach() - (1.0 + rank)
    optimizer.record_loss(float(rank))
    optimizer.step()


def weights(optimizer: LocalOptimizer) -> list[Tensor]:
    return [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]


class Before:
    """What the parameters were when the rule was asked to end a round, or to land a mean."""

    def __init__(self, optimizer: LocalOptimizer) -> None:
        self.weights: list[Tensor] = []
        for name in ("end_round", "after_step", "finish", "enter_consensus"):
            self._watch(optimizer, optimizer.sync, name)
        copied = optimizer.sync._copied
        if copied is not None and copied.fragments:  # one that arrives is used before the next
            self._watch(optimizer, copied, "land")

    def _watch(self, optimizer: LocalOptimizer, what: Any, name: str) -> None:
        call = getattr(what, name)

        def remembering(*args: Any, **kwargs: Any) -> Any:
            self.weights = weights(optimizer)
            return call(*args, **kwargs)

        setattr(what, name, remembering)


def refused(optimizer: LocalOptimizer, rank: int) -> None:
    """No call goes on, and each tells why."""
    for call in (
        lambda: step(optimizer, rank), optimizer.average, optimizer.finish,
        optimizer.consensus().__enter__, optimizer.state_dict,
    ):  # fmt: skip
        with pytest.raises(SyncError, match="Go on from the newest checkpoint"):
            call()


# A peer that dies.


def before_it(rank: int, m: int, name: str, index: int, inner: str) -> None:
    """Rank 1 is gone before rank 0 comes to meet it, at a round's end or in finish()."""
    model = Model()
    optimizer = local_optimizer(name, index, inner, model, Constant(H))
    for _ in range(4 * H):
        step(optimizer, rank)
    before = Before(optimizer)
    if rank == 1:
        os._exit(0)
    with pytest.raises(SyncError, match="rank 0: the synchronisation at step"):
        for _ in range(3 * H):
            step(optimizer, rank)
    assert all(map(torch.equal, before.weights, weights(optimizer))), (name, index)
    assert all(x.isfinite().all() for x in model.state_dict().values())


@pytest.mark.parametrize(("name", "index", "inner"), every_case())
def test_a_peer_that_dies_before_it(name: str, index: int, inner: str) -> None:
    """The weights are those of before, for every case of every rule."""
    (ok, told), _ = outcomes_of(before_it, 2, name, index, inner)
    assert ok, told


def within_it(rank: int, m: int, rule: str) -> None:
    """Rank 1 dies after the headers: rank 0's parameters are being overwritten then."""
    p = nn.Parameter(torch.arange(50.0))
    optimizer = LocalSGD([p], 0.1, period=Constant(H), sync=new_rule(rule, 0))
    for _ in range(2 * H + 1):
        step(optimizer, rank)
    if rank == 1:
        meet = Replica.meet
        Replica.meet = lambda *a, **k: (meet(*a, **k), os._exit(0))
    before = weights(optimizer)
    with pytest.raises(CollectiveError, match="which are NaN now"):
        step(optimizer, rank)
    assert len(before) == 1 and p.isnan().all()
    refused(optimizer, rank)


@pytest.mark.parametrize("rule", ["Average", "BlockMomentum", "HierarchicalAverage"])
def test_a_peer_that_dies_within_it(rule: str) -> None:
    """Nobody can miss that the parameters are lost."""
    (ok, told), _ = outcomes_of(within_it, 2, rule)
    assert ok, told


def in_consensus(rank: int, m: int) -> None:
    p = nn.Parameter(torch.arange(50.0) + rank)
    optimizer = LocalSGD([p], 0.1, period=Constant(3))
    step(optimizer, rank)
    before = weights(optimizer)
    if rank == 1:
        meet = Replica.meet
        Replica.meet = lambda *a, **k: (meet(*a, **k), os._exit(0))
    with pytest.raises(CollectiveError), optimizer.consensus():
        pass
    assert all(map(torch.equal, before, weights(optimizer)))


def test_a_peer_that_dies_within_a_consensus() -> None:
    """There is a copy, and it is written back."""
    (ok, told), _ = outcomes_of(in_consensus, 2)
    assert ok, told


# Replicas that do not fit.


def nan(optimizer: LocalOptimizer) -> None:
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].view(-1)[0] = float("nan")


def rate(optimizer: LocalOptimizer) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def one_step_more(optimizer: LocalOptimizer) -> None:
    optimizer._replica.round.step += 1


def longer_round(optimizer: LocalOptimizer) -> None:
    optimizer.period = Constant(H + 1)


ODD: dict[str, tuple[Callable[[LocalOptimizer], None], type[SyncError], str]] = {
    "NaN": (nan, NonFiniteError, "rank 1 brought NaN"),
    "another learning rate": (rate, ReplicaMismatchError, "learning rates of rank 0 and rank 1"),
    "another step": (one_step_more, ReplicaMismatchError, "rank 1 at step"),
    "another H": (longer_round, ReplicaMismatchError, "with H 3"),
}  # fmt: skip


def odd_one(rank: int, m: int, kind: str, dtype: torch.dtype) -> None:
    make_odd, error, told = ODD[kind]
    for name, index, inner in every_case():
        if index:
            continue
        optimizer = local_optimizer(name, index, inner, Model(dtype), Constant(H))
        for _ in range(4 * H):
            step(optimizer, rank)
        if rank == 1:
            make_odd(optimizer)
        before = Before(optimizer)
        with pytest.raises(error) as caught:
            for _ in range(3 * (H + 1)):
                step(optimizer, rank)
        assert told in str(caught.value), (name, str(caught.value))
        for a, b in zip(before.weights, weights(optimizer), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ODD)
def test_replicas_that_do_not_fit(kind: str, dtype: torch.dtype) -> None:
    """Named on all, under every rule, with weights as they were."""
    run(odd_one, 2, kind, dtype)


# What was owed.


def owing(rank: int, m: int, fails: bool) -> list[float]:
    """A synchronisation fails once, before it has begun; the state is loaded elsewhere."""
    p = nn.Parameter(torch.arange(40.0) * (rank + 1))
    optimizer = LocalSGD([p], 0.1, momentum=0.9, period=Constant(3), sync=Average())
    for _ in range(5):
        step(optimizer, rank)
    if fails:
        whole = Collective.start_rows_

        def broken(*_: Any) -> int:
            raise RuntimeError("Connection reset by peer")

        Collective.start_rows_ = broken
        with pytest.raises(CollectiveError, match=r"step 6 failed.*Connection reset by peer"):
            step(optimizer, rank)
        Collective.start_rows_ = whole
        assert not optimizer.synced and optimizer.round == 1
        state, held = optimizer.state_dict(), p.detach().clone()
        p = nn.Parameter(torch.zeros(40))
        optimizer = LocalSGD([p], 0.1, momentum=0.9, period=Constant(3), sync=Average())
        optimizer.load_state_dict(state)
        with torch.no_grad():
            p.copy_(held)
        assert optimizer.average(), "the synchronisation that is owed, and no step"
    else:
        step(optimizer, rank)
    for _ in range(4):
        step(optimizer, rank)
    optimizer.finish()
    return [float(optimizer.round), *p.tolist()]


def test_what_is_owed_can_be_made() -> None:
    """The resumed run is the one in which nothing has failed."""
    whole, failed = run(owing, 2, False), run(owing, 2, True)
    assert whole == failed and whole[0][0] == 4


def longer(rank: int, m: int) -> list[float]:
    """Or the round goes on for a step: the gradient was that of this replica's weights."""
    p = nn.Parameter(torch.full((4,), float(rank)))
    optimizer = LocalSGD([p], 0.5, period=Constant(2))
    step(optimizer, rank)
    whole = Collective.start_rows_
    Collective.start_rows_ = lambda *_: (_ for _ in ()).throw(RuntimeError("reset"))
    with pytest.raises(CollectiveError):
        step(optimizer, rank)
    Collective.start_rows_ = whole
    step(optimizer, rank)
    assert optimizer.synced and (optimizer.round, optimizer._replica.round.step) == (1, 3)
    return p.tolist()


def test_otherwise_the_round_is_longer() -> None:
    # x ← x - 0.5 (x - 1 - r) three times, from 0: 7/8 of the way to 1 + r; then the mean.
    assert run(longer, 2) == [[7 / 8 * 1.5] * 4] * 2


class Raises(torch.optim.SGD):
    """An outer optimizer that fails when it is to step on something."""

    def step(self, closure: Any = None) -> None:
        if any(p.numel() == 40 for g in self.param_groups for p in g["params"]):
            raise ArithmeticError("outer")


def outer_fails(rank: int, m: int) -> None:
    p = nn.Parameter(torch.arange(40.0))
    rule = BlockMomentum(lambda params: Raises(params, lr=0.5))
    optimizer = LocalSGD([p], 0.1, period=Constant(1), sync=rule)
    with pytest.raises(ArithmeticError, match="outer"):
        step(optimizer, rank)
    assert p.isnan().all()
    refused(optimizer, rank)


def test_an_outer_optimizer_that_raises() -> None:
    run(outer_fails, 2)
