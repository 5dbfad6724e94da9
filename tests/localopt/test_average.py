"""Average, and what LocalOptimizer promises on several replicas, on real processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import localopt.traffic
from localopt import QSR, Average, Constant, LocalAdamW, LocalOptimizer, LocalSGD
from localopt.header import SLOT
from tests.support.ranks import run

pytestmark = pytest.mark.slow

RATE = 0.05


def network(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, width),
        nn.Tanh(), nn.Linear(width, 3),
    )  # fmt: skip


def batch(step: int, rank: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.randn(size, 1, 6, 6, generator=generator)  # (B, 1, 6, 6)
    return images, torch.randint(3, (size,), generator=generator)


def backward(model: nn.Module, step: int, rank: int) -> Tensor:
    images, labels = batch(step, rank)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step, rank)
        optimizer.step()


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# The degenerate cases of the docstrings.


def against_ddp(rank: int, m: int) -> list[float]:
    errors = []
    for settings in (
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    ):
        model, twin = network(), network()
        train(model, LocalSGD(model.parameters(), RATE, period=Constant(1), **settings), rank, 20)
        wrapped = DistributedDataParallel(twin)
        train(wrapped, torch.optim.SGD(twin.parameters(), RATE, **settings), rank, 20)
        moved = (vector(twin) - vector(network())).norm()
        assert moved > 0.05
        errors.append(float((vector(model) - vector(twin)).norm() / moved))
    return errors


def test_average_each_step_is_data_parallel() -> None:
    """"With SGD, momentum included, H = 1 and equal starts, this is data-parallel SGD"."""
    for errors in run(against_ddp, 2):
        assert all(error < 1e-5 for error in errors), errors


INNERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, RATE),
    "momentum": lambda params: torch.optim.SGD(params, RATE, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda params: torch.optim.AdamW(params, RATE),
    "adamw_foreach": lambda params: torch.optim.AdamW(params, RATE, foreach=True),
    "adamw_fused": lambda params: torch.optim.AdamW(params, RATE, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, RATE),
}


def against_bare() -> None:
    """One replica: the same bits as the inner optimizer alone, in mid-round and after finish."""
    for name, make in INNERS.items():
        model, twin = network(width=13), network(width=13)
        optimizer = LocalOptimizer(make(model.parameters()), Constant(3), model=model)
        train(model, optimizer, 0, 10)
        train(twin, make(twin.parameters()), 0, 10)
        assert torch.equal(vector(model), vector(twin)), name
        with optimizer.consensus():
            assert torch.equal(vector(model), vector(twin)), name
        optimizer.finish()
        assert torch.equal(vector(model), vector(twin)), name
        assert optimizer.traffic.bytes == optimizer.traffic.other_bytes == 0


def against_bare_in_a_group(rank: int, m: int) -> None:
    against_bare()


def test_one_replica_is_the_bare_optimizer() -> None:
    """One replica under Average is the inner optimizer, bit for bit, in a process group or none."""
    assert not dist.is_initialized()
    against_bare()
    run(against_bare_in_a_group, 1)


# Subgroups.


def in_two_groups(rank: int, m: int) -> tuple[float, list[int]]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    p = nn.Parameter(torch.full((5,), float(rank)))
    optimizer = LocalSGD([p], 1.0, period=Constant(2), process_group=mine)
    assert float(p[0]) == 2 * (rank // 2), "starts from rank 0 of the group"
    for _ in range(2):
        p.grad = torch.full((5,), float(-rank))
        optimizer.step()
    other = groups[1 - rank // 2]
    with pytest.raises(ValueError, match="not a member"):
        LocalSGD([nn.Parameter(torch.ones(1))], period=Constant(1), process_group=other)
    return float(p[0]), [len(optimizer.traffic.wait)]


def test_process_group() -> None:
    """Two groups of two: each averages its own replicas, from its own rank 0."""
    seen = run(in_two_groups, 4)
    assert [value for value, _ in seen] == [1.0, 1.0, 7.0, 7.0]
    assert all(waits == [2] for _, waits in seen)


# Optimizer state.


def partly_stepped(rank: int, m: int) -> dict[str, Any]:
    """A parameter that only rank 1 ever steps on."""
    both, one = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3))
    sync = Average(state_fields=("exp_avg",), reset_fields=("exp_avg_sq",))
    optimizer = LocalAdamW([both, one], RATE, betas=(0.5, 0.9), period=Constant(2), sync=sync)
    for _ in range(2):
        both.grad = torch.full((5,), 1.0 + rank)
        one.grad = torch.full((3,), 4.0) if rank == 1 else None
        optimizer.step()
    moments = optimizer.state[both]["exp_avg"].clone()
    assert not optimizer.state[both]["exp_avg_sq"].any(), "reset"
    once = optimizer.state[one]["exp_avg"].clone() if rank == 1 else optimizer.state.get(one)
    payload = sum(b.data.nbytes for b in optimizer._replica.flat.buffers)
    headers = (m - 1) * SLOT
    assert optimizer.traffic.bytes == 2 * (m - 1) * payload // m + headers
    before = {k: v.clone() for k, v in optimizer.state[both].items()}
    both.grad = torch.full((5,), 1.0 + rank)
    optimizer.step()
    stepped = {k: v.clone() for k, v in optimizer.state[both].items()}
    with optimizer.consensus():
        pass
    assert all(torch.equal(stepped[k], optimizer.state[both][k]) for k in stepped)
    assert not torch.equal(stepped["exp_avg"], before["exp_avg"]), "the state goes on living"
    optimizer.finish()
    finished = optimizer.state[both]["exp_avg"].tolist()
    optimizer.step()
    optimizer.step()
    again = optimizer.state[one]["exp_avg"].tolist() if rank == 1 else None
    return {
        "moments": moments.tolist(),
        "once": once.tolist() if isinstance(once, Tensor) else once,
        "finished": finished,
        "again": again,
    }


def finished_in_the_first_round(rank: int, m: int) -> list[float]:
    p = nn.Parameter(torch.zeros(2))
    sync = Average(state_fields=("momentum_buffer",))
    optimizer = LocalSGD([p], RATE, momentum=0.9, period=Constant(5), sync=sync)
    p.grad = torch.full((2,), 1.0 + 2 * rank)
    optimizer.step()
    optimizer.finish()
    return optimizer.state[p]["momentum_buffer"].tolist()


def test_state_fields() -> None:
    """Named state is averaged by a synchronisation and by finish() in mid-round; a replica that
    never stepped on a parameter brings zeros and keeps no state for it."""
    zero, one = run(partly_stepped, 2)
    # m_t = 0.5 m + 0.5 g: after two steps 0.75 g, with g = 1 and 2.
    assert zero["moments"] == one["moments"] == [1.125] * 5
    assert zero["once"] in (None, {}) and one["once"] == [1.5] * 3
    # One more: 0.5 * 1.125 + 0.5 g, mean over g = 1 and 2.
    assert zero["finished"] == one["finished"] == pytest.approx([1.3125] * 5)
    # Rank 1's moment of the other, g = 4: 1.5, a step more is 2.75, halved by finish() as rank 0
    # brings zeros anew; two steps more, and halved again.
    assert one["again"] == pytest.approx([0.5 * (0.25 * 2.75 / 2 + 0.75 * 4)] * 3)
    assert run(finished_in_the_first_round, 2) == [[2.0] * 2] * 2


def wrong_fields(rank: int, m: int) -> None:
    p = nn.Parameter(torch.zeros(5))
    for sync in (Average(state_fields=("exp_average",)), Average(reset_fields=("momentum",))):
        optimizer = LocalAdamW([p], RATE, period=Constant(1), sync=sync)
        p.grad = torch.ones(5)
        with pytest.raises(ValueError, match=r"no field .*'exp_avg', 'exp_avg_sq', 'step'"):
            optimizer.step()
    optimizer = LocalAdamW([p], RATE, period=Constant(1), sync=Average(state_fields=("step",)))
    with pytest.raises(ValueError, match=r"'step' of parameter group0.0 has shape \(\)"):
        optimizer.step()


def test_wrong_state_fields() -> None:
    """A wrong name is refused "naming what exists", on every rank."""
    run(wrong_fields, 2)


# Figures.


def sleepy(rank: int, m: int) -> dict[str, Any]:
    real = localopt.traffic.synchronised_clock  # the clocks of different hosts have no common zero
    localopt.traffic.synchronised_clock = lambda device: real(device) + 1000.0 * rank
    model = network()
    optimizer = LocalSGD(model.parameters(), RATE, period=Constant(3))
    before = optimizer.traffic.other_bytes
    for step in range(7):
        optimizer.zero_grad()
        backward(model, step, rank)
        if rank == 1:
            time.sleep(0.2)
        optimizer.step()
    syncs, sent = optimizer.traffic.syncs, optimizer.traffic.bytes
    with optimizer.consensus():
        pass
    payload = sum(b.data.nbytes for b in optimizer._replica.flat.buffers)
    traffic = optimizer.traffic
    assert (syncs, sent) == (traffic.syncs, traffic.bytes), "consensus() is counted apart"
    apart = traffic.other_bytes - before
    optimizer.finish()
    finished = traffic.syncs, traffic.bytes
    optimizer.finish()
    assert (traffic.syncs, traffic.bytes) == finished, "so is finish() between rounds"
    return {
        "payload": payload,
        "parameters": sum(p.nbytes for p in model.parameters()),
        "syncs": syncs,
        "bytes": sent,
        "apart": apart,
        "finished": finished,
        "closed": traffic.other_bytes - before - apart,
        "wait": traffic.wait,
        "exposed": traffic.exposed,
        "hidden": traffic.hidden,
    }


@pytest.mark.alone
def test_traffic() -> None:
    """"bytes this rank sent …, by the ring all-reduce's 2 (m - 1) / m per payload"; "per rank,
    seconds it has waited at boundaries for the slowest rank"."""
    ranks = run(sleepy, 4)
    for seen in ranks:
        headers = 3 * SLOT
        once = 2 * 3 * seen["payload"] // 4 + headers
        assert seen["parameters"] < seen["payload"] < seen["parameters"] + 2000
        assert (seen["syncs"], seen["bytes"]) == (2, 2 * once)
        assert seen["apart"] == once
        assert seen["closed"] == headers, "equal already: nothing else has to travel"
        assert seen["finished"] == (3, 3 * once)
        assert seen["hidden"] == 0
        assert seen["wait"] == ranks[0]["wait"], "known to all"
        # Seven steps of 0.2 s, of which the last came before a consensus(), which waited for it.
        others = [seen["wait"][rank] for rank in (0, 2, 3)]
        assert all(0.8 < wait < 60 for wait in others)
        assert seen["wait"][1] < 0.5 * min(others), "who is waited for does not wait"
    assert all(ranks[rank]["exposed"] > 0.8 for rank in (0, 2, 3))


