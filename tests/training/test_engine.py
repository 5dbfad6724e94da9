"""Engine and evaluation on real processes: what travels, and what is counted."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.profiler import profile

from localopt.collective import Collective
from tests.support.ranks import run
from training import optimizers
from training.evaluate import estimate_batch_norm, evaluate
from training.lr import Schedule
from training.settings import load

pytestmark = pytest.mark.slow

STEPS, CLASSES, SIDE = 6, 4, 8


def _batches(rank: int, world_size: int, accumulation: int = 1) -> list[list[tuple]]:
    """Steps of micro-batches: this rank's part of joint batches of 8."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(STEPS):
        images = torch.randn(8, 3, SIDE, SIDE, generator=generator)
        labels = torch.randint(CLASSES, (8,), generator=generator)
        mine = zip(images.chunk(world_size)[rank].chunk(accumulation),
                   labels.chunk(world_size)[rank].chunk(accumulation), strict=True)  # fmt: skip
        steps.append(list(mine))
    return steps


def _model(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 6 * 6, CLASSES))


def _engine(world_size: int, model: nn.Module, *flags: str) -> tuple[Any, Any]:
    from training.deepspeed_engine import engine_of

    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as a launcher would
    config = load([
        "--total-batch-size", "8", "--epochs", "1", "--warmup-epochs", "0", "--scheduler", "const",
        "--max-lr", "0.05", "--wd", "0", "--label-smoothing", "0",
        "--physical-batch-size", str(8 // world_size), *flags,
    ])  # fmt: skip
    optimizer = optimizers.build(config, model, Schedule.of(config, STEPS))
    return engine_of(config, model, optimizer, world_size), optimizer


def _gloo_events(step: Any) -> list[str]:
    """Names of the collectives that ``step()`` makes, as the backend itself records them."""
    with profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        step()
    return [e.key for e in recorded.events() if e.key.startswith("gloo:")]


def _count(rank: int, world_size: int, *flags: str) -> list[list[str]]:
    engine, _ = _engine(world_size, _model(), *flags)
    accumulation = engine.accumulation
    steps = _batches(rank, world_size, accumulation)
    return [_gloo_events(lambda s=s: engine.step(s)) for s in steps]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--clip-norm", "0.1", "--physical-batch-size", "2"),
        ("--precision", "bf16"),
        ("--optimizer", "localsgd"),
    ],
    ids=["plain", "clipping and accumulation", "bf16", "sgd"],
)
def test_nothing_travels_inside_a_round_and_headers_and_one_sum_at_its_end(flags) -> None:
    """DeepSpeed adds none: no gradient, no norm, no overflow flag."""
    base = ("--optimizer", "localadamw", "--period", "constant", "--h-base", "3")
    for events in run(_count, 2, *base, *flags):
        assert [len(names) for names in events] == [0, 0, 3] * 2
        assert sorted(events[2][:2]) == ["gloo:recv", "gloo:send"], "headers"
        assert events[2][2] == "gloo:all_reduce", "parameters"


def test_the_counting_sees_the_collectives_of_data_parallel_training() -> None:
    for events in run(_count, 2, "--optimizer", "adamw"):
        assert all(names for names in events)


def _device_synchronisations(rank: int, world_size: int) -> int:
    from deepspeed.accelerator import get_accelerator

    engine, _ = _engine(world_size, _model(), "--optimizer", "localadamw", "--h-base", "100")
    calls: list[None] = []
    type(get_accelerator()).synchronize = lambda *_: calls.append(None)
    for step in _batches(rank, world_size):
        engine.step(step)
    return len(calls)


def test_a_step_does_not_wait_for_the_device() -> None:
    assert run(_device_synchronisations, 2) == [0, 0]


def _train(rank: int, world_size: int, *flags: str) -> dict[str, torch.Tensor]:
    model = _model()
    engine, optimizer = _engine(world_size, model, *flags)
    for step in _batches(rank, world_size, engine.accumulation):
        engine.step(step)
    optimizer.finish()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _single(accumulation: int = 1, clip: float = 0.0) -> dict[str, torch.Tensor]:
    """One process on the joint batches, in float64, with torch alone."""
    model = _model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in _batches(0, 1, accumulation):
        optimizer.zero_grad()
        for images, labels in step:
            (functional.cross_entropy(model(images.double()), labels) / len(step)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: p.detach().float() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer", "localsgd", "--period", "constant", "--h-base", "1"),
        ("--optimizer", "sgd"),
        ("--optimizer", "sgd", "--physical-batch-size", "1"),
    ],
    ids=["local, H=1", "data-parallel", "data-parallel, accumulated"],
)
def test_h_1_and_data_parallel_are_one_process_on_the_joint_batch(world_size, flags) -> None:
    """With SGD and momentum, H = 1 is data-parallel training, to float32 rounding."""
    expected = _single()
    for parameters in run(_train, world_size, *flags):
        for name, p in parameters.items():
            torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-6)


def test_data_parallel_clipping_is_that_of_the_averaged_gradient() -> None:
    expected = _single(clip=0.1)
    for parameters in run(_train, 2, "--optimizer", "sgd", "--clip-norm", "0.1"):
        for name, p in parameters.items():
            torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-6)


