"""What a rule refuses: settings, outer optimizers, a second optimizer, steps without a loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localopt import (
    BMUF,
    EASGD,
    LSGD,
    BlockMomentum,
    Constant,
    DiLoCo,
    HierarchicalAverage,
    LocalOptimizer,
    OverlapLocalSGD,
    Rule,
    SlowMo,
    Streaming,
)
from tests.support.contract import RULES, Model, cases, every_rule, local_optimizer, new_rule

NAN = math.nan


# Settings.

SGD = torch.optim.SGD
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "alpha 0": (lambda: EASGD(alpha=0.0), "alpha is 0"),
    "alpha < 0": (lambda: EASGD(alpha=-0.1), "alpha is -0.1"),
    "alpha NaN": (lambda: EASGD(alpha=NAN), "alpha is nan"),
    "beta 0": (lambda: EASGD(alpha=0.5, beta=0.0), "beta 0"),
    "alpha + beta": (lambda: EASGD(alpha=0.9, beta=1.1), "sum less than 2"),
    "beta = m alpha": (lambda: local(EASGD(alpha=1.0)), "sum less than 2"),
    "pull < 0": (lambda: EASGD(pull=-0.1), "pull is -0.1"),
    "pull > 1": (lambda: EASGD(pull=1.1), "pull is 1.1"),
    "pull NaN": (lambda: EASGD(pull=NAN), "pull is nan"),
    "overlap and pull": (lambda: EASGD(pull=0.1, overlap=True), "overlap with a pull"),
    "no fragments": (lambda: Streaming(0), "fragments is 0: there must be at least 1"),
    "half a fragment": (lambda: Streaming(0.5), "fragments is 0.5: it must be an integer"),
    "streaming alpha 0": (lambda: Streaming(2, alpha=0.0), r"alpha is 0.0.* \(0, 1\]"),
    "streaming alpha > 1": (lambda: Streaming(2, alpha=1.1), r"alpha is 1.1.* \(0, 1\]"),
    "streaming momentum 1": (lambda: Streaming(2, outer_momentum=1.0), "outer momentum is 1.0"),
    "streaming rate": (lambda: Streaming(2, 1.4, 0.9), "rate is 1.4.* 1.36"),
    "overlap alpha 1": (lambda: OverlapLocalSGD(alpha=1.0), r"alpha is 1.0.* \[0, 1\)"),
    "overlap alpha < 0": (lambda: OverlapLocalSGD(alpha=-0.1), r"alpha is -0.1.* \[0, 1\)"),
    "overlap beta 1": (lambda: OverlapLocalSGD(beta=1.0), r"beta is 1.0.* \[0, 1\)"),
    "overlap beta < 0": (lambda: OverlapLocalSGD(beta=-0.1), r"beta is -0.1.* \[0, 1\)"),
    "overlap beta NaN": (lambda: OverlapLocalSGD(beta=NAN), "beta is nan"),
    "momentum 1": (lambda: BMUF(1.0), "momentum is 1.0"),
    "momentum > 1": (lambda: BMUF(1.5, nesterov=True), "momentum is 1.5"),
    "momentum < 0": (lambda: BMUF(-0.1), "momentum"),
    "SlowMo beta 1": (lambda: SlowMo(1.0), "momentum is 1.0"),
    "DiLoCo momentum 1": (lambda: DiLoCo(momentum=1.0), "momentum is 1.0"),
    "outer momentum 1": (
        lambda: BlockMomentum(partial(SGD, lr=1.0, momentum=1.0)), "momentum is 1.0"
    ),
    "heuristic Adam": (
        lambda: BlockMomentum(torch.optim.Adam, heuristic_momentum=True), "outer SGD"
    ),
    "LBFGS": (lambda: BlockMomentum(torch.optim.LBFGS), "needs a closure"),
    "not an optimizer": (lambda: BlockMomentum(lambda params: None), "torch.optim.Optimizer"),
    "c > 1": (lambda: LSGD(c=1.1), r"c is 1.1.*\[0, 1\]"),
    "c < 0": (lambda: LSGD(c=-0.1), r"c is -0.1.*\[0, 1\]"),
    "p > 1": (lambda: LSGD(p=1.1), r"p is 1.1.*\[0, 1\]"),
    "p < 0": (lambda: LSGD(p=-0.1), r"p is -0.1.*\[0, 1\]"),
    "c NaN": (lambda: LSGD(c=NAN), "c is nan"),
    "c = p = 0": (lambda: LSGD(c=0.0, p=0.0), "c and p are both 0"),
    "c_global > 1": (lambda: LSGD(group_size=2, global_every=2, c_global=2.0), "c_global is 2.0"),
    "both global 0": (
        lambda: LSGD(group_size=2, global_every=2, c_global=0.0, p_global=0.0),
        "c_global and p_global are both 0",
    ),
    "no global_every": (lambda: LSGD(group_size=2), "global_every"),
    "no group_size": (lambda: LSGD(global_every=2), "group_size"),
    "leaders' group_size 0": (lambda: LSGD(group_size=0, global_every=2), "group_size is 0"),
    "group_size 0": (lambda: HierarchicalAverage(0, 2), "group_size is 0"),
    "group_size 1.5": (lambda: HierarchicalAverage(1.5, 2), "group_size is 1.5"),
    "global_every 0": (lambda: HierarchicalAverage(2, 0), "global_every is 0"),
    "groups of two of one": (lambda: local(HierarchicalAverage(2, 2)), "does not divide the 1"),
}  # fmt: skip


def local(rule: Rule) -> LocalOptimizer:
    return LocalOptimizer(SGD([nn.Parameter(torch.zeros(2))], 0.1), Constant(1), rule)


# Outer settings, and the rate that is refused with them: 2 (1 + η), and with Nesterov momentum
# 2 (1 + η) / (1 + 2 η). With 1 - 1/m for η, the bound of all m together.
BOUNDS: dict[str, tuple[dict[str, Any], bool, float]] = {
    "plain": ({}, False, 2.0),
    "momentum": ({"momentum": 0.5}, False, 3.0),
    "Nesterov": ({"momentum": 0.5, "nesterov": True}, False, 1.5),
    "heuristic": ({"momentum": 0.5}, True, 2.0),
    "heuristic, Nesterov": ({"momentum": 0.5, "nesterov": True}, True, 4 / 3),
}


@pytest.mark.parametrize("what", BOUNDS)
def test_outer_rates_that_diverge_are_refused(what: str) -> None:
    settings, heuristic, bound = BOUNDS[what]
    BlockMomentum(partial(SGD, lr=0.999 * bound, **settings), heuristic_momentum=heuristic)
    for rate in (0.0, 1.001 * bound):
        with pytest.raises(ValueError, match=f"the outer learning rate is {rate}: with momentum"):
            BlockMomentum(partial(SGD, lr=rate, **settings), heuristic_momentum=heuristic)


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    make, reason = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=reason):
        make()


def test_not_refused() -> None:
    """The ends of the ranges that are allowed."""
    for rule in (
        EASGD(alpha=0.99, beta=1.0), EASGD(pull=1.0), OverlapLocalSGD(0.0, 0.0), BMUF(0.0),
        SlowMo(0.0), LSGD(c=1.0, p=0.0), LSGD(c=0.0, p=1.0), HierarchicalAverage(1, 1),
    ):  # fmt: skip
        local(rule)


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
        return local(BlockMomentum(outer))

    adam, sgd = optimizer(torch.optim.Adam), optimizer(partial(torch.optim.SGD, lr=0.5))
    with pytest.raises(ValueError, match="outer optimizer SGD, this rule Adam"):
        adam.load_state_dict(sgd.state_dict())


# One rule, one optimizer.


@every_rule
def test_a_rule_has_one_optimizer(name: str) -> None:
    """"A rule belongs to one optimizer": a second one would mix their anchors."""
    for index, inner in cases(name):
        optimizer = local_optimizer(name, index, inner, Model(), Constant(2))
        parameters = Model().parameters()
        with pytest.raises(ValueError, match="already belongs to an optimizer"):
            LocalOptimizer(torch.optim.SGD(parameters, 0.1), Constant(2), optimizer.sync)


def test_an_attached_rule_cannot_be_copied() -> None:
    for name in RULES:
        for index, inner in cases(name):
            rule = new_rule(name, index)
            assert repr(copy.deepcopy(rule)) == repr(rule)
            optimizer = local_optimizer(name, index, inner, Model(), Constant(2))
            with pytest.raises(TypeError, match=f"this {name} belongs to an optimizer"):
                copy.deepcopy(optimizer.sync)


# Leaders need losses.


def test_leaders_need_the_loss_of_every_step() -> None:
    """"The loss comes from ``step(closure)`` or `LocalOptimizer.record_loss`, called before the
    step"; where it does not, the first step says so."""

    def new() -> tuple[nn.Parameter, LocalOptimizer]:
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones_like(p)
        return p, LocalOptimizer(torch.optim.SGD([p], 0.1), Constant(2), LSGD())

    _, optimizer = new()
    with pytest.raises(RuntimeError, match=r"step 1 .*step\(closure\).*record_loss"):
        optimizer.step()
    p, optimizer = new()
    optimizer.step(lambda: (p * p).sum())
    with pytest.raises(RuntimeError, match=r"LSGD needs the training loss of every step.* step 2"):
        optimizer.step()
    for loss in (torch.tensor(1.0), 1.0, torch.tensor([1.0], requires_grad=True)):
        _, optimizer = new()
        for _ in range(4):
            optimizer.record_loss(loss)
            optimizer.step()
        assert optimizer.round == 2
