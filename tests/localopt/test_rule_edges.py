"""Where rules meet the unusual: rollbacks, replicas and settings that differ, odd types."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localopt import (
    EASGD,
    LSGD,
    Average,
    BlockMomentum,
    CoCoDSGD,
    Constant,
    DiLoCo,
    HierarchicalAverage,
    LocalOptimizer,
    LocalSGD,
    NonFiniteError,
    OverlapLocalSGD,
    ReplicaMismatchError,
    Rule,
    SlowMo,
    SyncError,
)
from tests.support.ranks import run

pytestmark = pytest.mark.slow

RULES: dict[str, Callable[[], Rule]] = {
    "average": Average,
    "diloco": DiLoCo,
    "easgd": EASGD,
    "overlap": OverlapLocalSGD,
    "cocod": CoCoDSGD,
    "lsgd": LSGD,
}


def local_sgd(p: nn.Parameter, rule: Rule, h: int = 2, **options: Any) -> LocalOptimizer:
    return LocalSGD([p], 0.1, momentum=0.9, period=Constant(h), sync=rule, **options)


def steps(optimizer: LocalOptimizer, p: nn.Parameter, rank: int, count: int) -> None:
    for _ in range(count):
        p.grad = p.detach() - (1.0 + rank)
        optimizer.record_loss(float(rank))
        optimizer.step()


# Going back.


def roll_back(rank: int, m: int) -> None:
    for name, make in RULES.items():
        p = nn.Parameter(torch.zeros(3))
        optimizer = local_sgd(p, make())
        steps(optimizer, p, rank, 5)
        weights, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
        seen = []
        for _ in range(3):  # from one state, three times over
            steps(optimizer, p, rank, 6)  # with overlap, a collective is in flight at the end
            seen.append(p.detach().clone())
            optimizer.record_loss(float("nan"))  # seen, and not stepped on
            with torch.no_grad():
                p.copy_(weights)
            optimizer.load_state_dict(copy.deepcopy(state))
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]), name


def test_rolling_back_forgets_what_is_in_flight() -> None:
    run(roll_back, 2)


def bare_state(rank: int, m: int) -> None:
    """Weights and the inner optimizer's state alone: a new run begins from there."""
    for name, make in RULES.items():
        outcomes = []
        for warm in (False, True):
            p = nn.Parameter(torch.zeros(3))
            optimizer = local_sgd(p, make())
            if warm:
                steps(optimizer, p, rank, 5)
            with torch.no_grad():
                p.fill_(0.5)
            optimizer.load_state_dict(torch.optim.SGD([p], 0.1, momentum=0.9).state_dict())
            steps(optimizer, p, rank, 7)
            outcomes.append(p.detach().clone())
        assert torch.equal(*outcomes), name


def test_a_bare_state_begins_anew() -> None:
    run(bare_state, 2)


# Replicas and settings that differ.


def differing(rank: int, m: int) -> None:
    for name in ("average", "cocod", "overlap"):
        p = nn.Parameter(torch.zeros(3))
        optimizer = local_sgd(p, RULES[name]())
        with torch.no_grad():
            p.fill_(float(rank))  # "weights that differ between replicas are loaded afterwards"
        with optimizer.consensus():
            assert p.detach().tolist() == [0.5] * 3, name
        assert p.detach().tolist() == [rank] * 3
        optimizer.finish()
        assert p.detach().tolist() == [0.5] * 3, name
    p = nn.Parameter(torch.zeros(3))
    optimizer = local_sgd(p, Average())
    steps(optimizer, p, rank, 2)
    with torch.no_grad():
        p.add_(float(rank))  # behind the library's back, on one replica
    before = p.detach().clone() - rank
    optimizer.finish()
    assert torch.allclose(p.detach(), before + 0.5), "equal is looked for, not believed"


def test_finish_makes_equal_what_was_loaded_apart() -> None:
    run(differing, 2)


def one_outer_rate(rank: int, m: int) -> list[str]:
    told = []
    for make in (DiLoCo, partial(SlowMo, beta=0.5)):
        p = nn.Parameter(torch.zeros(3))
        rule = make()
        optimizer = local_sgd(p, rule)
        steps(optimizer, p, rank, 4)
        if rank == 0:
            rule.outer_optimizer.param_groups[0]["lr"] *= 0.5
        with pytest.raises(ReplicaMismatchError) as caught:
            steps(optimizer, p, rank, 2)
        told.append(str(caught.value))
    return told


