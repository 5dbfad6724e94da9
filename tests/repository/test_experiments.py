"""The statistics that the studies report."""

from __future__ import annotations

import math
import re
import statistics

import pytest

from experiments import communication, from_scratch, periods, rules
from experiments.rows import append, read
from experiments.small import Setting
from experiments.statistics import accuracy, accuracy_interval, mean_and_interval


def test_intervals_are_students() -> None:
    """Five values, by hand: mean 3, s² = 2.5, t(0.975, 4) = 2.776445."""
    mean, half = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert math.isnan(mean_and_interval([1.0])[1])


def test_intervals_of_accuracies_stay_below_one() -> None:
    """By hand: p = 0.98, s = 0.02, n = 4, t(0.975, 3) = 3.182446, se(logit) = 0.01 / 0.0196."""
    low, high = accuracy_interval([1.0, 1.0, 0.96, 0.96], 100)
    half = 3.182446 * statistics.stdev([1.0, 1.0, 0.96, 0.96]) / 2 / (0.98 * 0.02)
    odds = math.log(0.98 / 0.02)
    assert low == pytest.approx(1 / (1 + math.exp(half - odds)), rel=1e-6)
    assert high == pytest.approx(1 / (1 + math.exp(-half - odds)), rel=1e-6)
    assert low < 0.98 < high < 1
    assert accuracy_interval([1.0, 1.0], 100)[1] < 1
    assert accuracy([0.5], 100) == "50.00 %"


def test_rows_are_kept_and_put_in_a_table(tmp_path) -> None:
    path = tmp_path / "results" / "rules.csv"
    assert read(path) == []
    for seed, top1 in enumerate((0.98, 1.0)):
        row = {
            "rule": "EASGD", "replicas": 2, "seed": seed, "top1": top1, "steps": 880, "syncs": 220,
            "bytes": 0, "exposed": 0, "hidden": 0,
        }  # fmt: skip
        append(path, row)
    assert len(read(path)) == 2
    line = rules.table(read(path)).splitlines()[-1]
    assert line.startswith("| EASGD | 99.00 (0.03 to 100.00) % | 220 of 880 | 0 | 0.0 | 0.0 |")


def test_the_time_to_an_accuracy() -> None:
    epochs = [{"seconds": s, "accuracy": a} for s, a in ((2.0, 0.5), (1.0, 0.96), (1.0, 0.94))]
    assert from_scratch.time_to(0.5, epochs) == 2.0
    assert from_scratch.time_to(0.95, epochs) == 3.0
    assert math.isnan(from_scratch.time_to(0.97, epochs))


def test_the_tables_of_from_scratch(tmp_path) -> None:
    path = tmp_path / "from_scratch.csv"
    for seed, seconds in enumerate((1.0, 3.0)):
        for case in (from_scratch.Case("ring_all_reduce", 2), from_scratch.Case("ddp", 4)):
            row = case._asdict() | {
                "seed": seed, "seconds": seconds, "cores": 2, "accuracy": 1, "loss": 1,
                "compute": 1, "send": 1, "wait": 1,
                "target_seconds": math.nan if seed else 4, "bytes": None,
            }  # fmt: skip
            append(path, row)
    first, second, third = re.findall(r"(?:^\|.*\n?)+", from_scratch.tables(read(path)), re.M)
    assert "| ring_all_reduce | 2 | 100.00 ± 0.00 % | 2.000 ± 12.706 | 1.000 |" in first
    assert "\n| 2 | 2.000 ± 12.706 | - | - | not reached in 1 of 2 | - | - |" in second
    assert "\n| 4 | - | - | 2.000 ± 12.706 | - | - | not reached in 1 of 2 |" in second
    assert "\n| 1438 | 2.000 ± 12.706 |" in third


def test_periods_synchronise_as_often_as_qsr() -> None:
    """But for data-parallel; a constant H to the nearest integer."""
    setting = Setting(steps=3000)
    rounds = {name: len(periods.hs(p, setting)) for name, p in periods.periods(setting).items()}
    assert rounds.pop(periods.DATA_PARALLEL) == 3000
    qsr = rounds["QSR (H ∝ η⁻²)"]
    assert 3000 / 16 < qsr < 3000 / 4
    assert all(abs(number - qsr) <= 0.1 * qsr for number in rounds.values()), rounds


def test_tables_of_the_small_problem() -> None:
    """Differences are of equal seeds: here each is two points, and they have no spread."""
    setting = Setting()
    rows = [
        {"name": name, "seed": str(seed), "top1": str(top1 + seed / 10), "train_loss": "1",
         "syncs": "10", "longest": "4", "drift": "0.5", "sent": "2e6"}
        for name, top1 in ((periods.DATA_PARALLEL, 0.5), ("H ∝ η⁻¹", 0.52),
                           (communication.DATA_PARALLEL, 0.5), ("EASGD", 0.52))
        for seed in (0, 1)
    ]  # fmt: skip
    line = "| 57.00 ± 63.53 | +2.00 ± 0.00 |"
    assert f"| H ∝ η⁻¹ {line} 1.000 | 10 of 3,000 | 4 |" in periods.table(rows, setting)
    assert f"| EASGD | 16 | 2.0 {line} 0.500 |" in communication.table(rows, setting)
