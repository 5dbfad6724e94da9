"""The optimizer's state and groups are the inner one's, also before there are any."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict

import pytest
import torch

from localopt import Constant, LocalSGD
from tests.support.small_network import network, train, vector


def test_the_state_before_the_first_step() -> None:
    """It is a mapping as the inner optimizer's is, with the same entries, also when written to."""
    model = network()
    optimizer = LocalSGD(model.parameters(), 0.1, momentum=0.9, period=Constant(4))
    a, b, c, d, *_ = model.parameters()
    state, inner = optimizer.state, optimizer.inner.state
    assert len(state) == 0 and list(state) == [] and dict(state) == {} and state == {}
    assert a not in state and state.get(a) is None and state.get(a, 7) == 7
    assert state.pop(a, 5) == 5 and list(state.items()) == []
    with pytest.raises(KeyError):
        state.pop(a)
    with pytest.raises(KeyError):
        del state[a]
    assert repr(state) == repr(inner)
    for copied in (copy.copy(state), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert type(copied) is defaultdict and copied == {}
    assert len(inner) == 0, "looking has made no entry"
    state[a] = {"x": 1}
    state[b]["y"] = 2
    assert state.setdefault(c, {"z": 3}) == {"z": 3}
    state.update({d: {}})
    assert inner == state == {a: {"x": 1}, b: {"y": 2}, c: {"z": 3}, d: {}}
    assert optimizer.state is inner and a in state and len(state) == 4
    del state[a]
    assert state.pop(b) == {"y": 2}
    state.clear()
    assert len(inner) == 0
    train(model, optimizer, range(1))
    assert optimizer.state is optimizer.inner.state and len(optimizer.state) == 6


def test_state_and_groups_can_be_set() -> None:
    """As with any torch optimizer; they are the inner one's."""
    model = network()
    optimizer = LocalSGD(model.parameters(), 0.1, momentum=0.9, period=Constant(4))
    train(model, optimizer, range(2))
    state, groups = optimizer.state, optimizer.param_groups
    optimizer.state = defaultdict(dict)
    optimizer.param_groups = [{**groups[0], "lr": 0.0}]
    assert len(optimizer.inner.state) == 0 and optimizer.inner.param_groups[0]["lr"] == 0
    before = vector(model)
    train(model, optimizer, range(1))
    assert torch.equal(vector(model), before), "the new group's rate"
    optimizer.state, optimizer.param_groups = state, groups
    assert optimizer.inner.state is state and optimizer.inner.param_groups is groups
    train(model, optimizer, range(1))
    assert optimizer.synced and not torch.equal(vector(model), before)
