"""GradScaler on a GPU: infinities on one rank skip its step alone, and replicas stay in step."""

from __future__ import annotations

import itertools

import pytest
import torch

from localopt import Average, Constant, LocalOptimizer
from tests.gpu.links import GLOO, GPU_LINKS, device_of
from tests.localopt.test_grad_scaler import (
    INNERS,
    as_the_bare_optimizer,
    assert_alike,
    on_a_rank,
)
from tests.support.ranks import run
from tests.support.small_network import network, vector

pytestmark = pytest.mark.slow


def every_inner(rank: int, m: int, device: str) -> int:
    for inner, *flags in itertools.product(INNERS, (False, True), (False, True)):
        as_the_bare_optimizer(inner, *flags, device)
    return len(INNERS)


@pytest.mark.parametrize("link", [GLOO])
def test_skipped_steps_are_seen(link: str) -> None:
    """As on CPUs; fused optimizers skip on the device."""
    assert run(every_inner, 1, device_of(link), on=link) == [len(INNERS)]


@pytest.mark.parametrize("link", GPU_LINKS)
def test_replicas_that_skip_apart_stay_in_step(link: str) -> None:
    """As on CPUs."""
    assert_alike(run(on_a_rank, 2, device_of(link), on=link))


def in_float16(rank: int, m: int, device: str) -> tuple[list[bool], float, torch.Tensor]:
    """Rank 1's gradients overflow at step 4; which steps were skipped, the scale, the weights."""
    model = network().to(device)
    optimizer = LocalOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), Constant(3), Average(),
        model=model,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device, init_scale=256.0, growth_interval=100)
    skipped = []
    for step in range(9):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(100 * rank + step))
        optimizer.zero_grad()
        before = vector(model).clone()
        with torch.autocast(device, torch.float16):
            loss = model(x.to(device)).float().square().mean()
        if (rank, step) == (1, 4):
            loss = loss * 1e6  # float16 ends at 65504
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # At a round's end the mean moves the weights, too.
        skipped.append(not optimizer.synced and torch.equal(vector(model), before))
    assert optimizer.round == 3 and optimizer.synced
    return skipped, scaler.get_scale(), vector(model).cpu()


@pytest.mark.parametrize("link", ["cpu", *GPU_LINKS])
def test_an_overflow_on_one_rank(link: str) -> None:
    """Of float16's own: that rank skips its step and halves its scale, and the other does not."""
    (none, scale, zero), (one, halved, other) = run(in_float16, 2, device_of(link), on=link)
    assert (scale, halved) == (256.0, 128.0)
    assert not any(none) and [step for step, skipped in enumerate(one) if skipped] == [4]
    assert torch.equal(zero, other) and bool(zero.isfinite().all())
