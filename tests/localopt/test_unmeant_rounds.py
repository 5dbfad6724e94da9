"""Rounds that are not what was meant: it is told, once on each rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from localopt import QSR, Constant, LocalOptimizer, LocalSGD, PostLocal
from tests.support.ranks import run

pytestmark = pytest.mark.slow

STEPS, WARMUP = 60, 12


def risen(step: int) -> float:
    """From a hundredth of the peak, 0.1, to it, and then down to nearly 0."""
    return 0.1 * (max(0.01, step / WARMUP) if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))


def qsr(**settings: Any) -> QSR:
    return QSR(alpha=0.1, base=2, total_steps=STEPS, **settings)


# Period, rate, steps made; what the one warning says, or "" for none.
CASES: dict[str, tuple[Any, Callable[[int], float], int, str]] = {
    "warm-up": (qsr(), risen, STEPS, "risen from 0.001 to "),
    "from 0": (qsr(), lambda step: 0.1 * step / STEPS, STEPS, "risen from 0 to "),
    "warm-up, said": (qsr(warmup_steps=WARMUP), risen, STEPS, ""),
    "warm-up, short rounds": (qsr(h_max=3), risen, STEPS, ""),
    "warm-up, another period": (Constant(30), risen, STEPS, ""),
    "warm-up, post-local": (PostLocal(switch_step=20, h=10), risen, STEPS, ""),
    "no warm-up": (qsr(), lambda step: 0.1 * (1 - step / STEPS), STEPS, ""),
    "rises a little": (qsr(), lambda step: 0.1 * (1 + step / STEPS), STEPS, ""),
    "a rate in a tensor": (qsr(), lambda step: torch.tensor(risen(step)), STEPS, ""),
    "a function": (lambda step, lr: 5, risen, STEPS, ""),
    "past the end": (qsr(), lambda step: 0.1, STEPS + 9, f"step {STEPS} is past the end"),
}


def warned(rank: int, m: int) -> dict[str, list[str]]:
    found = {}
    for name, (period, rate, steps, _) in CASES.items():
        p = nn.Parameter(torch.zeros(3))
        optimizer = LocalSGD([p], lr=0.1, period=period)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = rate(step)
                p.grad = torch.full((3,), 1.0 + rank)
                optimizer.step()
        found[name] = [str(warning.message) for warning in caught]
    return found


def test_it_is_told_once_on_each_rank() -> None:
    for rank, found in enumerate(run(warned, 2)):
        for name, (*_, part) in CASES.items():
            assert [part in text for text in found[name]] == [True] * bool(part), found[name]
        assert all(text.startswith(f"rank {rank}: ") for texts in found.values() for text in texts)
        assert "Give the period warmup_steps" in found["warm-up"][0]
        assert "counts optimizer steps, of all epochs" in found["past the end"][0]


def stepped(rank: int, m: int, how: str) -> list[str]:
    p = nn.Parameter(torch.zeros(3))
    inner = torch.optim.SGD([p], lr=0.1)
    optimizer = LocalOptimizer(inner, Constant(2), auto=how != "by hand")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            p.grad = torch.full((3,), 1.0 + rank)
            (inner if how in ("inner", "inner, counted") else optimizer).step()
            if how in ("by hand", "inner, counted"):
                optimizer.average()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("how", ["inner", "inner, counted", "by hand", "itself"])
def test_an_inner_optimizer_that_steps_by_itself_is_told(how: str) -> None:
    for told in run(stepped, 2, how):
        assert ["two steps that do not count" in text for text in told] == [True] * (how == "inner")


def test_one_replica_has_nobody_to_meet() -> None:
    (found,) = run(warned, 1)
    assert found == {name: [] for name in CASES}
