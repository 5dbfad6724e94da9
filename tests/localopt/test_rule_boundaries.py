"""What replicas do to each other at a round's end, what overlaps with training, and groups."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from localopt import (
    EASGD,
    LSGD,
    Average,
    CoCoDSGD,
    Constant,
    HierarchicalAverage,
    LocalOptimizer,
    NonFiniteError,
    OverlapLocalSGD,
    Rule,
    SlowMo,
)
from tests.support import oracle
from tests.support.contract import stacked
from tests.support.one_parameter import DECAY, sgd, trajectory
from tests.support.ranks import outcomes_of, run

pytestmark = pytest.mark.slow

M = 4
NAN = math.nan


# What replicas do to each other, seen at the boundary.


class Boundaries:
    """A replica whose parameters are seen before and after each synchronisation.

    Its gradient is its own and does not depend on x; the inner optimizer is SGD with rate 1.
    """

    def __init__(
        self, rank: int, rule: Rule, h: int = 1, dtype: torch.dtype = torch.float64
    ) -> None:
        self.p = nn.Parameter(torch.zeros(5, dtype=dtype))
        inner = torch.optim.SGD([self.p], 1.0)
        self.optimizer = LocalOptimizer(inner, Constant(h), rule, auto=False)
        self.generator = torch.Generator().manual_seed(rank)
        self.h = h

    def round(self, losses: float | list[float] = 0.0) -> tuple[Tensor, Tensor]:
        """One round; parameters before and after its synchronisation."""
        losses = losses if isinstance(losses, list) else [losses] * self.h
        for loss in losses:
            self.p.grad = torch.randn(5, generator=self.generator, dtype=self.p.dtype)
            self.optimizer.record_loss(torch.tensor(loss))
            self.optimizer.step()
            before = self.p.detach().clone()
            ended = self.optimizer.average()
        assert ended
        return before, self.p.detach().clone()

    def consensus(self) -> Tensor:
        with self.optimizer.consensus():
            return self.p.detach().clone()


def elastic_forces(rank: int, m: int) -> None:
    """β = mα by default: what the replicas lose the centre wins, so Σ_i x_i + z stays; with it
    x_i and z are as the equation has them, with the old z in both."""
    replica, z = Boundaries(rank, EASGD()), torch.zeros(5, dtype=torch.float64)
    for _ in range(5):
        before, after = map(stacked, replica.round())
        old, z = z, replica.consensus()
        assert torch.allclose(before.sum(0) + old, after.sum(0) + z, rtol=1e-12)
        assert torch.allclose(after, before - 0.9 / m * (before - old), rtol=1e-12)
        assert torch.allclose(z, old + 0.9 * (before.mean(0) - old), rtol=1e-12)


def anchor_of_pulled_models(rank: int, m: int) -> None:
    """"With β = 0 the anchor is the last mean of pulled replicas", of one boundary ago; at the
    first boundary it is the initial model."""
    replica, z = Boundaries(rank, OverlapLocalSGD(0.6, 0.0)), torch.zeros(5, dtype=torch.float64)
    for _ in range(5):
        before, after = map(stacked, replica.round())
        assert torch.allclose(after, 0.4 * before + 0.6 * z, rtol=1e-12)
        z = after.mean(0)


def corrected_by_the_mean(rank: int, m: int) -> None:
    """"x_i ← mean(s) + (x_i - s_i) … The first round's end only launches"."""
    replica, s = Boundaries(rank, CoCoDSGD()), None
    for _ in range(5):
        before, after = map(stacked, replica.round())
        expected = before if s is None else s.mean(0) + (before - s)
        assert torch.allclose(after, expected, rtol=1e-12)
        s = after


# Each replica's mean loss, who leads, and the leaders of the groups of two.
ELECTIONS = [
    ([1.0, 1.0, 1.0, 1.0], 0, [0, 2]),
    ([2.0, 1.0, 1.0, 3.0], 1, [1, 2]),
    ([NAN, NAN, 3.0, 2.0], 3, None),
    ([NAN, 5.0, 6.0, 7.0], 1, [1, 2]),
    ([-1.0, -2.0, -2.0, NAN], 1, [1, 2]),
]


def elections(rank: int, m: int) -> None:
    """"Among equal losses the lowest rank leads; a NaN never does"; the loss is the round's mean.
    With c = 1 and p = 0 followers have the leader's bits."""
    for losses, leader, of_groups in ELECTIONS:
        for dtype in (torch.float32, torch.float64):
            replica = Boundaries(rank, LSGD(c=1.0, p=0.0), 2, dtype)
            for _ in range(2):
                # The last loss alone would have the order reversed.
                before, after = map(stacked, replica.round([5 * losses[rank], -3 * losses[rank]]))
                assert torch.equal(after, before[leader].expand(m, 5)), losses
            if of_groups is None:
                continue
            settings = {"group_size": 2, "c_global": 1.0, "p_global": 0.0, "global_every": 2}
            replica = Boundaries(rank, LSGD(c=1.0, p=0.0, **settings), 2, dtype)
            for every in (False, True):
                before, after = map(stacked, replica.round([losses[rank]] * 2))
                rows = [leader] * m if every else [of_groups[i // 2] for i in range(m)]
                assert torch.equal(after, before[rows]), (losses, every)
    replica = Boundaries(rank, LSGD())
    with pytest.raises(NonFiniteError, match="training loss that is a number"):
        replica.round(NAN)


def data_parallel_in_groups(rank: int, m: int) -> None:
    """With H = 1 and SGD, momentum included, for it is linear: data-parallel inside the groups,
    and parameters averaged across them every few steps."""
    every, problem = 3, oracle.Quadratics.make(m, 20)
    ours = trajectory(rank, problem, HierarchicalAverage(2, every), period=Constant(1))
    p = nn.Parameter(torch.tensor(problem.x0))
    a, b = torch.as_tensor(problem.a[rank]), torch.as_tensor(problem.b[rank])
    optimizer = sgd([p])
    mine = slice(rank // 2 * 2, rank // 2 * 2 + 2)
    for step, rate in enumerate(DECAY):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = stacked(a @ (p.detach() - b))[mine].mean(0)
        optimizer.step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                p.copy_(stacked(p.detach()).mean(0))
        assert np.allclose(ours[step], p.detach().numpy(), rtol=1e-11), step


def at_a_rate_of_zero(rank: int, m: int) -> None:
    """What is divided by a mean rate of 0 is refused with the reason, and not before the end."""
    for rule in (SlowMo(0.5), OverlapLocalSGD(normalize_by_lr=True)):
        p = nn.Parameter(torch.zeros(3))
        optimizer = LocalOptimizer(torch.optim.SGD([p], 0.0), Constant(2), rule)
        p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(ValueError, match=r"mean learning rate .* step 2 .*0.*divides by it"):
            optimizer.step()


@pytest.mark.parametrize(
    "claim",
    [
        elastic_forces, anchor_of_pulled_models, corrected_by_the_mean, elections,
        data_parallel_in_groups, at_a_rate_of_zero,
    ],
)  # fmt: skip
def test_at_the_boundary(claim: Callable[[int, int], None]) -> None:
    run(claim, M)


# What overlaps with training.

LATE = 0.8  # seconds that rank 1 comes late to the first boundary, at least
OVERLAPPED: dict[str, Callable[[], Rule]] = {
    "EASGD": EASGD, "Overlap": OverlapLocalSGD, "CoCoD": CoCoDSGD,
}  # fmt: skip
BLOCKING: dict[str, Callable[[], Rule]] = {
    "Average": Average, "EASGD without overlap": lambda: EASGD(overlap=False),
    "EASGD with a pull": lambda: EASGD(pull=0.1),
}  # fmt: skip


def late(rank: int, m: int, meetings: str) -> dict[str, tuple[float, float, float]]:
    """The seconds of rank 1's boundary, and the rule's hidden and exposed ones."""
    store, seen = dist.FileStore(meetings, m), {}
    for name, rule in {**OVERLAPPED, **BLOCKING}.items():
        p = nn.Parameter(torch.zeros(1000))
        optimizer = LocalOptimizer(torch.optim.SGD([p], 0.1), Constant(2), rule())
        p.grad = torch.ones_like(p)
        optimizer.step()
        dist.barrier()
        if rank == 1:
            if name in OVERLAPPED:  # for ever, if it had to wait for this one
                store.wait([f"{name}: rank 0 has passed"])
            time.sleep(LATE)
        started = time.perf_counter()
        optimizer.step()
        boundary = time.perf_counter() - started
        store.set(f"{name}: rank {rank} has passed", "")
        optimizer.step()
        store.wait([f"{name}: rank 1 has passed"])  # rank 0's round goes on until then
        time.sleep(0.1)
        optimizer.step()
        traffic = optimizer.traffic
        seen[name] = boundary, traffic.hidden, traffic.exposed
        optimizer.finish()
        assert traffic.syncs == 2 and traffic.bytes > 0
        assert traffic.wait[rank] > 0.5 * LATE or rank == 1
    return seen


@pytest.mark.alone
def test_overlapped_rules_overlap(tmp_path: Path) -> None:
    """Who comes to a boundary before a late peer does not wait for it, and the time that the
    collective took is hidden; under rules that do not overlap training stands still for it."""
    zero, _ = run(late, 2, str(tmp_path / "meetings"))
    for name in OVERLAPPED:
        _, hidden, exposed = zero[name]
        assert hidden > 0.75 * LATE > exposed, (name, hidden, exposed)
    for name in BLOCKING:
        boundary, hidden, exposed = zero[name]
        assert min(boundary, exposed) > 0.75 * LATE > hidden, (name, boundary, hidden, exposed)


# Groups that do not meet at every synchronisation.

GROUPED: dict[str, Callable[[], Rule]] = {
    "means": lambda: HierarchicalAverage(2, 2),
    "leaders": lambda: LSGD(group_size=2, global_every=2),
}


def trouble_in_a_group(rank: int, m: int, name: str, kind: str) -> None:
    """Rank 1 brings NaN into the third round, in which groups are alone, or ends before it."""
    p = nn.Parameter(torch.zeros(5))
    optimizer = LocalOptimizer(torch.optim.SGD([p], 0.1), Constant(2), GROUPED[name]())
    for step in range(8):
        if rank == 1 and step == 4:
            if kind == "short":
                break
            with torch.no_grad():
                p[3] = NAN
        p.grad = torch.ones_like(p)
        optimizer.record_loss(1.0)
        optimizer.step()
    optimizer.finish()


@pytest.mark.parametrize("kind", ["bad", "short"])
@pytest.mark.parametrize("name", GROUPED)
def test_trouble_in_a_group(name: str, kind: str) -> None:
    """Who meets the replica at the next boundary names it. Other groups cannot know: they find
    their peers gone when they next meet, and do not wait for ever."""
    outcomes = outcomes_of(trouble_in_a_group, 4, name, kind, timeout=100)  # gloo waits longer
    assert not any(ok for ok, _ in outcomes)
    wanted = {
        "bad": ["NonFiniteError: rank 1 brought NaN or infinity", "at step 6"],
        "short": ["ReplicaMismatchError", "rank 0 at step 6", "rank 1 at step 4"],
    }[kind]
    for _, text in outcomes[:2]:
        assert all(part in text for part in wanted), text
    for _, text in outcomes[2:]:
        assert "deadlock" not in text, text


def group_sizes(rank: int, m: int) -> None:
    for size, rule in itertools.product((3, 8), (HierarchicalAverage, LSGD)):
        with pytest.raises(ValueError, match=f"group_size is {size}: it does not divide the 4"):
            LocalOptimizer(
                torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1),
                Constant(1),
                rule(group_size=size, global_every=2),
            )


def test_group_size_divides() -> None:
    run(group_sizes, M)