def _measured(rank: int, world_size: int, *flags: str) -> list[tuple[float, ...]]:
    engine, _ = _engine(world_size, _model(), *flags)
    told = [engine.step(s, norms=True) for s in _batches(rank, world_size, engine.accumulation)]
    return [(float(t.loss), int(t.correct), float(t.grad_norm), float(t.param_norm)) for t in told]


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_step_measures_loss_hits_and_norms(clip: float) -> None:
    """The gradient's norm before clipping, the parameters' before the step: torch's, in float64."""
    model, expected = _model().double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in _batches(0, 1, 2):
        optimizer.zero_grad()
        losses, hits = [], 0
        for images, labels in step:
            logits = model(images.double())
            losses.append(functional.cross_entropy(logits, labels))
            hits += int((logits.argmax(1) == labels).sum())
        (sum(losses) / 2).backward()
        norms = [
            math.sqrt(sum(float(x.square().sum()) for x in some))
            for some in zip(*((p.grad, p.detach()) for p in model.parameters()), strict=True)
        ]
        expected.append((float(sum(losses)) / 2, hits, *norms))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    flags = ("--optimizer", "sgd", "--clip-norm", str(clip), "--physical-batch-size", "4")
    (measured,) = run(_measured, 1, *flags)
    for one, other in zip(measured, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def _recorded(rank: int, world_size: int) -> list[tuple[float, float]]:
    flags = ("--optimizer", "localsgd", "--track-replicas", "--physical-batch-size", "2")
    engine, optimizer = _engine(world_size, _model(), "--period", "constant", *flags)
    losses: list[float] = []
    optimizer.record_loss = lambda loss: losses.append(float(loss))
    told = [float(engine.step(s).loss) for s in _batches(rank, world_size, engine.accumulation)]
    return list(zip(losses, told, strict=True))


def test_a_replica_records_the_mean_loss_of_its_micro_batches() -> None:
    """What leaders are elected by, and what is shown of the replicas: not one micro-batch's."""
    for steps in run(_recorded, 2):
        assert len(steps) == STEPS
        assert all(recorded == pytest.approx(mean, rel=1e-6) for recorded, mean in steps)


def _data_parallel_cost(rank: int, world_size: int) -> tuple[int, int, float, int]:
    model = _model()
    engine, optimizer = _engine(world_size, model, "--optimizer", "sgd")
    for step in _batches(rank, world_size):
        engine.step(step)
    traffic = optimizer.traffic
    return traffic.syncs, traffic.bytes, traffic.exposed, sum(p.nbytes for p in model.parameters())


def test_data_parallel_training_counts_a_gradient_each_step() -> None:
    for syncs, sent, exposed, payload in run(_data_parallel_cost, 2):
        assert (syncs, sent) == (STEPS, STEPS * payload)  # 2 (m - 1) / m = 1 for two
        assert exposed > 0


def _shares(rank: int, world_size: int, count: int) -> tuple:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    mine = range(rank, count, world_size)
    batches = [(images[[i]], labels[[i]]) for i in mine]
    model = _model(norm=True)
    no_cast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    collective = Collective()
    evaluation = evaluate(model, batches, collective, no_cast)
    trained = model.training
    micro_batches = [(images[2 * i : 2 * i + 2], None) for i in range(rank, count // 2, world_size)]
    estimate_batch_norm(model, micro_batches, collective, no_cast)
    norm = model[1]
    return (
        vars(evaluation),
        trained,
        norm.running_mean.clone(),
        norm.running_var.clone(),
        norm.momentum,
    )


@pytest.mark.parametrize("count", [2, 7, 11])
def test_evaluation_counts_every_image_once_on_any_number_of_ranks(count: int) -> None:
    """And BatchNorm's statistics are the means over all micro-batches, whoever saw them."""
    ((alone, trained, mean, var, momentum),) = run(_shares, 1, count)
    assert alone["images"] == count
    assert trained
    assert momentum == 0.1
    for world_size in (2, 3, 4):
        for told, _, other_mean, other_var, _ in run(_shares, world_size, count):
            assert told["images"] == count
            assert (told["top1"], told["top5"]) == (alone["top1"], alone["top5"])
            assert told["loss"] == pytest.approx(alone["loss"], rel=1e-6)
            torch.testing.assert_close(other_mean, mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(other_var, var, rtol=1e-5, atol=1e-6)


def test_top_1_and_loss_are_torchs_own() -> None:
    ((told, *_),) = run(_shares, 1, 11)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(11, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(CLASSES, (11,), generator=generator)
    with torch.no_grad():
        logits = _model(norm=True).eval()(images)
    assert told["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert told["top5"] == 1.0  # of four classes
    assert told["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)


def _nothing_to_estimate(rank: int, world_size: int) -> str:
    model = copy.deepcopy(_model(norm=True))
    try:
        estimate_batch_norm(model, [], Collective(), lambda: torch.autocast("cpu", enabled=False))
    except ValueError as error:
        return str(error)
    return "no error"


def test_statistics_of_zero_batches_are_refused() -> None:
    assert all("zero batches" in told for told in run(_nothing_to_estimate, 2))


def _backend(rank: int, world_size: int) -> str:
    return dist.get_backend()


def test_ranks_talk_through_gloo() -> None:
    assert run(_backend, 2) == ["gloo", "gloo"]
