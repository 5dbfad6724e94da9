"""Processes that were started together and never meet: an error, unless it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from localopt import (
    EASGD,
    LSGD,
    Average,
    CoCoDSGD,
    CommOptimizer,
    Constant,
    DiLoCo,
    HierarchicalAverage,
    LocalAdamW,
    LocalOptimizer,
    LocalSGD,
    Rule,
    Streaming,
)
from tests.support.contract import stacked
from tests.support.ranks import run
from tests.support.small_network import backward, network, train, vector

Make = Callable[..., LocalOptimizer]

MAKES: dict[str, Make] = {
    "LocalSGD": lambda model, **o: LocalSGD(model.parameters(), 0.1, period=Constant(2), **o),
    "LocalAdamW": lambda model, **o: LocalAdamW(model.parameters(), 0.1, period=Constant(2), **o),
    "LocalOptimizer": lambda model, **o: LocalOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), Constant(2), model=model, **o
    ),
    "CommOptimizer": lambda model, **o: CommOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), "EASGD", comm_period=2, **o
    ),
}
every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@every_make
def test_started_together_and_not_initialised(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """"RuntimeError: if the launcher has started several processes (WORLD_SIZE), and
    torch.distributed is not initialised"; and nothing has been touched."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = network()
    before = [p.data_ptr() for p in model.parameters()]
    numbered = {"world_size": 2} if make is MAKES["CommOptimizer"] else {}
    with pytest.raises(RuntimeError, match="the launcher has started 2 processes") as caught:
        make(model, **numbered)
    for part in ("torch.distributed.init_process_group()", "alone=True", "would never meet"):
        assert part in str(caught.value)
    assert str(caught.value).isprintable()
    assert [p.data_ptr() for p in model.parameters()] == before


@every_make
def test_alone_by_choice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """"alone: to train this process by itself": as if nobody else had been started."""
    model, twin = network(), network()
    there = make(twin)
    monkeypatch.setenv("WORLD_SIZE", "8")
    optimizer = make(model, alone=True)
    for net, opt in ((model, optimizer), (twin, there)):
        train(net, opt, range(5))
        with opt.consensus():
            pass
        opt.finish()
    assert torch.equal(vector(model), vector(twin))
    assert not torch.equal(vector(model), vector(network()))
    assert optimizer.round == 3 and optimizer.traffic.bytes == 0


@pytest.mark.parametrize(
    "told", [None, "1", "0", "", " ", "two", "-2", "2.0", "2 ", "٢", "0x2", "1e1"]
)
@every_make
def test_launchers_that_say_nothing(
    make: Make, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, or nothing that is a number of processes."""
    if told is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", told)
    model = network()
    train(model, make(model), range(2))


def test_number_of_replicas_when_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDTL's ``world_size`` is that of the replicas that meet: one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    MAKES["CommOptimizer"](network(), world_size=1, alone=True)
    with pytest.raises(ValueError, match="world_size is 2: the process group has 1 replicas"):
        MAKES["CommOptimizer"](network(), world_size=2, alone=True)


# Where there is a group.


def excluded(rank: int, m: int) -> None:
    for group in (dist.group.WORLD, dist.new_group([0, 1])):
        for make in MAKES.values():
            with pytest.raises(ValueError, match="alone=True and process_group exclude each other"):
                make(network(), alone=True, process_group=group)


@pytest.mark.slow
def test_alone_in_a_group_is_refused() -> None:
    run(excluded, 2)


RULES: dict[str, Callable[[], Rule]] = {
    "average": Average,
    "state": lambda: Average(state_fields=("momentum_buffer",)),
    "int8": lambda: Average(compress="int8"),
    "diloco": DiLoCo,
    "easgd": EASGD,
    "cocod": CoCoDSGD,
    "streaming": lambda: Streaming(2, overlap=True),
    "lsgd": LSGD,
    "hierarchical": lambda: HierarchicalAverage(1, 2),
}


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a collective, or the store")


def independent(rank: int, m: int) -> dict[str, torch.Tensor]:
    """Rank 1 is somewhere else entirely; each trains as it would without a group."""
    for name in ("all_reduce", "broadcast", "isend", "irecv", "all_to_all_single", "new_group"):
        assert hasattr(dist, name)
        setattr(dist, name, refuse)
    dist.distributed_c10d._get_process_group_store = refuse
    rows, width = {}, 3 + rank
    for name, rule in RULES.items():
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        inner = torch.optim.SGD(model.parameters(), 0.01 * (1 + rank), momentum=0.9)
        optimizer = LocalOptimizer(
            inner, Constant(2 + rank), rule(), model=model, buffers="average", alone=True,
            track_drift=True,
        )  # fmt: skip
        for step in range(6 + 5 * rank):
            optimizer.zero_grad()
            optimizer.record_loss(backward(model, step).detach())
            optimizer.step()
        with optimizer.consensus():
            pass
        optimizer.finish()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.traffic.bytes == optimizer.traffic.other_bytes == 0
        rows[name] = vector(model)
    return rows


@pytest.mark.slow
def test_alone_beside_others_makes_no_collective() -> None:
    """Every rule: other shapes, periods, rates and numbers of steps, and nobody waits."""
    zero, one = run(independent, 2)
    assert zero.keys() == one.keys() == RULES.keys()
    assert all(bool(x.isfinite().all()) for x in (*zero.values(), *one.values()))
    assert all(len(zero[name]) != len(one[name]) for name in RULES)


def sdtl_alone(rank: int, m: int) -> list[float]:
    """SDTL's strengths are per replica: c/m with m = 1."""
    p = nn.Parameter(torch.full((2,), float(rank)))
    optimizer = CommOptimizer(
        torch.optim.SGD([p], 0.0), "EASGD", local_pulling_strength=0.0, dist_pulling_strength=0.5,
        comm_period=1, alone=True,
    )  # fmt: skip
    optimizer.sync.z.data[0].fill_(rank + 1.0)
    optimizer._replica.round.number = 1  # the anchor was moved, as training would
    optimizer.step()
    optimizer.state_dict()  # waits for what is in flight
    return [float(p.detach()[0]), float(optimizer.sync.z.data[0][0])]


@pytest.mark.slow
def test_published_calls_alone() -> None:
    """x ← (1 - c) x + c z, z ← (1 - c) z + c x, also beside another process."""
    assert run(sdtl_alone, 2) == [[0.5, 0.5], [1.5, 1.5]]


def apart_then_together(rank: int, m: int) -> torch.Tensor:
    """One optimizer alone, another that meets: of one process, one after the other."""
    mine, ours = network(), network()
    with torch.no_grad():
        mine[0].weight.add_(rank)
    alone = MAKES["LocalSGD"](mine, alone=True)
    together = MAKES["LocalSGD"](ours)
    for step in range(4):
        if rank == 1:
            time.sleep(0.01)
        for net, opt in ((mine, alone), (ours, together)):
            opt.zero_grad()
            backward(net, 2 * step + rank)
            opt.step()
    assert not torch.equal(*stacked(vector(mine)))
    assert torch.equal(*stacked(vector(ours)))
    assert together.traffic.syncs == 2 and together.traffic.bytes > 0
    return vector(mine)


@pytest.mark.slow
def test_alone_and_together_in_one_process() -> None:
    assert not torch.equal(*run(apart_then_together, 2))
