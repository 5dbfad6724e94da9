"""Seconds that training takes over a slow link, beside what else users would take.

    python -m benchmarks.end_to_end                       # 100 Mbit/s; root, for the namespaces
    python -m benchmarks.end_to_end --megabits 1000
    python -m benchmarks.end_to_end --short

Two hosts, one replica each, 21 MB of parameters; every way makes the same number of steps of the
same compute, in turn, in each repeat. The floor is the same steps without any communication. What a
way could reach is the floor and the bytes that it sends, at the goodput of a bare
``dist.all_reduce`` of the same parameters over this link. Bytes are those that the link's interface
counts. The overlapped rules leave their last collective in flight: ``finish`` is not in their
seconds, and is told apart. Peers are left out where they are not installed:
``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from benchmarks import _peers
from benchmarks._link import capped_link, run_on, wire_bytes
from benchmarks.overlap import calibrated_batch
from localopt import (
    EASGD,
    QSR,
    Average,
    CoCoDSGD,
    Constant,
    LocalSGD,
    OverlapLocalSGD,
    Rule,
    Streaming,
)

WIDTH, LAYERS = 1024, 5
PEAK_LR = 0.05
FLOOR, QSR_ = "no communication (the floor)", "localopt, QSR"


@dataclass
class Trained:
    """What one way did."""

    seconds: float
    finish: float
    wire: int
    syncs: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabits", type=float, default=100.0)
    parser.add_argument("--h", type=int, default=6)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--step-seconds", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ways", nargs="+", metavar="WORD", help="those with one of these words")
    parser.add_argument("--short", action="store_true", help="one repeat of 12 short steps")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.repeats, options.steps, options.step_seconds = 1, 12, 0.05
        options.megabits = 1000.0
    if options.worker:
        worker(options)
        return
    flags = ["--worker"]
    for name in ("megabits", "h", "steps", "step_seconds", "repeats"):
        flags += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    flags += ["--ways", *options.ways] if options.ways else []
    with capped_link(options.megabits) as hosts:
        told = run_on(hosts, "benchmarks.end_to_end", *flags, timeout=7200)
    print(report(json.loads(told.splitlines()[-1]), options))


def worker(options: argparse.Namespace) -> None:
    """One rank: every way in turn, several times over."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batch = calibrated_batch(network(), WIDTH, options.step_seconds)
    ways = all_ways(options)
    wanted = (FLOOR, *(options.ways or ways))
    ways = {name: way for name, way in ways.items() if any(word in name for word in wanted)}
    seen: dict[str, list[dict]] = {name: [] for name in ways}
    goodput = []
    for repeat in range(options.repeats):
        goodput.append(bare_goodput())
        order = list(ways)
        turn = repeat % len(order)
        for name in order[turn:] + order[:turn]:
            seen[name].append(vars(measure(ways[name], batch, options)))
    if dist.get_rank() == 0:
        print(json.dumps({"seen": seen, "goodput": goodput, "batch": batch}), flush=True)
    dist.barrier()
    os._exit(0)  # servers of peers end without a word


