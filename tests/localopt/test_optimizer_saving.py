"""LocalOptimizer in one process: what is saved, and what can be loaded."""

from __future__ import annotations

import copy

import pytest
import torch

from localopt import Constant, LocalSGD, NonFiniteError
from localopt.saved import own_state
from tests.support.small_network import network, train, vector


def test_bare_state() -> None:
    """"A state of the bare inner optimizer is taken too; then the first round begins"."""
    model, twin = network(), network()
    bare = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    train(twin, bare, range(3))
    optimizer = LocalSGD(model.parameters(), 0.1, momentum=0.9, period=Constant(4))
    train(model, optimizer, range(5, 8))
    # torch's load_state_dict keeps the tensors it is given: without a copy the two would share.
    optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert optimizer.synced and optimizer.round == 0
    model.load_state_dict(twin.state_dict())
    for net, opt in ((model, optimizer), (twin, bare)):
        train(net, opt, range(3, 7))
    assert torch.equal(vector(model), vector(twin)) and optimizer.synced


def test_state_of_another_rule_is_refused() -> None:
    optimizer = LocalSGD(network().parameters(), period=Constant(2))
    for key, value in (("rule", "Other"), ("version", 99)):
        state = optimizer.state_dict()
        own_state(state)[key] = value
        with pytest.raises(ValueError, match=f"state to load has {key} {value!r}"):
            optimizer.load_state_dict(state)


def test_what_is_no_optimizers_state_is_refused() -> None:
    optimizer = LocalSGD((model := network()).parameters(), period=Constant(2))
    both = "state and no param_groups"
    for state, missing in ((model.state_dict(), both), ({"state": {}}, "param_groups")):
        with pytest.raises(ValueError, match=f"no optimizer's: it has no {missing}"):
            optimizer.load_state_dict(state)


def test_state_dict_is_a_copy() -> None:
    """What was saved does not change when training goes on; what is loaded is not changed."""
    model = network()
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(1))
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(2))
    assert state == before


def test_a_replica_with_nan_is_not_saved() -> None:
    """Saving checks locally, and names the parameter."""
    model = network()
    optimizer = LocalSGD(model.parameters(), period=Constant(9), model=model)
    train(model, optimizer, range(2))
    optimizer.state_dict()
    with torch.no_grad():
        model[3].bias[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"rank 0 holds NaN or infinity at step 2: 3\.bias$"):
        optimizer.state_dict()
    careless = LocalSGD(model.parameters(), period=Constant(9), check_finite=False)
    careless.state_dict()
