"""Where rules meet the unusual: rollbacks, replicas and settings that differ, odd types.

What any rule can meet is tried with every case of every rule; none is named.
"""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from localopt import (
    EASGD,
    LSGD,
    BlockMomentum,
    Constant,
    DiLoCo,
    LocalOptimizer,
    LocalSGD,
    NonFiniteError,
    ReplicaMismatchError,
    Rule,
    SyncError,
)
from tests.support import oracle
from tests.support.contract import SIZE, Model, every_case, local_optimizer
from tests.support.ranks import run

pytestmark = pytest.mark.slow


def local_sgd(p: nn.Parameter, rule: Rule, h: int = 2, **options: Any) -> LocalOptimizer:
    return LocalSGD([p], 0.1, momentum=0.9, period=Constant(h), sync=rule, **options)


def steps(optimizer: LocalOptimizer, rank: int, count: int) -> None:
    for _ in range(count):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = p.detach() - (1.0 + rank)
        optimizer.record_loss(float(rank))
        optimizer.step()


# Going back.


def roll_back(rank: int, m: int) -> None:
    for name, index, inner in every_case():
        model = Model()
        optimizer = local_optimizer(name, index, inner, model, Constant(2))
        steps(optimizer, rank, 5)
        weights, state = model.vector(), copy.deepcopy(optimizer.state_dict())
        seen = []
        for _ in range(3):  # from one state, three times over
            steps(optimizer, rank, 6)  # with overlap, a collective is in flight at the end
            seen.append(model.vector())
            optimizer.record_loss(float("nan"))  # seen, and not stepped on
            model.set_vector(weights)
            optimizer.load_state_dict(copy.deepcopy(state))
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]), (name, index)


def test_rolling_back_forgets_what_is_in_flight() -> None:
    run(roll_back, 2)


def bare_state(rank: int, m: int) -> None:
    """Weights and the inner optimizer's state alone: a new run begins from there."""
    for name, index, inner in every_case():
        outcomes = []
        for warm, landed in ((False, False), (True, False), (True, True)):
            model = Model()
            optimizer = local_optimizer(name, index, inner, model, Constant(2))
            state = copy.deepcopy(optimizer.inner.state_dict())
            if warm:
                steps(optimizer, rank, 5)
            if landed:
                optimizer.state_dict()  # has waited for what is in flight
            model.set_vector(torch.full((SIZE,), 0.5))
            optimizer.load_state_dict(state)
            steps(optimizer, rank, 7)
            outcomes.append(model.vector())
        assert all(torch.equal(outcomes[0], other) for other in outcomes), (name, index)


def test_a_bare_state_begins_anew() -> None:
    run(bare_state, 2)


# Replicas and settings that differ.


def differing(rank: int, m: int) -> set[str]:
    changed = set()
    for name, index, inner in every_case():
        model = Model()
        optimizer = local_optimizer(name, index, inner, model, Constant(2))
        mine, expected = torch.full((SIZE,), float(rank)), torch.full((SIZE,), 0.5)
        if optimizer.sync.centre is not None:
            expected = model.vector()
        model.set_vector(mine)  # "weights that differ between replicas are loaded afterwards"
        with optimizer.consensus():
            assert torch.equal(model.vector(), expected.double()), (name, index)
        assert torch.equal(model.vector(), mine.double()), (name, index)
        optimizer.finish()
        assert torch.equal(model.vector(), expected.double()), (name, index)

        model = Model()
        optimizer = local_optimizer(name, index, inner, model, Constant(2))
        steps(optimizer, rank, 12)  # groups of all kinds have all met at the last
        if optimizer.sync.replicas_agree:
            before = model.vector()
            model.set_vector(before + rank)  # behind the library's back, on one replica
            with pytest.raises(ReplicaMismatchError, match="at step 12"), optimizer.consensus():
                pass
            with pytest.warns(UserWarning, match="different weights at step 12"):
                optimizer.finish()
            assert torch.allclose(model.vector(), before + 0.5), "looked for, not believed"
            changed.add(name)
    return changed


def test_finish_makes_equal_what_was_loaded_apart() -> None:
    for changed in run(differing, 2):
        assert changed >= {"Average", "BlockMomentum", "HierarchicalAverage"}


def one_outer_rate(rank: int, m: int) -> list[str]:
    told = []
    for name, index, inner in every_case():
        optimizer = local_optimizer(name, index, inner, Model(), Constant(2))
        if getattr(optimizer.sync, "outer_optimizer", None) is None:
            continue
        steps(optimizer, rank, 4)
        if rank == 0:
            optimizer.sync.outer_optimizer.param_groups[0]["lr"] *= 0.5
        with pytest.raises(ReplicaMismatchError) as caught:
            steps(optimizer, rank, 2)
        told.append(str(caught.value))
    return told


def test_outer_settings_that_differ_are_named() -> None:
    one, other = run(one_outer_rate, 2)
    assert one == other and len(one) >= 4
    differ = r"at step [56] the settings of rank 0 and rank 1 differ"  # a fragment comes first
    assert all(re.search(differ, text) for text in one), one


def without_rate(rank: int, m: int, ranks: set[int]) -> list[tuple[int, str]]:
    """What is told where a rate is divided by, and how many rounds late."""
    told = []
    for name, index, inner in every_case():
        optimizer = local_optimizer(name, index, inner, Model(), Constant(2))
        if not getattr(optimizer.sync, "normalize_by_lr", name == "SlowMo"):
            continue
        if rank in ranks:
            optimizer.param_groups[0]["lr"] = 0.0
        with pytest.raises((ValueError, SyncError)) as caught:
            steps(optimizer, rank, 4)
        text = f"{type(caught.value).__name__}: {caught.value}"
        told.append((oracle.CASES[name][index].delay, text))
    return told