def network() -> nn.Sequential:
    """5.2 million parameters, 21 MB."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers)


def bare_goodput() -> float:
    """Bytes that this rank sends per second in an all_reduce of the parameters."""
    flat = torch.zeros(sum(p.numel() for p in network().parameters()))
    rates = []
    for _ in range(2):
        dist.barrier()
        before, started = wire_bytes(), time.perf_counter()
        dist.all_reduce(flat)
        rates.append((wire_bytes() - before) / (time.perf_counter() - started))
    return rates[-1]


# A way: what makes a step of a model's optimizer, and the end of training; from a model.
Maker = Callable[[nn.Module], tuple[nn.Module, Callable[[], Any], Callable[[], Any], Any]]


def all_ways(options: argparse.Namespace) -> dict[str, Maker]:
    h, steps = options.h, options.steps

    def sgd(model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr=PEAK_LR)

    def alone(model: nn.Module) -> Any:
        return model, sgd(model).step, lambda: None, None

    def ddp(model: nn.Module) -> Any:
        return DistributedDataParallel(model), sgd(model).step, lambda: None, None

    def post_local(model: nn.Module) -> Any:
        averager = PeriodicModelAverager(period=h, warmup_steps=0)
        averager.step = h - 1  # or its first average would come after the first step
        return model, PostLocalSGDOptimizer(sgd(model), averager).step, lambda: None, None

    def local(period: Any, rule: Callable[[], Rule] = Average) -> Maker:
        def make(model: nn.Module) -> Any:
            optimizer = LocalSGD(model.parameters(), lr=PEAK_LR, period=period, sync=rule())
            return model, optimizer.step, optimizer.finish, optimizer

        return make

    ways: dict[str, Maker] = {FLOOR: alone, "DDP": ddp, "DeepSpeed, stage 0": _peers.deepspeed}
    ways["torch PostLocalSGDOptimizer"] = post_local
    if importlib.util.find_spec("torchft"):
        ways["torchft LocalSGD"] = lambda model: _peers.torchft(model, sgd(model), h)
    # The first round has H, and the cosine lets the last ones grow.
    qsr = QSR(alpha=PEAK_LR * h**0.5, base=h, total_steps=steps)
    return ways | {
        "localopt, Average": local(Constant(h)),
        QSR_: local(qsr),
        "localopt, Average, bf16": local(Constant(h), lambda: Average(compress="bf16")),
        "localopt, Average, int8": local(Constant(h), lambda: Average(compress="int8")),
        "localopt, OverlapLocalSGD": local(Constant(h), OverlapLocalSGD),
        "localopt, CoCoDSGD": local(Constant(h), CoCoDSGD),
        "localopt, EASGD": local(Constant(h), EASGD),
        "localopt, Streaming": local(Constant(h), lambda: Streaming(3, overlap=True)),
    }


def measure(make: Maker, batch: int, options: argparse.Namespace) -> Trained:
    """Train from the start, on a cosine; the slower rank's seconds."""
    model, step, finish, optimizer = make(network())
    inputs = torch.randn(batch, WIDTH)
    with forward_and_backward(model, step) as (backward, update):
        backward(inputs)  # the first time is for warming up, without an update
        for p in model.parameters():
            p.grad = None
        dist.barrier()
        before, started = wire_bytes(), time.perf_counter()
        for i in range(options.steps):
            set_lr(step, PEAK_LR * 0.5 * (1 + math.cos(math.pi * i / options.steps)))
            backward(inputs)
            update()
            for p in model.parameters():
                p.grad = None
        seconds = time.perf_counter() - started
        wire = wire_bytes() - before
        started = time.perf_counter()
        finish()
        finished = time.perf_counter() - started
    slowest = torch.tensor([seconds, finished])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    syncs = getattr(getattr(optimizer, "traffic", None), "syncs", float("nan"))
    return Trained(float(slowest[0]), float(slowest[1]), wire, syncs)


@contextmanager
def forward_and_backward(model: nn.Module, step: Callable[[], Any]) -> Any:
    """How to make gradients, and an update: DeepSpeed's engine has calls of its own."""
    if hasattr(model, "allreduce_gradients"):
        yield lambda x: model.backward(model(x).square().mean()), step
        model.destroy()
    else:
        yield lambda x: model(x).square().mean().backward(), step


def set_lr(step: Callable[[], Any], lr: float) -> None:
    for group in getattr(getattr(step, "__self__", None), "param_groups", ()):
        group["lr"] = lr


def report(told: dict, options: argparse.Namespace) -> str:
    seen, goodput = told["seen"], statistics.median(told["goodput"])
    floor = [row["seconds"] for row in seen[FLOOR]]
    lines = [
        f"{options.megabits:g} Mbit/s, two hosts, {options.steps} steps, H = {options.h}, "
        f"{WIDTH * (WIDTH + 1) * LAYERS * 4 / 1e6:.0f} MB of parameters, bare all_reduce "
        f"{goodput * 8 / 1e6:.1f} Mbit/s; medians of {options.repeats}",
        "",
        "| way | seconds | / floor | MB on the wire | / (floor + MB at goodput) | finish, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in seen.items():
        seconds = statistics.median(row["seconds"] for row in rows)
        ratio = statistics.median(r["seconds"] / f for r, f in zip(rows, floor, strict=True))
        wire = statistics.median(row["wire"] for row in rows)
        reach = statistics.median(
            r["seconds"] / (f + r["wire"] / g)
            for r, f, g in zip(rows, floor, told["goodput"], strict=True)
        )
        finish = statistics.median(row["finish"] for row in rows)
        lines.append(
            f"| {name} | {seconds:.2f} | {ratio:.3f} | {wire / 1e6:.1f} | {reach:.3f} | "
            f"{finish:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