# Resuming.


def first_half(rank: int, m: int, folder: str, steps: int, stop: int | None) -> list[float]:
    """Train from the start; save at ``stop`` and leave there."""
    model = network()
    optimizer = LocalAdamW(
        model.parameters(), RATE, period=QSR(0.08, 2), sync=Average(("exp_avg", "exp_avg_sq"))
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step == stop:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state, f"{folder}/{rank}.pt")
            return []
        one_step(model, optimizer, scheduler, step, rank)
    return [*vector(model).tolist(), *figures(optimizer)]


def second_half(rank: int, m: int, folder: str, steps: int, start: int) -> list[float]:
    model = network(seed=5)
    optimizer = LocalAdamW(
        model.parameters(), RATE, period=QSR(0.08, 2), sync=Average(("exp_avg", "exp_avg_sq"))
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    state = torch.load(f"{folder}/{rank}.pt", weights_only=True)
    for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler)):
        part.load_state_dict(state[name])
    for step in range(start, steps):
        one_step(model, optimizer, scheduler, step, rank)
    return [*vector(model).tolist(), *figures(optimizer)]


def one_step(
    model: nn.Module, optimizer: LocalOptimizer, scheduler: Any, step: int, rank: int
) -> None:
    optimizer.zero_grad()
    backward(model, step, rank)
    optimizer.step()
    scheduler.step()


