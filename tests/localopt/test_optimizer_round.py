"""LocalOptimizer in one process: the round, what is evaluated, and its figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from localopt import QSR, Constant, LocalAdamW, LocalSGD
from localopt.traffic import Meter
from tests.support.small_network import network, train

# The round.


def test_place_in_the_round() -> None:
    """H is chosen at a round's first step; `synced`, `h` and `round` tell where we are."""
    model = network()
    asked = []

    def period(step: int, lr: float) -> int:
        asked.append((step, lr))
        return 3

    optimizer = LocalSGD(model.parameters(), 0.5, period=period)
    assert (optimizer.synced, optimizer.h, optimizer.round) == (True, 0, 0)
    seen = []
    for step in range(7):
        optimizer.param_groups[0]["lr"] = 0.5 / (step + 1)
        optimizer.step()
        seen.append((optimizer.synced, optimizer.round))
    assert seen == [
        (False, 0), (False, 0), (True, 1), (False, 1), (False, 1), (True, 2), (False, 2),
    ]  # fmt: skip
    assert asked == [(0, 0.5), (3, 0.125), (6, pytest.approx(0.5 / 7))]
    optimizer.finish()
    assert (optimizer.synced, optimizer.h, optimizer.round) == (True, 3, 3)
    optimizer.finish()
    assert optimizer.round == 3


def test_rate_is_group_0s() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.001}]
    optimizer = LocalSGD(groups, period=QSR(0.2, 1))
    optimizer.step()
    assert optimizer.h == 4


def test_by_hand() -> None:
    """auto=False: "the caller calls it himself (optimizer.step(); optimizer.average())"."""
    optimizer = LocalSGD(network().parameters(), period=Constant(3), auto=False)
    ended = []
    for _ in range(6):
        optimizer.step()
        ended.append(optimizer.average())
    assert ended == [False, False, True] * 2
    skipped = [optimizer.average() for _ in range(3)]  # a loop that skips bad batches
    assert skipped == [False, False, True] and optimizer.round == 3


@pytest.mark.parametrize("h", [0, -1, 2.0, None, 2**63])
def test_period_must_give_a_count(h: Any) -> None:
    optimizer = LocalSGD(network().parameters(), period=lambda step, lr: h)
    with pytest.raises(ValueError, match=r"period gave H = .* at step 0"):
        optimizer.step()


def test_failed_step_does_not_count() -> None:
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(2))

    def closure() -> float:
        raise KeyError("no data")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    train(model, optimizer, range(1))
    assert not optimizer.synced
    train(model, optimizer, range(1))
    assert optimizer.synced and optimizer.round == 1


# consensus().


def test_consensus_restores() -> None:
    """"restored on exit": parameters and buffers, also after an exception, in mid-round or not."""
    model = network()
    optimizer = LocalAdamW(model.parameters(), period=Constant(2), model=model)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(KeyError), optimizer.consensus():
            model(torch.randn(5, 4))  # moves BatchNorm's statistics
            raise KeyError
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    train(model, optimizer, range(2))
    assert optimizer.round == 3


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_refused_inside_consensus(steps: int) -> None:
    """What would be lost on exit, or saved as what it is not: in mid-round and between rounds."""
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(2), auto=False)
    for _ in range(steps):
        optimizer.step()
        optimizer.average()
    group = {"params": [nn.Parameter(torch.ones(1))]}
    state = optimizer.state_dict()
    calls = {
        "step": optimizer.step,
        "average": optimizer.average,
        "finish": optimizer.finish,
        "consensus": lambda: optimizer.consensus().__enter__(),
        "add_param_group": lambda: optimizer.add_param_group(group),
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(state),
    }
    with optimizer.consensus():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"{name}\(\) inside consensus\(\)"):
                call()
    optimizer.step()


# Figures.


def test_wait() -> None:
    """Waits add up by rank; of ranks that were not met nothing is known."""
    meter = Meter(torch.device("cpu"), 4)
    meter.count_waits({0: 2.0, 1: 0.0, 2: 0.5})
    meter.count_waits({0: 3.0, 1: 3.0})
    assert meter.traffic.wait == [5.0, 3.0, 0.5, 0.0]


def test_one_replica_sends_nothing() -> None:
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(2), track_drift=True)
    train(model, optimizer, range(4))
    traffic = optimizer.traffic
    assert (traffic.syncs, traffic.bytes, traffic.other_bytes, traffic.hidden) == (2, 0, 0, 0)
    assert traffic.wait == [0.0] and optimizer.drift == 0.0