def test_outer_settings_that_differ_are_named() -> None:
    one, other = run(one_outer_rate, 2)
    assert one == other
    assert all("at step 6 the settings of rank 0 and rank 1 differ" in text for text in one)


def without_rate(rank: int, m: int, ranks: set[int]) -> list[str]:
    told = []
    for rule in (SlowMo(beta=0.5), OverlapLocalSGD(normalize_by_lr=True)):
        p = nn.Parameter(torch.zeros(3))
        optimizer = local_sgd(p, rule)
        if rank in ranks:
            optimizer.param_groups[0]["lr"] = 0.0
        try:
            steps(optimizer, p, rank, 4)
        except (ValueError, SyncError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_a_rate_of_zero_is_refused_on_every_rank() -> None:
    """Nothing is divided by γ = 0; where one replica has it, all say so (overlapped: a
    round late)."""
    for told in run(without_rate, 2, {0, 1}):
        assert all(text.startswith("ValueError: the mean learning rate") for text in told)
        assert len(told) == 2
    zero, one = run(without_rate, 2, {0})
    assert zero[0] == one[0] and "ReplicaMismatchError" in one[0]
    assert "mean learning rate" in zero[1] and "ReplicaMismatchError" in one[1]


class Plain(Rule):
    """All that a rule needs."""

    def end_round(self) -> None:
        self.replica.mean_()


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


# Rates.


def test_a_step_that_failed_has_no_rate() -> None:
    """γ is the mean over the steps that were made."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = LocalSGD([p], 0.5, period=Constant(3), sync=SlowMo(beta=0.5))

    def fails() -> float:
        raise KeyError("no batch")

    p.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 100.0
    with pytest.raises(KeyError):
        optimizer.step(fails)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert optimizer._replica.lr == 0.375


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


def reports(rank: int, m: int) -> dict[str, list[int | None]]:
    seen: dict[str, list[int | None]] = {}
    rules = {"pull": EASGD(pull=0.1), "blocking": EASGD(overlap=False), "overlapped": EASGD()}
    for name, rule in {**rules, "lsgd": LSGD(), "groups": HierarchicalAverage(1, 2)}.items():
        p = nn.Parameter(torch.zeros(3))
        optimizer = local_sgd(p, rule)
        seen[name] = []
        for _ in range(3):
            steps(optimizer, p, rank, 2)
            report = optimizer.report
            seen[name].append(None if report is None else report.step)
            if report is not None and name != "groups":
                assert report.losses == [float(r) for r in range(m)]
        optimizer.finish()
        seen[name].append(optimizer.report.step)
    return seen


def test_only_what_runs_behind_training_is_reported_late() -> None:
    for seen in run(reports, 2):
        late = seen.pop("overlapped")
        assert late == [None, 2, 4, 6]
        assert all(told == [2, 4, 6, 6] for told in seen.values()), seen


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


def test_an_attached_rule_cannot_be_copied() -> None:
    rule = EASGD()
    assert copy.deepcopy(rule).alpha is None
    local_sgd(nn.Parameter(torch.zeros(3)), rule)
    with pytest.raises(TypeError, match="this EASGD belongs to an optimizer"):
        copy.deepcopy(rule)


def test_outer_optimizers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="it would climb"):
        BlockMomentum(partial(torch.optim.SGD, lr=0.1, maximize=True))
    with pytest.raises(ValueError, match="LBFGS, which needs a closure"):
        BlockMomentum(torch.optim.LBFGS)
    with pytest.raises(TypeError, match="must make a torch"):
        BlockMomentum(lambda params: params)
    BlockMomentum(partial(torch.optim.Adam, capturable=True))


def test_a_state_of_another_outer_optimizer_is_refused() -> None:
    def optimizer(outer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> LocalOptimizer:
        return local_sgd(nn.Parameter(torch.zeros(3)), BlockMomentum(outer))

    adam, sgd = optimizer(torch.optim.Adam), optimizer(partial(torch.optim.SGD, lr=0.5))
    with pytest.raises(ValueError, match="outer optimizer SGD, this rule Adam"):
        adam.load_state_dict(sgd.state_dict())