def figures(optimizer: LocalOptimizer) -> list[float]:
    traffic = optimizer.traffic
    return [optimizer.round, optimizer.h, traffic.syncs, traffic.bytes, traffic.other_bytes]


def test_resume_in_new_processes(tmp_path: Path) -> None:
    """Saved in mid-round, resumed in new processes: the same bits as the uninterrupted run."""
    steps, stop = 12, 7
    whole = run(first_half, 2, str(tmp_path), steps, None)
    run(first_half, 2, str(tmp_path), steps, stop)
    assert run(second_half, 2, str(tmp_path), steps, stop) == whole


def save_between_rounds(rank: int, m: int, folder: str) -> None:
    model = network()
    optimizer = LocalSGD(model.parameters(), RATE, period=Constant(2), momentum=0.9)
    train(model, optimizer, rank, 3)
    torch.save(optimizer.state_dict(), f"{folder}/mid{rank}.pt")
    train(model, optimizer, rank, 1)
    torch.save(optimizer.state_dict(), f"{folder}/end{rank}.pt")


def load_on_others(rank: int, m: int, folder: str) -> list[int]:
    """Into another number of replicas: between rounds only."""
    model = network()
    optimizer = LocalSGD(model.parameters(), RATE, period=Constant(2), momentum=0.9)
    state = torch.load(f"{folder}/mid0.pt", weights_only=True)
    with pytest.raises(ValueError, match=r"state to load has (rank|world_size)"):
        optimizer.load_state_dict(state)
    optimizer.load_state_dict(torch.load(f"{folder}/end0.pt", weights_only=True))
    train(model, optimizer, rank, 4)
    return [optimizer.traffic.syncs, optimizer.round, len(optimizer.traffic.wait)]


