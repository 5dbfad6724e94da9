"""Periods: pure functions (step, lr) -> H."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localopt import QSR, SWAP, Constant, Period, PostLocal, PowerRule

LEAST = 1e-6


def warm_up_then_cosine(peak: float, total: int, warmup: int) -> Callable[[int], float]:
    """Linear from LEAST to the peak over ``warmup`` steps, then cosine back to LEAST."""

    def lr(step: int) -> float:
        if step < warmup:
            return LEAST + (peak - LEAST) * step / warmup
        progress = (step - warmup) / (total - warmup)
        return LEAST + (peak - LEAST) * 0.5 * (1 + math.cos(math.pi * progress))

    return lr


def rounds_of(
    period: Callable[[int, float], int], total: int, lr: Callable[[int], float]
) -> list[tuple[int, int]]:
    """(step, H) of each round until ``total`` steps are reached or passed."""
    rounds, step = [], 0
    while step < total:
        rounds.append((step, period(step, lr(step))))
        step += rounds[-1][1]
    return rounds


@lru_cache
def golden(peak: float, total: int, warmup: int, alpha: float, base: int) -> list[tuple[int, int]]:
    period = QSR(alpha, base, warmup_steps=warmup, total_steps=total)
    return rounds_of(period, total, warm_up_then_cosine(peak, total, warmup))


@pytest.mark.parametrize(
    ("setting", "syncs", "share", "first", "last"),
    [
        (
            (0.008, 93600, 10000, 0.0175, 4),
            9711, 10.38, (17876, 5), [(81077, 1612), (82689, 2769), (85458, 8142)],
        ),
        (
            (0.008, 93600, 10000, 0.0175, 8),
            6461, 6.90, (39136, 9), [(82347, 2453), (84800, 6461), (91261, 2339)],
        ),
        (
            (0.8, 62400, 1560, 0.2, 2),
            24792, 39.73, (47306, 3), [(58736, 784), (59520, 2051), (61571, 829)],
        ),
        (
            (0.8, 62400, 1560, 0.25, 4),
            12539, 20.09, (47564, 5), [(57963, 571), (58534, 990), (59524, 2876)],
        ),
    ],
    ids=["ViT-B base 4", "ViT-B base 8", "ResNet-152 base 2", "ResNet-152 base 4"],
)  # fmt: skip
def test_golden_trajectories(
    setting: tuple[float, int, int, float, int],
    syncs: int,
    share: float,
    first: tuple[int, int],
    last: list[tuple[int, int]],
) -> None:
    """The rounds of Gu et al.'s (arXiv 2310.14423) runs on ImageNet."""
    rounds, total, base = golden(*setting), setting[1], setting[4]
    assert len(rounds) == syncs
    assert round(100 * syncs / total, 2) == share
    assert next(r for r in rounds if r[1] > base) == first
    assert rounds[-3:] == last
    assert sum(last[-1]) == total


PERIODS: dict[str, Callable[..., Period]] = {
    "Constant": lambda **common: Constant(7, **common),
    "PowerRule": lambda **common: PowerRule(0.5, 3, 1.5, **common),
    "QSR": lambda **common: QSR(0.5, 3, **common),
    "PostLocal": lambda **common: PostLocal(20, 9, **common),
    "SWAP": lambda **common: SWAP(20, **common),
}
every_period = pytest.mark.parametrize("make", PERIODS.values(), ids=PERIODS)


@every_period
@given(
    total=st.integers(1, 300),
    warmup=st.integers(0, 100),
    warmup_h=st.none() | st.integers(1, 40),
    h_max=st.none() | st.integers(1, 50),
    rate=st.floats(0, 1) | st.floats(-1, 10),
    decay=st.floats(0.8, 1),
)
@settings(max_examples=60, deadline=None)
def test_rounds_tile_the_run(
    make: Callable[..., Period],
    total: int,
    warmup: int,
    warmup_h: int | None,
    h_max: int | None,
    rate: float,
    decay: float,
) -> None:
    """Every period, warm-up included, ends its last round with the run; 1 ≤ H ≤ h_max."""
    period = make(warmup_steps=warmup, warmup_h=warmup_h, total_steps=total, h_max=h_max)
    rounds = rounds_of(period, total, lambda step: rate * decay**step)
    assert sum(rounds[-1]) == total
    for step, h in rounds:
        assert type(h) is int
        assert 1 <= h <= (h_max or total)
        if step < warmup and warmup_h is not None:
            assert h == min(warmup_h, h_max or total, total - step)
    assert period(total, 0.1) == period(total + 5, 0.1) == 1, "beyond the end"


positive = st.floats(1e-12, 1e3)


