"""LocalOptimizer in one process: what cannot work is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from localopt import QSR, Average, Constant, LocalOptimizer, LocalSGD, PowerRule
from tests.support.small_network import network


class SGDScheduleFree(torch.optim.SGD):
    """Named as the schedule-free optimizers are."""


class RateFree(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        """Moves nothing."""


def test_rate_free_optimizers() -> None:
    """A period that follows the rate is refused where there is none to follow."""
    for make in (SGDScheduleFree, RateFree):
        for period in (QSR(0.1, 2), PowerRule(0.1, 2, 3)):
            inner = make(network().parameters())
            with pytest.raises(ValueError, match=f"{make.__name__} has none: use Constant"):
                LocalOptimizer(inner, period)
        optimizer = LocalOptimizer(make(network().parameters()), Constant(2))
        optimizer.step()
        assert not optimizer.synced


def test_refused_settings() -> None:
    optimizer = LocalSGD(network().parameters(), period=Constant(1))
    with pytest.raises(ValueError, match="is a LocalOptimizer already"):
        LocalOptimizer(optimizer, Constant(1))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, not list"):
        LocalOptimizer(list(network().parameters()), Constant(1))
    with pytest.raises(TypeError, match="period must be a callable"):
        LocalSGD(network().parameters(), period=4)
    with pytest.raises(TypeError, match="sync must be a rule"):
        LocalSGD(network().parameters(), period=Constant(1), sync=Average)
    rule = Average()
    LocalSGD(network().parameters(), period=Constant(1), sync=rule)
    with pytest.raises(ValueError, match="this Average already belongs to an optimizer"):
        LocalSGD(network().parameters(), period=Constant(1), sync=rule)
    with pytest.raises(ValueError, match="sequence of names"):
        Average(state_fields="exp_avg")
    with pytest.raises(ValueError, match="both averaged and reset"):
        Average(state_fields=("exp_avg",), reset_fields=("exp_avg",))
    with pytest.raises(TypeError, match="unexpected keyword"):
        LocalSGD(network().parameters(), period=Constant(1), momentun=0.9)


class WideState(torch.optim.SGD):
    """Keeps its state in float32, whatever the parameters' type."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["moment"] = torch.full(p.shape, 1.001)


def test_state_of_another_type_is_not_rounded() -> None:
    """A float32 moment of a bfloat16 parameter cannot live in the parameter's buffer."""
    inner = WideState([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))])
    optimizer = LocalOptimizer(inner, Constant(1), Average(state_fields=("moment",)))
    with pytest.raises(ValueError, match=r"float32, its parameter \(3,\) and torch.bfloat16"):
        optimizer.step()