def test_other_number_of_replicas(tmp_path: Path) -> None:
    """A state saved between rounds loads into other numbers of replicas; one saved in mid-round
    belongs to its rank, and says so."""
    run(save_between_rounds, 2, str(tmp_path))
    assert run(load_on_others, 4, str(tmp_path)) == [[4, 4, 4]] * 4
    assert run(load_on_others, 1, str(tmp_path)) == [[4, 4, 1]]


# Groups of parameters.


def grow(rank: int, m: int) -> list[float]:
    torch.manual_seed(rank)
    old, new = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))
    late = nn.Parameter(torch.randn(1))
    optimizer = LocalAdamW([old], RATE, period=Constant(2), sync=Average(("exp_avg",)))
    for step in range(6):
        if step == 1:
            with pytest.raises(RuntimeError, match="1 steps before the round ends"):
                optimizer.add_param_group({"params": [late]})
        if step == 2:
            optimizer.add_param_group({"params": [new], "lr": 0.5})
        for p in (old, new):
            p.grad = torch.full_like(p, 1.0 + rank) if p is old or step >= 2 else None
        optimizer.step()
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 1]
    moments = [optimizer.state[p]["exp_avg"].reshape(-1) for p in (old, new)]
    return torch.cat([old.detach(), new.detach().reshape(-1), *moments]).tolist()


def test_add_param_group() -> None:
    """Groups are added between rounds, on all ranks alike."""
    zero, one = run(grow, 2)
    assert zero == one


# GradScaler.


def scaled(rank: int, m: int) -> list[Any]:
    """Rank 1's third gradient is infinite: its inner step is skipped, and counts."""
    out = []
    for fused in (False, True):
        for auto in (True, False):
            model = network()
            inner = torch.optim.AdamW(model.parameters(), RATE, fused=fused)
            optimizer = LocalOptimizer(inner, Constant(4), auto=auto)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            for step in range(8):
                optimizer.zero_grad()
                images, labels = batch(step, rank)
                loss = nn.functional.cross_entropy(model(images), labels)
                scaler.scale(loss).backward()
                if rank == 1 and step == 2:
                    model[0].weight.grad[0, 0, 0, 0] = float("inf")
                before = vector(model).clone()
                if step % 2:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                if not auto:
                    assert optimizer.average() == (step % 4 == 3)
                if step == 2:
                    assert torch.equal(before, vector(model)) == (rank == 1), "skipped on rank 1"
                scaler.update()
                scheduler.step()
                assert optimizer.synced == (step % 4 == 3)
            out.append((vector(model).numpy().copy(), scaler.get_scale()))
    return out


def test_grad_scaler() -> None:
    """A step that GradScaler skips on one replica is a step of the round all the same: with auto,
    without it, unscaled before or not, and with an inner optimizer that unscales."""
    zero, one = run(scaled, 2)
    for (x, scale), (y, other_scale) in zip(zero, one, strict=True):
        assert np.array_equal(x, y)
        assert (scale, other_scale) == (1024.0, 512.0)
    plain, by_hand, fused, fused_by_hand = (x for x, _ in zero)
    assert np.array_equal(plain, by_hand) and np.array_equal(fused, fused_by_hand)
    assert np.allclose(plain, fused, rtol=1e-4, atol=1e-5)
