"""States of all replicas merged into one: the consensus, on another number of replicas."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from localopt import EASGD, Average, Constant, DiLoCo, LocalOptimizer, OverlapLocalSGD, Rule
from localopt.merge import merged
from localopt.saved import KEY, own_state
from tests.support import oracle
from tests.support.contract import (
    LRS,
    RULES,
    SIZE,
    Model,
    cases,
    equal_on_all_ranks,
    every_rule,
    everything,
    local_optimizer,
    local_step,
    new_rule,
)
from tests.support.ranks import run

pytestmark = pytest.mark.slow

TYPES = {torch.float64: 1e-12, torch.float32: 1e-6}
H, LATER = 3, 4
# In the first round; at the second's end, where some rules launch; with that in flight.
SAVED = (2, 6, 7)


def packed(content: Any) -> bytes:
    """As in a file."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def unpacked(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def states_of(model: nn.Module, optimizer: LocalOptimizer) -> bytes:
    return packed((dict(model.state_dict()), optimizer.state_dict()))


def kinds(name: str) -> list[tuple[tuple[int, str], torch.dtype]]:
    """Every case in float64, the first in all types."""
    first, *others = cases(name)
    return [*((first, t) for t in TYPES), *((case, torch.float64) for case in others)]


def save(rank: int, m: int, name: str) -> dict[tuple, tuple[bytes, np.ndarray]]:
    """By case, type and step: this rank's states, saved before anything is waited for, and what
    the group then shows as its consensus."""
    problem = oracle.Quadratics.make(m, SIZE, seed=m)
    saved = {}
    for (index, inner), dtype in kinds(name):
        model = Model(dtype)
        optimizer = local_optimizer(name, index, inner, model, Constant(H))
        for step in range(max(SAVED)):
            local_step(optimizer, model, problem, rank, step)
            model.statistic += rank + 1
            if step + 1 in SAVED:
                states = states_of(model, optimizer)
                with optimizer.consensus():
                    saved[index, inner, dtype, step + 1] = states, model.vector().numpy().copy()
    return saved


