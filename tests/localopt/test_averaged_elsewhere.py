"""Replicas that never part: gradients are averaged elsewhere, or all have the same data.

That is told, once on each rank, after the second or third round; and never where there is another
reason why replicas are equal.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from localopt import EASGD, Average, Constant, LocalOptimizer, Streaming
from localopt.elsewhere import reason_of
from tests.support import oracle
from tests.support.contract import equal_on_all_ranks, every_case, new_rule
from tests.support.ranks import run

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Run:
    """How a network is trained.

    Args:
        wraps: when the model is wrapped: "before" the optimizer is built, "after", or never ("").
        rounds: H, and how many.
    """

    wraps: str = "after"
    h: int = 2
    rounds: int = 7
    rule: Any = Average
    named: bool = True
    no_sync: bool = False
    lr: float = 0.05
    same_data: bool = False
    by_hand: bool = False
    losses: bool = False
    check_finite: bool = True
    alone: bool = False
    frozen: bool = False


def training(rank: int, setting: Run) -> list[tuple[int, str]]:
    """What is warned of, with the rounds finished until then."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    called: nn.Module = model
    if setting.wraps == "before":
        called = DistributedDataParallel(model)
    inner = torch.optim.SGD(called.parameters(), lr=setting.lr, momentum=0.9)
    optimizer = LocalOptimizer(
        inner, Constant(setting.h), setting.rule(), model=model if setting.named else None,
        check_finite=setting.check_finite, alone=setting.alone,
    )  # fmt: skip
    if setting.wraps == "after":
        called = DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(0 if setting.same_data else rank)
    told = []
    for _ in range(setting.h * setting.rounds):
        optimizer.zero_grad()
        with called.no_sync() if setting.no_sync else contextlib.nullcontext():
            loss = called(torch.randn(5, 4, generator=generator)).square().mean()
            loss.backward()
        for p in model.parameters():
            if setting.by_hand:
                dist.all_reduce(p.grad)
                p.grad /= 2
            if setting.frozen:
                p.grad.zero_()
        if setting.losses or optimizer.sync.needs_loss:
            optimizer.record_loss(loss)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        told += [(optimizer.round, str(w.message)) for w in caught]
    parted = setting.no_sync or setting.alone or not (setting.wraps or setting.by_hand)
    parted = parted and not setting.same_data
    if not parted:
        assert equal_on_all_ranks(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    return told


AVERAGES = " averages gradients at every step, so that local steps save nothing"
WRAPPED = "DistributedDataParallel, in which the model is wrapped," + AVERAGES
OUTSIDE = "something outside localopt" + AVERAGES
SAME = "their losses as well, so all train on the same data, and more replicas learn no more"
EITHER = "either all train on the same data, "
WARNED: dict[str, tuple[Run, str]] = {
    "wrapped after": (Run(), WRAPPED),
    "wrapped before": (Run("before", named=False), WRAPPED),
    "nobody told of the model": (Run(named=False), WRAPPED),
    "losses recorded": (Run(losses=True), WRAPPED),
    "unchecked": (Run(check_finite=False), WRAPPED),
    "long rounds": (Run(h=5), WRAPPED),
    "behind training": (Run(rule=EASGD), WRAPPED),
    "blocking": (Run(rule=lambda: EASGD(overlap=False), check_finite=False), WRAPPED),
    "fragments": (Run(rule=lambda: Streaming(2), h=4), WRAPPED),
    "by hand": (Run("", by_hand=True, losses=True), OUTSIDE),
    "by hand, unchecked": (Run("", by_hand=True, losses=True, check_finite=False), OUTSIDE),
    "by hand, behind training": (Run("", by_hand=True, losses=True, rule=EASGD), OUTSIDE),
    "equal data": (Run("", same_data=True, losses=True), SAME),
    "equal data, behind training": (Run("", same_data=True, losses=True, rule=EASGD), SAME),
    "equal data, no losses": (Run("", same_data=True), EITHER),
    "by hand, no losses": (Run("", by_hand=True), EITHER),
}


def trainings(rank: int, m: int, names: list[str]) -> dict[str, list[tuple[int, str]]]:
    settings = {**{name: setting for name, (setting, _) in WARNED.items()}, **QUIET}
    return {name: training(rank, settings[name]) for name in names}


def check_warned(
    rank: int, told: list[tuple[int, str]], who: str, rounds: range, what: Any
) -> None:
    assert len(told) == 1, (what, told)
    ((round_, text),) = told
    assert round_ in rounds, (what, round_)
    assert text.startswith(f"rank {rank}: all replicas were equal, bit for bit, after "), text
    assert f"): {who}" in text, (what, text)
    assert ("or train within its no_sync()" in text) == (who != SAME)
    assert ("DistributedSampler" in text) == (who in (SAME, EITHER))


def test_it_is_told_once_on_each_rank() -> None:
    for rank, told in enumerate(run(trainings, 2, list(WARNED))):
        for name, (_, who) in WARNED.items():
            first = 1 if name == "fragments" else 2  # several a round
            late = "behind training" in name
            check_warned(rank, told[name], who, range(first, 4 + late), name)


def with_every_rule(rank: int, m: int) -> dict[Any, list[tuple[int, str]]]:
    return {
        (name, index): training(rank, Run(rule=lambda n=name, i=index: new_rule(n, i), rounds=9))
        for name, index, _ in every_case()
        if index in (0, len(oracle.CASES[name]) - 1)  # to look costs more than to train
    }


def test_it_is_told_with_every_rule() -> None:
    """Where groups of one meet seldom, so much later."""
    for rank, seen in enumerate(run(with_every_rule, 2)):
        for (name, index), told in seen.items():
            settings = oracle.CASES[name][index].settings_for(2)
            every = settings["global_every"] if settings.get("group_size") == 1 else 1
            last = 3 * every + oracle.CASES[name][index].delay
            first = 1 if settings.get("fragments", 1) > 1 else 2
            check_warned(rank, told, WRAPPED, range(first, last + 1), (name, index))


QUIET: dict[str, Run] = {
    "each its own": Run(""),
    "each its own, with losses": Run("", losses=True),
    "no_sync": Run(no_sync=True, losses=True),
    "lr 0": Run("", lr=0.0, losses=True),
    "lr 0, wrapped": Run(lr=0.0),
    "no gradient": Run(frozen=True, losses=True),
    "H = 1": Run(h=1, rounds=12),
    "H = 1, behind training": Run(h=1, rounds=12, rule=EASGD),
    "H = 1, by hand": Run("", h=1, rounds=12, by_hand=True, losses=True),
    "alone": Run(alone=True, losses=True),
}


def test_nothing_is_told_where_nothing_is_wrong() -> None:
    for told in run(trainings, 2, list(QUIET)):
        assert told == {name: [] for name in QUIET}


def test_one_rank() -> None:
    """Wrapped or not: nobody to average with."""
    (told,) = run(trainings, 1, ["losses recorded", "by hand", "long rounds"])
    assert [*told.values()] == [[], [], []]


def only_at_first(rank: int, m: int) -> list[str]:
    """Replicas that are equal in the first rounds alone, and their gradients 0."""
    p = nn.Parameter(torch.zeros(9))
    optimizer = LocalOptimizer(torch.optim.SGD([p], lr=0.1), Constant(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(24):
            p.grad = torch.ones(9) * (step >= 6) * (1 + rank)
            optimizer.record_loss(1.0 + rank * (step >= 6))
            optimizer.step()
            if step >= 6 and step % 2 == 0:
                assert not equal_on_all_ranks(p.detach())
    return [str(w.message) for w in caught]


def test_replicas_that_part_later() -> None:
    assert run(only_at_first, 2) == [[], []]


def test_the_reason() -> None:
    """What is known of it, without ranks."""
    p = nn.Parameter(torch.ones(3))
    assert reason_of([p], [1.0, 2.0]).startswith(OUTSIDE), "no gradients are left to look at"
    p.grad = torch.tensor([0.0, 1.0, float("inf")])
    assert reason_of([p], [1.0, 2.0]) == "", "GradScaler skips a step that overflows"
    p.grad = torch.zeros(3)
    assert reason_of([p], [1.0, 2.0]) == ""
    p.grad = torch.ones(3)
    assert reason_of([p], [1.0, 2.0]).startswith(OUTSIDE)
    assert reason_of([p], [1.0, 1.0]).startswith(SAME)
    for losses in ([1.0, float("nan")], []):
        assert reason_of([p], losses).startswith(EITHER)


# Steps that one replica skips.


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
