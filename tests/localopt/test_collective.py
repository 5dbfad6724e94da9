"""Every collective by itself: what arrives, and the bytes that it says it has sent."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch

from localopt import AbsentRankError
from localopt.collective import Collective
from localopt.faults import control
from tests.support.ranks import run

pytestmark = pytest.mark.slow

SIZES = (12, 60)  # elements of float64: 576 bytes together


def every_collective(rank: int, m: int) -> dict[str, tuple[list[list[float]], int]]:
    """What this rank then holds, and the bytes told."""
    group = Collective()

    def mine() -> list[torch.Tensor]:
        return [torch.full((n,), rank + 1.0, dtype=torch.float64) for n in SIZES]

    seen = {}
    for name, call in {
        "sum": group.sum_,
        "mean": lambda tensors: group.mean_(tensors, tensors),
        "from rank 1": lambda tensors: group.broadcast_(tensors, 1),
    }.items():
        tensors = mine()
        sent = call(tensors)
        seen[name] = [tensor.tolist() for tensor in tensors], sent
    tensors = mine()
    pending = group.start_sum_(tensors)
    pending.wait()
    assert pending.done()
    seen["behind"] = [tensor.tolist() for tensor in tensors], pending.bytes
    shards = torch.full((m, 6), rank + 1.0, dtype=torch.float64)
    got, pending = group.start_exchange_shards(shards)
    pending.wait()
    seen["exchanged"] = got().tolist(), pending.bytes
    rows = torch.zeros(m, 6, dtype=torch.float64)
    rows[rank] = rank + 1.0
    pending = group.start_rows_(rows)
    pending.wait()
    seen["rows behind"] = rows.tolist(), pending.bytes
    rows = torch.zeros(m, 6, dtype=torch.float64)
    rows[rank] = rank + 1.0
    pending = group.start_gather_shards_(rows)
    pending.wait()
    seen["gathered"] = rows.tolist(), pending.bytes
    return seen


@pytest.mark.parametrize("m", [2, 3, 4])
def test_what_arrives_and_what_is_sent(m: int) -> None:
    """A ring sends 2 (m - 1) / m of the payload, a broadcast (m - 1) / m as the ranks' mean, and
    shards all but one's own."""
    payload, total = 8 * sum(SIZES), sum(range(1, m + 1))
    ring, shards = 2 * (m - 1) * payload // m, 8 * 6 * (m - 1)
    rows = [[float(i + 1)] * 6 for i in range(m)]
    for seen in run(every_collective, m):
        assert seen == {
            "sum": ([[float(total)] * n for n in SIZES], ring),
            "mean": ([[pytest.approx(total / m, rel=1e-15)] * n for n in SIZES], ring),
            "from rank 1": ([[2.0] * n for n in SIZES], (m - 1) * payload // m),
            "behind": ([[float(total)] * n for n in SIZES], ring),
            "exchanged": (rows, shards),
            "rows behind": (rows, shards),
            "gathered": (rows, shards),
        }


def late(rank: int, m: int) -> tuple[bool, list[float], list[list[float]]]:
    """Rank 1 takes its time; what the others have once they have waited."""
    group = Collective()
    x, rows = torch.full((4,), rank + 1.0), torch.zeros(m, 2)
    rows[rank] = rank + 1.0
    if rank == 1:
        time.sleep(0.5)
    total, told = group.start_sum_([x]), group.start_rows_(rows)
    there = total.done()
    total.wait()
    told.wait()
    return there, x.tolist(), rows.tolist()


def test_what_runs_behind_is_waited_for() -> None:
    """What is read after `wait` is whole, also where a rank comes late."""
    whole = [3.0] * 4, [[1.0] * 2, [2.0] * 2]
    first, second = run(late, 2)
    assert not first[0]
    assert first[1:] == second[1:] == whole


def test_one_rank_sends_nothing() -> None:
    (seen,) = run(every_collective_alone, 1)
    assert seen == [0] * 7


def every_collective_alone(rank: int, m: int) -> list[int]:
    group, x = Collective(), torch.ones(2, 3)
    rows, exchange = group.start_exchange_shards(x)
    assert torch.equal(rows(), torch.ones(2, 3))
    told = [group.sum_([x]), group.mean_([x], [x]), group.broadcast_([x])]
    behind = exchange, group.start_gather_shards_(x), group.start_sum_([x]), group.start_rows_(x)
    told += [pending.bytes for pending in behind]
    assert torch.equal(x, torch.ones(2, 3))
    return told


def leave_notes(rank: int, m: int) -> list[str]:
    """A note each; one is asked for that nobody has left."""
    board = control.Board(Collective(), "test")
    board.put(f"of {rank}", f"note {rank}")
    found = board.get([f"of {r}" for r in range(m)], timedelta(seconds=100))
    if m > 1:
        with pytest.raises(AbsentRankError, match="nobody's: not there within 0 s"):
            board.get(["nobody's"], timedelta(seconds=0.1))
    return found


@pytest.mark.parametrize("m", [1, 3])
def test_notes_are_found_by_all(m: int) -> None:
    assert run(leave_notes, m) == [[f"note {r}" for r in range(m)]] * m
