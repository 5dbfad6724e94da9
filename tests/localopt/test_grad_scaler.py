"""GradScaler with Accelerate's wrapper: a step with infinities is seen as skipped, and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from localopt import EASGD, Average, Constant, DiLoCo, LocalOptimizer, Rule, Streaming
from tests.support.contract import equal_on_all_ranks
from tests.support.ranks import run
from tests.support.small_network import network, vector


class Accelerated:
    """The part of accelerate.optimizer.AcceleratedOptimizer (1.15) that steps with a scaler."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.step_was_skipped = self._accelerate_step_called = False
        self._original, self._patched = optimizer.step, patched(self, optimizer.step)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step = self._patched
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.step_was_skipped = not self._accelerate_step_called
        self.optimizer.step = self._original
        self._accelerate_step_called = False


def patched(accelerated: Accelerated, method: Callable[..., Any]) -> Callable[..., Any]:
    def step(*args: Any, **kwargs: Any) -> Any:
        accelerated._accelerate_step_called = True
        return method(*args, **kwargs)

    return step


class Plain(torch.optim.SGD):
    """Knows nothing of scales, as most optimizers."""


INNERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=0.05, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05),
    "plain": lambda params: Plain(params, lr=0.05),
}
BAD = (2, 3, 5, 9)
STEPS = 12


def steps(
    model: nn.Module, wrapped: Accelerated, bad: tuple[int, ...], *, unscale: bool, seed: int = 0
) -> list[bool]:
    """Train, with infinities at some steps; which were said to be skipped."""
    skipped = []
    for step in range(STEPS):
        wrapped.optimizer.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(100 * seed + step))
        loss = model(x.to(model[0].weight.device)).square().mean()
        wrapped.scaler.scale(loss).backward()
        if step in bad:
            model[3].weight.grad[0, step % 4] = float("inf") if step % 2 else float("nan")
        if unscale:
            wrapped.scaler.unscale_(wrapped.optimizer)
        wrapped.step()
        skipped.append(wrapped.step_was_skipped)
    return skipped


def accelerated(optimizer: torch.optim.Optimizer, device: str = "cpu") -> Accelerated:
    return Accelerated(optimizer, torch.amp.GradScaler(device, init_scale=256.0, growth_interval=3))


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduler first"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
@pytest.mark.parametrize("inner", INNERS)
def test_skipped_steps_are_seen(inner: str, unscale: bool, scheduled: bool) -> None:
    """The weights, the scales and what is said to be skipped are those of the bare optimizer; and
    rounds go on, so that replicas stay in step."""
    as_the_bare_optimizer(inner, unscale, scheduled)


def as_the_bare_optimizer(inner: str, unscale: bool, scheduled: bool, device: str = "cpu") -> None:
    said, states = [], []
    for local in (True, False):
        model = network().to(device)
        optimizer = INNERS[inner](model.parameters())
        if local:
            optimizer = LocalOptimizer(optimizer, Constant(4))
        if scheduled:  # it puts a function in place of `step` as well
            lr_scheduler.StepLR(optimizer, 100)
        wrapped = accelerated(optimizer, device)
        said.append(steps(model, wrapped, BAD, unscale=unscale))
        if device != "cpu":  # its gradient is rounding, for a BatchNorm follows: Adam blows that up
            model[0].bias.data.zero_()
        states.append((vector(model), wrapped.scaler.get_scale()))
        if local:
            assert optimizer.round == STEPS // 4 and optimizer.synced, "a skipped step counts"
            assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
            assert not hasattr(optimizer.inner, "found_inf")
    assert [step for step, skipped in enumerate(said[0]) if skipped] == list(BAD)
    if "fused" not in inner:  # of which Accelerate never sees it
        assert said[0] == said[1], "as of the bare optimizer"
    assert states[0][1] == states[1][1]
    tolerance = {"rtol": 1e-6} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-6}
    assert torch.allclose(states[0][0], states[1][0], **tolerance)


def test_without_infinities_nothing_is_skipped() -> None:
    model = network()
    wrapped = accelerated(LocalOptimizer(INNERS["adamw"](model.parameters()), Constant(4)))
    assert steps(model, wrapped, (), unscale=False) == [False] * STEPS
    for step in (wrapped.optimizer.step, wrapped.step):  # by itself, and wrapped once more
        wrapped.optimizer.zero_grad()
        wrapped.scaler.scale(model(torch.ones(6, 4)).sum()).backward()
        step()
    assert wrapped.optimizer._replica.round.step == STEPS + 2


def test_all_skipped() -> None:
    """Also where no step of a round was made, weights and rounds are as they should be."""
    model = network()
    optimizer = LocalOptimizer(INNERS["adamw"](model.parameters()), Constant(4))
    said = steps(model, accelerated(optimizer), tuple(range(STEPS)), unscale=False)
    assert said == [True] * STEPS and optimizer.round == STEPS // 4
    assert torch.equal(vector(model), vector(network()))


RULES: dict[str, Callable[[], Rule]] = {
    "average": Average,
    "moments": lambda: Average(state_fields=("exp_avg",)),
    "diloco": DiLoCo,
    "easgd": EASGD,
    "streaming": lambda: Streaming(2),
}


def on_a_rank(rank: int, m: int, device: str = "cpu") -> list[tuple[list[bool], Tensor]]:
    """Infinities at other steps on each rank; at step 0 on rank 1, whose state comes later."""
    found = []
    for rule in RULES.values():
        model = network().to(device)
        inner = INNERS["adamw"](model.parameters())
        optimizer = LocalOptimizer(inner, Constant(3), rule(), model=model)
        bad = ((2, 5, 6), (0, 1, 2, 8))[rank]
        said = steps(model, accelerated(optimizer, device), bad, unscale=False, seed=rank)
        assert [step for step, skipped in enumerate(said) if skipped] == list(bad)
        assert optimizer.round == STEPS // 3 and optimizer.synced
        optimizer.finish()
        assert equal_on_all_ranks(vector(model)) and bool(vector(model).isfinite().all())
        found.append((said, vector(model).cpu()))
    return found


@pytest.mark.slow
def test_replicas_that_skip_apart_stay_in_step() -> None:
    assert_alike(run(on_a_rank, 2))


def assert_alike(ranks: list[list[tuple[list[bool], Tensor]]]) -> None:
    zero, one = ranks
    assert len(zero) == len(RULES)
    for (_, a), (_, b) in zip(zero, one, strict=True):
        assert torch.equal(a, b)
