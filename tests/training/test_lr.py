"""Schedules against their closed forms."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from training.lr import Schedule
from training.settings import load

LOW, PEAK, WARMUP, SPAN = 1e-6, 0.008, 10, 110


def schedule(kind: str, **changes: object) -> Schedule:
    base = Schedule(kind, PEAK, LOW, WARMUP, SPAN, SPAN, decay_at=(30, 60), gamma=0.1)
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("kind", ["cosine", "linear", "step", "const"])
def test_the_warm_up_is_linear_from_the_final_rate(kind: str) -> None:
    rates = [schedule(kind)(step) for step in range(WARMUP + 1)]
    assert rates[0] == LOW
    assert rates[WARMUP] == PEAK
    steps = [b - a for a, b in itertools.pairwise(rates)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-9)


def test_cosine_and_linear_end_at_the_final_rate_and_stay_there() -> None:
    for kind in ("cosine", "linear"):
        assert schedule(kind)(SPAN) == pytest.approx(LOW)
        assert schedule(kind)(10 * SPAN) == pytest.approx(LOW)
        assert schedule(kind)(WARMUP + 50) == pytest.approx((PEAK + LOW) / 2)


def test_cosine_at_a_quarter() -> None:
    expected = LOW + (PEAK - LOW) * 0.5 * (1 + math.cos(math.pi / 4))
    assert schedule("cosine")(WARMUP + 25) == pytest.approx(expected, rel=1e-12)


def test_step_decays_at_its_points() -> None:
    rates = [schedule("step")(step) for step in (29, 30, 59, 60, 109)]
    assert rates == pytest.approx([PEAK, PEAK / 10, PEAK / 10, PEAK / 100, PEAK / 100])


def test_cosine_step_is_the_nearest_power_of_two_to_the_cosine() -> None:
    for step in range(WARMUP, SPAN):
        exponent = math.log2(schedule("cosine-step")(step))
        assert exponent == round(exponent)
        assert abs(exponent - math.log2(schedule("cosine")(step))) <= 0.5


def test_no_warm_up_starts_at_the_peak() -> None:
    assert schedule("cosine", warmup_steps=0)(0) == PEAK


@pytest.mark.parametrize("recipe", ["overlap", "localsgd", "sgd", "easgd", "cocod"])
def test_cifar10_recipes_have_the_rates_of_the_overlap_local_sgd_paper(recipe: str) -> None:
    """Wang et al., arXiv 2002.09539: 0.1 to 16 x 0.1 in five epochs, a tenth at 150 and 250."""
    config = load(["--recipe-pth", f"recipe/cifar10-resnet18-{recipe}.yml"])
    made = Schedule.of(config, 50_000 // 2048)
    assert (made(0), made(60)) == pytest.approx((0.1, 0.85))
    for first, last, rate in ((5, 150, 1.6), (150, 250, 0.16), (250, 300, 0.016)):
        assert made(24 * first) == made(24 * last - 1) == pytest.approx(rate)
    assert made.total_steps == 300 * 24


def test_epochs_become_steps() -> None:
    argv = ["--epochs", "5", "--epochs-for-sche", "9", "--warmup-epochs", "1.5"]
    made = Schedule.of(load([*argv, "--scheduler", "step", "--decay-points", "2", "3"]), 100)
    assert (made.warmup_steps, made.decay_steps, made.total_steps) == (150, 900, 500)
    assert made.decay_at == (200, 300)
    assert Schedule.of(load([*argv, "--warmup-steps", "7"]), 100).warmup_steps == 7
