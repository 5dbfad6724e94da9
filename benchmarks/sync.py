"""One synchronisation of a model's parameters, beside what else would make it.

    python -m benchmarks.sync                       # ViT-B/16, two ranks on this machine
    python -m benchmarks.sync --model resnet152 --ranks 4
    python -m benchmarks.sync --short

Every way is used in turn, in each repeat; a figure is the slowest rank's. A block is the median
over its repeats of the ratio to a bare ``dist.all_reduce`` of one tensor of that size in the same
repeat; printed are the median over the blocks, and the least and the greatest. Peak is what rank 0
held beyond what it held before. Peers are left out where they are not installed:
``pip install -e '.[bench]'``.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.utils import average_parameters

from benchmarks import _peers
from benchmarks._link import Here, run_on
from localopt import Average, Constant, LocalSGD
from training import models

BARE, AGAIN = "bare all_reduce of one tensor", "the same again"


@dataclass(frozen=True)
class Way:
    """What makes a synchronisation, and the tensors that it synchronises."""

    run: Callable[[], object]
    tensors: Sequence[torch.Tensor]

    def touch(self) -> None:
        """Write to the tensors, as the optimizer's step before a synchronisation does."""
        for tensor in self.tensors:
            tensor.detach().fill_(1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync", description=__doc__)
    parser.add_argument("--model", default="simplevit-b16", choices=sorted(models.MODELS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ways", nargs="+", metavar="WORD", help="those with one of these words")
    parser.add_argument("--short", action="store_true", help="a small model, two blocks of three")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.short:
        options.model, options.blocks, options.repeats = "resnet18", 2, 3
    if options.worker:
        worker(options)
        return
    flags = ["--worker", "--model", options.model]
    flags += ["--blocks", str(options.blocks), "--repeats", str(options.repeats)]
    flags += ["--ways", *options.ways] if options.ways else []
    told = run_on([Here()] * options.ranks, "benchmarks.sync", *flags, timeout=3600)
    print(report(json.loads(told.splitlines()[-1]), options))


def worker(options: argparse.Namespace) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    model = network(options.model)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    ways = dict.fromkeys((BARE, AGAIN), Way(lambda: dist.all_reduce(flat), [flat]))
    ways |= ours(options.model)
    ways |= peers(options.model)
    wanted = (BARE, AGAIN, *(options.ways or ways))
    ways = {name: way for name, way in ways.items() if any(word in name for word in wanted)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    growth: dict[str, float] = {}
    for name, way in ways.items():  # the first time is for warming up
        way.touch()
        way.run()
        growth[name] = peak(way)
    for repeat in range(options.blocks * options.repeats):
        order = list(ways)
        turn = repeat % len(order)
        for name in order[turn:] + order[:turn]:
            seconds[name].append(timed(ways[name]))
        if dist.get_rank() == 0:
            done = f"\r{repeat + 1}/{options.blocks * options.repeats} "
            print(done, end="", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        told = {"seconds": seconds, "growth": growth, "parameters": flat.numel(),
                "tensors": len(list(model.parameters()))}  # fmt: skip
        print("\n" + json.dumps(told), flush=True)
    dist.barrier()
    os._exit(0)  # servers of peers end without a word


def timed(way: Way) -> float:
    """Seconds of the slowest rank."""
    way.touch()
    dist.barrier()
    started = time.perf_counter()
    way.run()
    took = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def peak(way: Way) -> float:
    """MiB that this process held at most beyond what it held before."""
    trim()
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    way.run()
    return (held("VmHWM") - before) / 1024


def trim() -> None:
    """Give back what has been freed: it would hide what is taken next."""
    ctypes.CDLL(None).malloc_trim(0)


def held(field: str) -> int:
    """KiB that this process holds, as the kernel's status file names it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def network(name: str) -> nn.Module:
    return models.build(name, classes=1000, resolution=224, seed=0)


def ours(name: str) -> dict[str, Way]:
    def way(**options: object) -> Way:
        parameters = list(network(name).parameters())
        optimizer = LocalSGD(parameters, period=Constant(1), **options)
        optimizer.average()  # rules with an anchor begin where they were built
        return Way(optimizer.average, parameters)

    return {
        "localopt, Average, check_finite=False": way(check_finite=False),
        "localopt, Average, check_finite=True": way(),
        "localopt, Average, bf16": way(sync=Average(compress="bf16")),
        "localopt, Average, int8": way(sync=Average(compress="int8")),
    }


def peers(name: str) -> dict[str, Way]:
    """What else users would take."""
    group, m = dist.group.WORLD, dist.get_world_size()

    def each() -> None:
        for p in apart.parameters():
            dist.all_reduce(p.data)
            p.data.div_(m)

    def copied() -> None:
        parameters = [p.data for p in apart.parameters()]
        flat = torch.cat([p.reshape(-1) for p in parameters])
        dist.all_reduce(flat)
        flat.div_(m)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))

    apart, averaged = network(name), network(name)
    found: dict[str, Way] = {
        "one all_reduce per parameter": Way(each, list(apart.parameters())),
        "flatten, all_reduce, copy back": Way(copied, list(apart.parameters())),
        "torch average_parameters": Way(
            lambda: average_parameters(averaged.parameters(), group), list(averaged.parameters())
        ),
    }
    if importlib.util.find_spec("accelerate"):
        found["accelerate LocalSGD"] = with_accelerate(network(name))
    if importlib.util.find_spec("torchft"):
        found["torchft LocalSGD"] = with_torchft(network(name))
    return found


def with_accelerate(model: nn.Module) -> Way:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD as AcceleratesLocalSGD

    accelerator = Accelerator(cpu=True)
    local = AcceleratesLocalSGD(accelerator, accelerator.prepare(model), local_sgd_steps=1)
    return Way(local.step, list(model.parameters()))


def with_torchft(model: nn.Module) -> Way:
    from torchft.local_sgd import LocalSGD as TorchftLocalSGD

    optimizer = torch.optim.SGD(model.parameters())
    local = TorchftLocalSGD(_peers.torchft_manager(), model, optimizer, sync_every=1)
    return Way(local.sync, list(model.parameters()))


def report(told: dict, options: argparse.Namespace) -> str:
    seconds, blocks = told["seconds"], range(options.blocks)
    lines = [
        f"{options.model}: {told['parameters'] / 1e6:.1f} M parameters in {told['tensors']} "
        f"tensors, {options.ranks} ranks, gloo; medians of {options.blocks} medians of "
        f"{options.repeats}",
        "",
        "| way | seconds | / bare (least to greatest block) | peak, MiB |",
        "|---|---|---|---|",
    ]
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(mine, seconds[BARE], strict=True)]
        medians = [
            statistics.median(ratios[i * options.repeats : (i + 1) * options.repeats])
            for i in blocks
        ]
        lines.append(
            f"| {name} | {statistics.median(mine):.3f} | {statistics.median(medians):.2f} "
            f"({min(medians):.2f} to {max(medians):.2f}) | {told['growth'][name]:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