def test_a_rate_of_zero_is_refused_on_every_rank() -> None:
    """Nothing is divided by γ = 0; where one replica has it, all say so (overlapped: a
    round late)."""
    for told in run(without_rate, 2, {0, 1}):
        assert all(text.startswith("ValueError: the mean learning rate") for _, text in told)
        assert {delay for delay, _ in told} == {0, 1}
    zero, one = run(without_rate, 2, {0})
    for (delay, text), (_, other) in zip(zero, one, strict=True):
        assert text == other and text.startswith("ReplicaMismatchError: at step"), delay


class Plain(Rule):
    """All that a rule needs."""

    def end_round(self) -> None:
        self.in_place.mean_()


def plain_rule(rank: int, m: int) -> float:
    p = nn.Parameter(torch.zeros(1))
    optimizer = LocalSGD([p], 1.0, period=lambda step, lr: 2, sync=Plain())
    for _ in range(2):
        p.grad = torch.full((1,), -float(rank))
        optimizer.step()
    return float(p.detach())


def test_a_rule_needs_no_more_than_end_round() -> None:
    assert run(plain_rule, 2) == [1.0, 1.0]


# NaN in groups.


def nan_in_a_group(rank: int, m: int, of_losses: bool) -> str:
    p = nn.Parameter(torch.zeros(3))
    rule = LSGD(group_size=2, global_every=1)
    optimizer = local_sgd(p, rule)
    with pytest.raises(NonFiniteError) as caught:
        for _ in range(2):
            p.grad = torch.full((3,), float("nan") if rank == 1 and not of_losses else 1.0)
            optimizer.record_loss(float("nan") if of_losses and rank < 2 else 1.0)
            optimizer.step()
    return str(caught.value)


def test_nan_in_one_group_is_named_in_all() -> None:
    told = run(nan_in_a_group, 4, False)
    assert len(set(told)) == 1 and told[0].startswith("rank 1 brought NaN or infinity")
    told = run(nan_in_a_group, 4, True)
    assert len(set(told)) == 1 and told[0].startswith("ranks 0, 1 brought no training loss")


# Parameters.


def untouched(rank: int, m: int) -> None:
    """Rounding of the mean of equal numbers must not reach an optimizer that divides by |Δ|."""
    torch.manual_seed(0)
    frozen = nn.Parameter(torch.randn(64), requires_grad=False)
    p = nn.Parameter(torch.randn(64))
    start = frozen.clone()
    rule = BlockMomentum(partial(torch.optim.Adam, lr=0.01))
    optimizer = LocalSGD([frozen, p], 0.1, period=Constant(1), sync=rule)
    for _ in range(10):
        p.grad = torch.randn(64)
        optimizer.step()
    assert torch.equal(frozen, start)


def test_an_adaptive_outer_optimizer_leaves_frozen_parameters_alone() -> None:
    run(untouched, 3)


def small_outer_steps(rank: int, m: int) -> float:
    """Every round moves the replicas by one unit in the last place of bfloat16; ζ = 0.05."""
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = LocalSGD([p], 2.0**-7, period=Constant(1), sync=DiLoCo(lr=0.05, momentum=0.0))
    for _ in range(40):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    return float(optimizer.sync.z.data[0][0])


def test_small_outer_steps_add_up_in_16_bits() -> None:
    assert run(small_outer_steps, 2) == pytest.approx([1 + 40 * 0.05 * 2.0**-7] * 2, abs=1e-6)


# Losses and reports.


def steps_of_reports(optimizer: LocalOptimizer, rank: int) -> list[int | None]:
    """After each of three rounds, and after finish()."""
    told = []
    for _ in range(3):
        steps(optimizer, rank, 2)
        told.append(optimizer.report and optimizer.report.step)
    optimizer.finish()
    return [*told, optimizer.report.step]


def reports(rank: int, m: int) -> dict[tuple[str, int], tuple[int, list[int | None]]]:
    """By rule and case: how many rounds late it should be, and the steps that are reported."""
    seen = {}
    for name, index, inner in every_case():
        optimizer = local_optimizer(name, index, inner, Model(), Constant(2))
        case = oracle.CASES[name][index]
        seen[name, index] = case.delay, steps_of_reports(optimizer, rank)
        if case.settings_for(m).get("group_size", m) == m:  # all have met
            assert optimizer.report.losses == [float(r) for r in range(m)], (name, index)
    blocking = local_sgd(nn.Parameter(torch.zeros(3)), EASGD(overlap=False))
    seen["EASGD without overlap", 0] = 0, steps_of_reports(blocking, rank)
    return seen


def test_only_what_runs_behind_training_is_reported_late() -> None:
    for seen in run(reports, 2):
        assert {delay for delay, _ in seen.values()} == {0, 1}
        for case, (delay, told) in seen.items():
            assert told == ([None, 2, 4, 6] if delay else [2, 4, 6, 6]), case


def losses(rank: int, m: int) -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = local_sgd(p, LSGD(), h=1)
    p.grad = torch.ones(3)
    for value in (3, 3.0, torch.tensor(3.0), torch.tensor([3.0])):
        optimizer.step(lambda value=value: value)
        assert optimizer.report.losses == [3.0, 3.0]
    optimizer.record_loss(torch.tensor(1.0, dtype=torch.bfloat16))
    optimizer.step(lambda: 7.0)
    assert optimizer.report.losses == [1.0, 1.0], "recorded goes before the closure's"
    optimizer.record_loss(1.0)
    with pytest.raises(RuntimeError, match=f"step 6 on rank {rank} has a loss already"):
        optimizer.record_loss(1.0)


def test_losses_of_every_kind() -> None:
    run(losses, 2)