@given(alpha=positive, low=positive, high=positive, base=st.integers(1, 50), power=positive)
@settings(max_examples=200, deadline=None)
def test_power_rule(alpha: float, low: float, high: float, base: int, power: float) -> None:
    """H = max(base, floor((α/lr)^p)): never shorter where the rate is lower; QSR is p = 2."""
    low, high = sorted((low, high))
    rule = PowerRule(alpha, base, power, total_steps=10**6)
    assert base <= rule(0, high) <= rule(0, low) <= 10**6
    quadratic = PowerRule(alpha, base, 2, total_steps=10**6)
    assert QSR(alpha, base, total_steps=10**6)(3, low) == quadratic(3, low)
    if alpha / low < 900:
        assert quadratic(0, low) == max(base, math.floor((alpha / low) ** 2))


@pytest.mark.parametrize(("power", "expected"), [(1, 5), (2, 30), (3, 166), (0.5, 2)])
def test_power_rule_by_hand(power: float, expected: int) -> None:
    """lr = 0.02, α = 0.11: α/lr = 5.5."""
    assert PowerRule(0.11, 1, power)(0, 0.02) == expected


@pytest.mark.parametrize("lr", [0.0, -0.0, -1e-3, -math.inf, 5e-324, 1e-300, 1e-160, 1e-12])
def test_vanishing_rate(lr: float) -> None:
    """A rate of zero asks for the longest round there is; so does one whose H overflows."""
    assert QSR(0.1, 2, total_steps=100)(40, lr) == 60
    assert QSR(0.1, 2, h_max=50)(40, lr) == 50
    assert QSR(0.1, 2, h_max=50, total_steps=100)(70, lr) == 30


def test_vanishing_rate_without_end() -> None:
    for lr in (0.0, -1.0, 1e-300, 1e-160, 1e-12):  # the last: H exceeds 64 bits
        with pytest.raises(ValueError, match=r"QSR: at step 7 .* give total_steps or h_max"):
            QSR(0.1, 2)(7, lr)


def test_rate_that_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="QSR: the learning rate at step 5 is NaN"):
        QSR(0.1, 2, total_steps=10)(5, math.nan)
    assert QSR(0.1, 2)(5, math.inf) == 2
    assert Constant(3)(5, math.nan) == 3


def test_warm_up() -> None:
    """warmup_h, or else the base, in rounds that begin in the warm-up; these may run past it."""
    assert [QSR(1.0, 4, warmup_steps=10)(step, 0.1) for step in (0, 9, 10)] == [4, 4, 100]
    late = QSR(1.0, 4, warmup_steps=10, warmup_h=6)
    assert [late(step, 0.1) for step in (0, 6, 9, 10)] == [6, 6, 6, 100]
    assert Constant(5, warmup_steps=10)(0, 0.1) == 5
    assert Constant(5, warmup_steps=10, warmup_h=2)(9, 0.1) == 2
    assert PostLocal(0, 8, warmup_steps=3)(2, 0.1) == 1
    assert QSR(1.0, 4, warmup_steps=1)(0, math.nan) == 4, "no rate is needed yet"


def test_post_local() -> None:
    """H = 1 up to the switch, h from there."""
    period = PostLocal(switch_step=5, h=4, total_steps=15)
    rounds = rounds_of(period, 15, lambda step: 0.1)
    assert rounds == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 4), (9, 4), (13, 2)]


def test_swap() -> None:
    """H = 1 up to the switch, one round from there."""
    assert rounds_of(SWAP(3, total_steps=11), 11, lambda step: 0.1) == [
        (0, 1), (1, 1), (2, 1), (3, 8),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="SWAP needs total_steps"):
        SWAP(3)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Constant(0), "h must be an integer of at least 1, not 0"),
    (lambda: Constant(2.0), "h .* not 2.0"),
    (lambda: Constant(True), "h .* not True"),
    (lambda: Constant(1, warmup_steps=-1), "warmup_steps .* at least 0, not -1"),
    (lambda: Constant(1, warmup_h=0), "warmup_h .* not 0"),
    (lambda: Constant(1, total_steps=0), "total_steps .* not 0"),
    (lambda: Constant(1, h_max="8"), "h_max .* not '8'"),
    (lambda: QSR(0.0, 2), "alpha must be a positive number, not 0.0"),
    (lambda: QSR(math.nan, 2), "alpha .* not nan"),
    (lambda: QSR(math.inf, 2), "alpha .* not inf"),
    (lambda: QSR("0.1", 2), "alpha .* not '0.1'"),
    (lambda: QSR(0.1, 0), "base .* not 0"),
    (lambda: PowerRule(0.1, 2, -1), "power .* not -1"),
    (lambda: PostLocal(-1, 2), "switch_step .* not -1"),
    (lambda: PostLocal(1, 0), "h .* not 0"),
    (lambda: SWAP(1.5, total_steps=3), "switch_step .* not 1.5"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@every_period
def test_periods_are_values(make: Callable[..., Period]) -> None:
    """Frozen, comparable, printable: the ranks compare their texts."""
    period = make(total_steps=100)
    assert period == make(total_steps=100) != make(total_steps=99)
    assert repr(period) == repr(make(total_steps=100))
    with pytest.raises(AttributeError):
        period.total_steps = 3
