"""What a rule says that it sends is what it sends: every case of every rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from localopt import Constant
from tests.support import oracle
from tests.support.contract import every_rule, local_optimizer, new_rule
from tests.support.ranks import run
from training.plan.cost import messages_of

NUMBERS, ROUNDS = 2**16, 8  # so many that headers do not count, and no padding
M = 4  # two groups of two


def network() -> nn.Module:
    return nn.Linear(2**8, NUMBERS // 2**8, bias=False)


def sent(rank: int, m: int, name: str) -> list[int]:
    """Bytes that this rank has sent in each case."""
    counted = []
    for index, case in enumerate(oracle.CASES[name]):
        model = network()
        optimizer = local_optimizer(name, index, case.inners[0], model, Constant(2))
        for _ in range(2 * ROUNDS):
            loss = model(torch.ones(1, 2**8)).square().sum() * (rank + 1)
            loss.backward()
            optimizer.record_loss(loss.detach())
            optimizer.param_groups[0]["lr"] = 1e-6
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.round == ROUNDS
        optimizer.finish()  # what is in flight lands; by itself it counts as other bytes
        counted.append(optimizer.traffic.bytes)
    return counted


def said(rank: int, m: int, name: str) -> list[float]:
    """Bytes that each rank should send in each case, mean over the ranks."""
    told = []
    for index, _ in enumerate(oracle.CASES[name]):
        messages = messages_of(new_rule(name, index), network(), "keep", [0] * m)
        told.append(sum(ROUNDS // n * message.sent for n, message in messages.items()))
    return told


def both(rank: int, m: int, name: str) -> tuple[list[int], list[float]]:
    return sent(rank, m, name), said(rank, m, name)


@pytest.mark.slow
@every_rule
def test_a_rule_sends_what_it_says(name: str) -> None:
    ranks = run(both, M, name)
    assert len(ranks[0][0]) == len(oracle.CASES[name]) > 0
    for index, expected in enumerate(ranks[0][1]):
        mean = sum(counted[index] for counted, _ in ranks) / M
        assert mean == pytest.approx(expected, rel=0.02), (name, index)