def train_on(rank: int, m: int, name: str, states: dict[tuple, bytes]) -> int:
    """Load each merged state and make `LATER` steps; return how many were tried."""
    problem = oracle.Quadratics.make(m, SIZE, seed=m)
    for (index, inner, dtype, step), content in states.items():
        weights, state = unpacked(content)
        model = Model(dtype, seed=7 + rank)
        optimizer = local_optimizer(name, index, inner, model, Constant(H))
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        place = own_state(state)["replica"]
        assert optimizer.synced and (optimizer.round, place["step"]) == (step // H, step)
        assert optimizer.report is None and optimizer.traffic.wait == []
        every = [t.double().reshape(-1) for t in everything(optimizer, model)]
        assert equal_on_all_ranks(torch.cat(every))
        before = model.vector().clone()
        with optimizer.consensus():
            assert torch.equal(model.vector(), before), "nothing to average"
        for later in range(step, step + LATER):
            local_step(optimizer, model, problem, rank, later)
        assert optimizer.round == step // H + LATER // H and not optimizer.synced
        assert not torch.equal(model.vector(), before)
        optimizer.finish()
        assert torch.isfinite(model.vector()).all() and equal_on_all_ranks(model.vector())
        assert len(optimizer.traffic.wait) == m
    return len(states)


@every_rule
def test_merged_states_are_the_consensus_of_any_number_of_replicas(name: str) -> None:
    """2 -> 4, 4 -> 2 and 2 -> 1: the weights are those that the running group evaluates, bitwise
    where its replicas are equal or have a centre; all new replicas start from them and train on."""
    for m, others in ((2, (4, 1)), (4, (2,))):
        ranks = run(save, m, name)
        states = {}
        for place, (_, consensus) in ranks[0].items():
            saved = [unpacked(of_rank[place][0]) for of_rank in ranks]
            weights, state = merged(iter(saved))
            states[place] = packed((weights, state))
            _, _, dtype, _ = place
            got = torch.cat([weights[f"weights.{i}"].reshape(-1) for i in range(4)])
            own = [torch.cat([w[f"weights.{i}"].reshape(-1) for i in range(4)]) for w, _ in saved]
            error = np.linalg.norm(got.numpy() - consensus) / np.linalg.norm(consensus)
            assert got.dtype == dtype and error <= TYPES[dtype], (m, place, error)
            if RULES[name].centre or all(torch.equal(own[0], x) for x in own):
                assert np.array_equal(got.numpy(), consensus), (m, place)
            statistics = torch.stack([w["statistic"] for w, _ in saved]).double()
            assert torch.equal(weights["statistic"], statistics.mean(0).float())
        for n in others:
            # Four go on from what was in flight, of all cases; fewer from everything.
            tried = {p: s for p, s in states.items() if n < 4 or p[-1] == SAVED[-1]}
            assert run(train_on, n, name, tried) == [len(tried)] * n


def go_on(rank: int, m: int, name: str) -> float:
    """How far a run from merged states is from one that called finish(), whatever the step."""
    problem, apart = oracle.Quadratics.make(m, SIZE, seed=3), 0.0

    def new() -> tuple[Model, LocalOptimizer]:
        model = Model()
        inner = torch.optim.SGD(model.parameters(), lr=LRS[0])
        return model, LocalOptimizer(inner, Constant(H), new_rule(name, 0), model=model)

    for steps in SAVED:
        model, optimizer = new()
        for step in range(steps):
            local_step(optimizer, model, problem, rank, step)
        files: list[Any] = [None] * m
        dist.all_gather_object(files, states_of(model, optimizer))
        optimizer.finish()
        again, resumed = new()
        weights, state = merged(map(unpacked, files))
        again.load_state_dict(weights)
        resumed.load_state_dict(state)
        vectors = own_state(optimizer.state_dict())["sync"]["vectors"]
        anchors = [vectors[anchor] for anchor in own_state(state)["sync"]["anchors"]]
        restarts = all(torch.equal(v[n], p) for v in anchors for n, p in model.named_parameters())
        for step in range(steps, steps + LATER if restarts else steps):
            local_step(optimizer, model, problem, rank, step)
            local_step(resumed, again, problem, rank, step)
        apart = max(apart, float((model.vector() - again.vector()).norm() / model.vector().norm()))
    return apart


@every_rule
def test_a_merged_run_is_one_that_called_finish(name: str) -> None:
    """Without inner momentum there is nothing else to merge: the run goes on alike, but where
    finish() leaves an anchor elsewhere, as it does a leader."""
    assert max(run(go_on, 2, name)) <= 1e-12


# Without processes: states made by hand.


class Small(nn.Module):
    """A tied weight, a frozen one, and buffers of two types."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.tied = nn.Linear(3, 3).to(dtype), nn.Linear(3, 3).to(dtype)
        self.tied.weight = self.first.weight
        self.unused = nn.Parameter(torch.randn(5, dtype=dtype))
        self.frozen = nn.Parameter(torch.randn(4, dtype=dtype) / 3, requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))


def by_hand(
    ranks: int, rule: type[Rule] | Any = Average, dtype: torch.dtype = torch.float32, steps: int = 3
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The states of replicas that each trained alone, as if they had done so together."""
    states = []
    for rank in range(ranks):
        model = Small(dtype)
        inner = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer = LocalOptimizer(inner, Constant(2), rule(), model=model)
        for _ in range(steps):
            for p in model.parameters():
                used = p.requires_grad and (p is not model.unused or rank == 1)
                p.grad = torch.full_like(p, rank + 1.0) + p.detach() if used else None
            optimizer.step()
        model.mean += rank
        model.count += 5 + rank
        weights, state = unpacked(states_of(model, optimizer))
        state["param_groups"][0]["localopt"] |= {"rank": rank, "world_size": ranks}
        states.append((weights, state))
    return states


def number_of(name: str) -> int:
    """A parameter's key in the optimizer's state."""
    return [n for n, _ in Small().named_parameters()].index(name)


def test_what_is_averaged_and_what_is_not() -> None:
    states = by_hand(3)
    del states[2][1]["state"][number_of("first.bias")]["exp_avg"]  # it has no part in the mean
    states[2][1]["state"][number_of("first.bias")]["step"] -= 1  # fp16 has skipped one
    given = copy.deepcopy(states)
    weights, state = merged(states)
    for (was, _), (now, _) in zip(given, states, strict=True):
        assert all(torch.equal(was[name], now[name]) for name in was), "what is given stays"
    assert torch.equal(weights["frozen"], given[0][0]["frozen"]), "a mean would round"
    assert torch.equal(weights["first.weight"], weights["tied.weight"])
    assert (weights["mean"] == 1).all() and weights["count"] == 5
    bias, unused = number_of("first.bias"), number_of("unused")
    moments = [s["state"][bias]["exp_avg"].double() for _, s in given[:2]]
    assert torch.equal(state["state"][bias]["exp_avg"], (sum(moments) / 2).float())
    assert state["state"][bias]["step"] == 3
    alone = given[1][1]["state"][unused]["exp_avg"]
    assert torch.equal(state["state"][unused]["exp_avg"], alone), "only one stepped"
    groups = state["param_groups"], given[0][1]["param_groups"]
    place, before = (group.pop(KEY) for (group,) in groups)
    assert groups[0] == groups[1], "rank 0's"
    assert (place["rank"], before["rank"]) == (None, 0), "anybody's"
    state["param_groups"][0][KEY] = place
    model = Small()
    optimizer = LocalOptimizer(
        torch.optim.AdamW(model.parameters()), Constant(2), Average(), model=model
    )
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert optimizer.synced and optimizer.h == 2 and optimizer.round == 1


def test_a_centre_is_found_under_a_tied_name_and_keeps_its_width() -> None:
    """Loaded last, the mean under the second name would replace the centre."""
    states = by_hand(2, lambda: EASGD(alpha=0.3, beta=0.4, pull=0.2), torch.bfloat16)
    centre = own_state(states[0][1])["sync"]["vectors"]["z"]
    for _, state in states:
        own_state(state)["sync"]["vectors"]["z"] = centre  # as after a collective
    weights, state = merged(states)
    assert not torch.equal(weights["unused"], states[1][0]["unused"])
    for name, z in centre.items():
        assert z.dtype == torch.float32 and torch.equal(weights[name], z.bfloat16()), name
        assert torch.equal(own_state(state)["sync"]["vectors"]["z"][name], z), name
    assert torch.equal(weights["tied.weight"], weights["first.weight"])


@pytest.mark.parametrize("rule", [DiLoCo, OverlapLocalSGD])
def test_anchors_start_again_at_the_consensus(rule: type[Rule]) -> None:
    """In the open round they are where the last one ended."""
    weights, state = merged(by_hand(2, rule))
    for name, z in own_state(state)["sync"]["vectors"]["z"].items():
        assert torch.equal(z, weights[name]), name


def test_states_without_rounds_are_merged_too() -> None:
    """Data-parallel replicas are equal; each has its own running statistics."""
    model = Small()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    inner.step()
    state = {**inner.state_dict(), "counted": {"round": 7, "seconds": 1.5}}
    other = {**copy.deepcopy(state), "counted": {"round": 7, "seconds": 2.5}}
    weights = dict(model.state_dict())
    different = {**weights, "mean": weights["mean"] + 1}
    got, optimizer = merged([(weights, state), (different, other)])
    assert all(torch.equal(got[name], weights[name]) for name in weights if name != "mean")
    assert (got["mean"] == 0.5).all() and optimizer["counted"] == state["counted"]
    assert torch.equal(
        optimizer["state"][0]["momentum_buffer"], state["state"][0]["momentum_buffer"]
    )


def refused(states: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        merged(states)


def test_states_that_do_not_belong_together_are_refused() -> None:
    two = by_hand(2)
    refused([], "no states")
    refused(two[:1], "1 states, saved by 2 replicas")
    refused([two[0], two[0]], "given for rank 1 is that of rank 0")
    refused(two[::-1], "given for rank 0 is that of rank 1")
    refused([two[0], by_hand(2, steps=4)[1]], "rank 1 is at step 4, rank 0 at 3")
    refused([two[0], by_hand(2, DiLoCo)[1]], "rule is 'DiLoCo', on rank 0 'Average'")
    refused([*two, by_hand(3)[2]], "world_size is 3, on rank 0 2")
    groups = [{k: v for k, v in g.items() if k != KEY} for g in two[1][1]["param_groups"]]
    plain = {"state": two[1][1]["state"], "param_groups": groups}
    refused([two[0], (two[1][0], plain)], "no LocalOptimizer's")
    refused([two[0], ({}, two[1][1])], "different models")
    wider = {**two[1][0], "unused": torch.ones(6)}
    refused([two[0], (wider, two[1][1])], "unused has shape")
    old = copy.deepcopy(two)
    own_state(old[1][1])["version"] = 1
    refused(old, "another version")


def test_unnamed_parameters_have_no_anchor_to_find() -> None:
    model = Small()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = LocalOptimizer(inner, Constant(2), DiLoCo())
    refused([unpacked(states_of(model, optimizer))], "build the optimizer with model=")
