"""Compressed synchronisations: nothing is lost for good, and replicas are equal to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from localopt import BMUF, Average, Constant, DiLoCo, LocalOptimizer, LocalSGD
from localopt.compression import Bfloat16, Int8
from localopt.merge import merged
from localopt.saved import own_state
from tests.support.ranks import run

pytestmark = pytest.mark.slow

CODECS = [Bfloat16(16), Int8(16)]
SHAPES = [(40,), (3, 7), (), (130,)]


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
        )
        self.register_buffer("mean", torch.zeros(5))

    def vector(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.weights]).double()


def local_step(optimizer: LocalOptimizer, model: Model, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    for p in model.weights:
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    optimizer.step()


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x / dist.get_world_size()


def residual(optimizer: LocalOptimizer) -> torch.Tensor:
    views = optimizer.sync._momenta["lost"].views
    return torch.cat([v.reshape(-1) for v in views.values()]).double()


def nothing_is_lost(rank: int, m: int, compress: Any) -> list[float]:
    """What each round has moved, and what is still to be told, is what the replicas have made."""
    model = Model()
    optimizer = LocalSGD(model.weights, lr=0.1, period=Constant(3), sync=Average(compress=compress))
    start, errors = model.vector(), []
    moved = torch.zeros_like(start)
    for step in range(30):
        if optimizer.synced:
            before = model.vector()
        if step % 3 == 2:  # the last of the round, by hand: what it brings is seen nowhere else
            made = model.vector()
            generator = torch.Generator().manual_seed(1000 * rank + step)
            gradient = [torch.randn(p.shape, generator=generator).double() for p in model.weights]
            made -= 0.1 * torch.cat([g.reshape(-1) for g in gradient])
            moved += mean_over_ranks(made - before)
        local_step(optimizer, model, rank, step)
        if optimizer.synced:
            told = model.vector() - start
            owed = mean_over_ranks(residual(optimizer))
            errors.append(float((told - owed - moved).norm() / moved.norm()))
            everyone = [torch.empty_like(told) for _ in range(m)]
            dist.all_gather(everyone, told)
            assert all(torch.equal(everyone[0], other) for other in everyone)
            assert owed.norm() > 0
    return errors


@pytest.mark.parametrize("compress", CODECS, ids=repr)
def test_what_is_not_sent_is_sent_later(compress: Any) -> None:
    """Three ranks: shards of different sizes."""
    for errors in run(nothing_is_lost, 3, compress):
        assert len(errors) == 10 and max(errors) < 1e-12


def of_all_types(
    rank: int, m: int, compress: Any, device: str = "cpu"
) -> list[list[torch.Tensor]]:
    seen = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model = Model(dtype).to(device)
        optimizer = LocalSGD(
            model.parameters(), lr=0.01, period=Constant(2), sync=DiLoCo(0.5, 0.5, compress),
            model=model, buffers="average",
        )  # fmt: skip
        for step in range(8):
            model.mean.fill_(rank + step)
            local_step(optimizer, model, rank, step)
        seen.append([t.detach().cpu().clone() for t in (*model.parameters(), model.mean)])
    return seen


@pytest.mark.parametrize("compress", CODECS, ids=repr)
def test_every_type_of_parameter(compress: Any) -> None:
    """Equal on all ranks; buffers are averaged, and travel as they are."""
    alike_and_finite(run(of_all_types, 3, compress))


def alike_and_finite(ranks: list[list[list[torch.Tensor]]]) -> None:
    for ours, theirs in zip(ranks[0], ranks[2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(torch.isfinite(t).all() for t in ours)
        assert torch.allclose(ours[-1], torch.full((5,), 8.0))


def bytes_sent(rank: int, m: int) -> dict[str | None, int]:
    sent = {}
    for compress in (None, "bf16", "int8"):
        p = nn.Parameter(torch.zeros(200_000))
        optimizer = LocalSGD([p], lr=0.1, period=Constant(1), sync=BMUF(0.5, compress=compress))
        for _ in range(2):
            p.grad = torch.randn_like(p)
            optimizer.step()
        sent[compress] = optimizer.traffic.bytes
    return sent


@pytest.mark.parametrize("m", [2, 4])
def test_a_half_and_a_quarter_of_the_bytes(m: int) -> None:
    """For any number of ranks, as `traffic` counts them; the wire's own count is a benchmark."""
    for sent in run(bytes_sent, m):
        assert sent[None] == pytest.approx(2 * 2 * (m - 1) / m * 800_000, rel=0.01)
        assert sent["bf16"] / sent[None] == pytest.approx(0.5, rel=0.02)
        assert sent["int8"] / sent[None] == pytest.approx(0.25, rel=0.02)


def states(rank: int, m: int) -> tuple[dict, dict, torch.Tensor]:
    model = Model()
    optimizer = LocalSGD(
        model.parameters(), lr=0.1, period=Constant(2), sync=Average(compress=Int8(16)), model=model
    )
    for step in range(4):
        local_step(optimizer, model, rank, step)
    return model.state_dict(), optimizer.state_dict(), residual(optimizer)


def test_another_number_of_replicas_inherits_what_is_owed() -> None:
    ranks = run(states, 3)
    model, optimizer = merged((model, optimizer) for model, optimizer, _ in ranks)
    owed = torch.stack([left for *_, left in ranks]).mean(0)
    lost = own_state(optimizer)["sync"]["vectors"]["lost"]
    assert torch.allclose(torch.cat([t.reshape(-1) for t in lost.values()]), owed, rtol=1e-12)
    again = Model()
    again.load_state_dict(model)
    alone = LocalSGD(
        again.parameters(), lr=0.1, period=Constant(2), sync=Average(compress=Int8(16)), model=again
    )
    alone.load_state_dict(optimizer)
    before = again.vector()
    for p in again.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        alone.step()
    assert torch.allclose(again.vector() - before, -owed, rtol=0, atol=1e-12), "it is told now"


def distance(rank: int, m: int, compress: Any) -> float:
    """To the optimum of the mean of m quadratics, from far away, as the rate decays."""
    target = torch.randn(64, generator=torch.Generator().manual_seed(rank)).double()
    x = nn.Parameter(100 * torch.ones(64).double())
    optimizer = LocalSGD([x], lr=0.2, period=Constant(4), sync=Average(compress=compress))
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.2 * 0.97 ** max(0, step - 100)
        x.grad = x.detach() - target
        optimizer.step()
    return float((x.detach() - mean_over_ranks(target.clone())).norm())


@pytest.mark.parametrize("compress", CODECS, ids=repr)
def test_it_converges_to_the_same_point(compress: Any) -> None:
    """From 800 away; replicas with optima 10 apart differ at every sync, and that is coarse."""
    assert max(run(distance, 4, compress)) < 2e-3
