"""What the benchmarks make of what they have measured."""

from __future__ import annotations

import pytest

from benchmarks.growth import fitted, pieces


def test_the_line_of_exact_times_is_found() -> None:
    sizes = [1.0, 4.0, 16.0, 1024.0]
    assert fitted(sizes, [0.003 + 0.02 * b for b in sizes]) == pytest.approx((0.003, 0.02))


def test_latency_is_not_negative() -> None:
    """Where large messages go faster, the best line would begin below zero."""
    alpha, beta = fitted([1.0, 2.0, 4.0], [0.5, 1.5, 3.5])
    assert alpha == 0.0 and 0.5 < beta < 0.875


def test_errors_are_relative() -> None:
    """Small times count as large ones do: a fit of absolute errors would miss them by far."""
    sizes, seconds = [1.0, 10.0, 100.0, 1000.0], [1.1, 10.0, 100.0, 900.0]
    alpha, beta = fitted(sizes, seconds)
    assert all(abs((alpha + beta * b) / t - 1) < 0.07 for b, t in zip(sizes, seconds, strict=True))


def test_pieces_make_up_the_whole() -> None:
    assert pieces(10, 4) == [4, 4, 2] and pieces(8, 4) == [4, 4]
