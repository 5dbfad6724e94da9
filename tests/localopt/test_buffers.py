"""Buffers, and parameters outside the optimizer, on real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from localopt import Constant, LocalSGD
from tests.support.ranks import run

pytestmark = pytest.mark.slow


class Net(nn.Module):
    """BatchNorm, and buffers of every type, different on every rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.linear = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5, dtype=torch.float32)
        self.frozen = nn.Linear(2, 3)
        self.register_buffer("count", torch.tensor([2**60 + rank, -(2**62) + rank, -1 - rank]))
        self.register_buffer("flags", torch.tensor([rank == 0, rank == 1]))
        self.register_buffer("bytes", torch.tensor([255 - rank], dtype=torch.uint8))
        self.register_buffer("wide", torch.randn(2, 2, dtype=torch.float64).t())
        self.register_buffer("rotary", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("nothing", None)
        self.register_buffer("scratch", torch.tensor(float(rank)), persistent=False)

    def owned(self) -> list[nn.Parameter]:
        return [*self.linear.parameters(), *self.norm.parameters()]


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def as_lists(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: t.tolist() for name, t in tensors.items()}


def a_round(rank: int, m: int, policy: str) -> dict[str, Any]:
    model = Net(rank)
    optimizer = LocalSGD(model.owned(), 0.1, period=Constant(2), model=model, buffers=policy)
    start = {**copies(model), **{n: p.detach().clone() for n, p in model.named_parameters()}}
    out: dict[str, Any] = {"start": as_lists(start)}
    generator = torch.Generator().manual_seed(50 + rank)
    for step in range(4):
        x = torch.randn(6, 3, generator=generator) * (1 + rank)  # (B, 3)
        optimizer.zero_grad()
        model.norm(model.linear(x)).square().sum().backward()
        for buffer in (model.count, model.bytes):
            buffer += 7 * rank
        model.wide += rank
        model.rotary *= 1j + rank
        model.scratch = torch.tensor(float(rank + step))  # replaced, not written into
        out["before"] = as_lists(copies(model))
        optimizer.step()
        if step == 2:  # mid-round
            before = copies(model)
            with optimizer.consensus():
                out["consensus"] = as_lists(copies(model))
                model.norm(model.linear(x))  # moves the statistics
                model.count += 1
            after = copies(model)
            assert all(torch.equal(before[name], after[name]) for name in before), "restored"
    out["after"] = as_lists(copies(model))
    return out


FLOATS = ("norm.running_mean", "norm.running_var", "wide", "scratch")
INTEGERS = ("norm.num_batches_tracked", "count", "flags", "bytes")


def test_start_is_rank_0s() -> None:
    """All replicas start alike: with model=, also in parameters that the optimizer does not own,
    and in buffers of every type."""
    zero, one, two, three = (seen["start"] for seen in run(a_round, 4, "keep"))
    assert zero == one == two == three
    model = Net(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert zero[name] == tensor.tolist(), name


def test_keep() -> None:
    """Each replica keeps its own."""
    for seen in run(a_round, 2, "keep"):
        assert seen["after"] == seen["before"]


def test_average() -> None:
    """The floating-point ones are averaged; "integer counters are never averaged"."""
    ranks = run(a_round, 4, "average")
    for name in FLOATS:
        brought = torch.tensor([seen["before"][name] for seen in ranks], dtype=torch.float64)
        assert brought.std(0).max() > 0.01
        for seen in ranks:
            after = torch.tensor(seen["after"][name], dtype=torch.float64)
            assert torch.allclose(after, brought.mean(0), rtol=1e-6), name
    rotary = torch.tensor([seen["before"]["rotary"] for seen in ranks])
    for seen in ranks:
        assert torch.allclose(torch.tensor(seen["after"]["rotary"]), rotary.mean(0))
        assert all(seen["after"][name] == seen["before"][name] for name in INTEGERS)


def test_broadcast() -> None:
    """Rank 0's, to the last bit: int64 beyond 2**53, bool, uint8 and complex too."""
    ranks = run(a_round, 4, "broadcast")
    for seen in ranks:
        assert seen["after"] == ranks[0]["before"]
        assert seen["consensus"] == ranks[0]["consensus"]
    assert ranks[0]["before"] != ranks[1]["before"]


def refusals(rank: int, m: int) -> None:
    model = Net(rank)
    with pytest.raises(ValueError, match="wrapped in DistributedDataParallel"):
        wrapped = DistributedDataParallel(nn.Linear(2, 2))
        LocalSGD(wrapped.parameters(), period=Constant(1), model=wrapped)
    with pytest.raises(ValueError, match="needs model="):
        LocalSGD(model.parameters(), period=Constant(1), buffers="average")
    with pytest.raises(ValueError, match="buffers must be one of"):
        LocalSGD(model.parameters(), period=Constant(1), model=model, buffers="mean")


def test_refusals() -> None:
    run(refusals, 2)


def grown(rank: int, m: int) -> float:
    model = nn.BatchNorm1d(2)
    optimizer = LocalSGD([model.weight], period=Constant(1), model=model)
    model.running_mean.fill_(rank + 1.0)
    optimizer.add_param_group({"params": [model.bias]})
    return float(model.running_mean[0])


def test_kept_when_a_group_is_added() -> None:
    """"keep" also when the flat buffers are rebuilt."""
    assert run(grown, 2) == [1.0, 2.0]


def low_precision(rank: int, m: int) -> list[Any]:
    """Integers travel in the parameters' type, bfloat16 here."""
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    model.register_buffer("count", torch.tensor([0x0123456789ABCDEF, -2, 2**63 - 1]))
    model.count += 3 * rank
    optimizer = LocalSGD(model.parameters(), period=Constant(1), model=model, buffers="broadcast")
    model.count += 5 * rank
    optimizer.step()
    return model.count.tolist()


def test_integers_in_bfloat16() -> None:
    assert run(low_precision, 2) == [[0x0123456789ABCDEF, -2, 2**63 - 1]] * 2
