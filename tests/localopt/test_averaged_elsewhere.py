"""Gradients that somebody else averages: replicas never part, and local steps save nothing."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from localopt import EASGD, Constant, LocalAdamW, LocalOptimizer
from tests.support.ranks import run

pytestmark = pytest.mark.slow


def told_of(rank: int, m: int, case: str) -> list[str]:
    """What is said in eight rounds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))
    wrapped = "ddp" in case
    if case == "ddp first":
        model = DistributedDataParallel(model)
    options = {"sync": EASGD()} if "easgd" in case else {}
    if "unscanned" in case:
        options["check_finite"] = False
    optimizer = LocalAdamW(
        model.parameters(), 0.0 if "no rate" in case else 0.01, weight_decay=0.0,
        period=Constant(1 if "h 1" in case else 3), **options,
    )  # fmt: skip
    outer = DistributedDataParallel(model) if wrapped and case != "ddp first" else model
    torch.manual_seed(7 if "same data" in case else rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(24):
            with outer.no_sync() if "no_sync" in case else contextlib.nullcontext():
                loss = outer(torch.randn(8, 6)).square().mean() * (0 if "zero" in case else 1)
                loss.backward()
            if "by hand" in case:
                for p in model.parameters():
                    dist.all_reduce(p.grad)
            if "losses" in case:
                optimizer.record_loss(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        optimizer.finish()
    return [str(w.message) for w in caught if "bit for bit" in str(w.message)]


AVERAGED = {
    "ddp": "DistributedDataParallel",
    "ddp first": "DistributedDataParallel",
    "ddp easgd": "DistributedDataParallel",
    "ddp unscanned": "DistributedDataParallel",
    "by hand, losses": "something outside localopt",
}
APART = ["local", "ddp no_sync", "ddp no rate", "ddp zero", "ddp h 1", "same data",
         "same data, losses"]  # fmt: skip


@pytest.mark.parametrize("case", AVERAGED)
def test_it_is_said_once(case: str) -> None:
    for told in run(told_of, 2, case):
        assert len(told) == 1 and f": {AVERAGED[case]}" in told[0], told
        assert "after 3 local steps" in told[0] and "no_sync()" in told[0]


@pytest.mark.parametrize("case", APART)
def test_no_false_alarm(case: str) -> None:
    assert run(told_of, 2, case) == [[], []]


def test_one_replica_has_nobody_to_average_with() -> None:
    assert run(told_of, 1, "ddp") == [[]]


def skipped(rank: int, m: int, how: str) -> list[str]:
    """Rank 1 skips a step; with ``how`` "counted" it counts it."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = LocalOptimizer(torch.optim.SGD([p], 0.1), Constant(4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(40):
            (p * float(rank)).sum().backward()
            if rank == 1 and step == 2:
                if how == "counted":
                    optimizer.average()
            else:
                optimizer.step()
            optimizer.zero_grad()
            if optimizer.round == 4:
                break
    return [str(w.message) for w in caught if "backward passes" in str(w.message)]


def test_a_step_that_one_replica_skips_is_named() -> None:
    for told in run(skipped, 2, "not counted"):
        assert len(told) == 1 and "{0: 4, 1: 5}" in told[0] and "call average()" in told[0]
    assert run(skipped, 2, "counted") == [[], []]
