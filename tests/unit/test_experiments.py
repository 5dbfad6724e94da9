"""The statistics that the studies report."""

from __future__ import annotations

import math

import pytest

from experiments import rules
from experiments.statistics import mean_and_interval


def test_intervals_are_students() -> None:
    """Five values, by hand: mean 3, s² = 2.5, t(0.975, 4) = 2.776445."""
    mean, half = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert math.isnan(mean_and_interval([1.0])[1])


def test_rows_are_kept_and_put_in_a_table(tmp_path) -> None:
    path = tmp_path / "results" / "rules.csv"
    assert rules.read(path) == []
    for seed, top1 in enumerate((0.98, 1.0)):
        row = dict.fromkeys(rules.COLUMNS, 0) | {
            "rule": "EASGD", "replicas": 2, "seed": seed, "top1": top1, "steps": 880, "syncs": 220,
        }  # fmt: skip
        rules.append(path, row)
    assert len(rules.read(path)) == 2
    line = rules.table(rules.read(path)).splitlines()[-1]
    assert line.startswith("| EASGD | 99.00 ± 12.71 % | 220 of 880 | 0 | 0.0 | 0.0 |")
