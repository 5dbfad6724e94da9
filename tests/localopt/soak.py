"""Many rounds of a tiny model on four ranks: nothing may grow.

    python -m tests.localopt.soak --rounds 10000

For each rule, with the watch on: resident memory, file descriptors, threads and process groups of
each rank after a tenth of the rounds and at the end.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from localopt import Constant, LocalSGD, Watch
from localopt.collective import Collective
from localopt.sync import RULES
from tests.support.patience import PATIENCE
from tests.support.ranks import run

RANKS = 4


@dataclass(frozen=True)
class Holdings:
    """What a process holds: bytes in memory, descriptors, threads, process groups, tensors."""

    memory: int
    descriptors: int
    threads: int
    groups: int
    tensors: int


def holdings() -> Holdings:
    """Those of this process."""
    gc.collect()
    process = psutil.Process()
    descriptors = []
    for _ in range(20):  # the watch opens a file for a moment, at each beat
        descriptors.append(process.num_fds())
        time.sleep(0.007)
    return Holdings(
        process.memory_info().rss,
        min(descriptors),
        process.num_threads(),
        len(distributed_c10d._world.pg_map),
        sum(type(thing) is torch.Tensor for thing in gc.get_objects()),
    )

# Of the rules that have no defaults for them.
SETTINGS = {
    "hierarchical": {"group_size": 2, "global_every": 3},
    "slowmo": {"beta": 0.5},
    "streaming": {"fragments": 2, "overlap": True},
}


def soak(rank: int, world_size: int, rule: str, rounds: int) -> tuple[Holdings, Holdings]:
    """What a rank holds after a fifth of ``rounds``, and after all."""
    torch.manual_seed(rank)
    model = nn.Linear(8, 8)
    optimizer = LocalSGD(
        model.parameters(), lr=1e-3, momentum=0.9, period=Constant(2),
        sync=RULES[rule](**SETTINGS.get(rule, {})), model=model, track_drift=True,
    )  # fmt: skip
    first = None
    for _ in range(2):
        holdings()  # counting takes memory too: malloc maps it first, then keeps it
    with Watch(Collective(), beat=0.2, signals=()) as watch:
        for step in range(2 * rounds):
            assert watch.begin(step)
            loss = model(torch.full((4, 8), 1.0 + rank)).square().mean()
            loss.backward()
            optimizer.record_loss(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            if step % 1000 == 999:
                with optimizer.consensus():
                    pass
            if step == 2 * rounds // 5:
                first = holdings()
        optimizer.finish()
        last = holdings()
    dist.barrier()
    assert optimizer.round >= rounds and first is not None
    return first, last


def check(rule: str, rounds: int) -> tuple[Holdings, Holdings]:
    """Raise AssertionError if a rank holds more at the end; return what rank 0 holds."""
    held = run(soak, RANKS, rule, rounds, timeout=PATIENCE + rounds / 20)
    for rank, (first, last) in enumerate(held):
        grown = last.memory - first.memory
        assert grown < 2 * 2**20, f"{rule}: rank {rank} has grown by {grown} bytes"
        for name in ("descriptors", "threads", "groups", "tensors"):
            before, after = getattr(first, name), getattr(last, name)
            spare = 2 if name == "tensors" else 0
            assert after <= before + spare, f"{rule}: rank {rank}: {name} {before}, then {after}"
    return held[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10_000, help="for each rule (default 10,000)")
    parser.add_argument("--rules", nargs="+", default=sorted(RULES), choices=sorted(RULES))
    settings = parser.parse_args(arguments)
    print(f"{settings.rounds} rounds, {RANKS} ranks; rank 0 after a fifth of them, and at the end")
    print("| rule | MiB | descriptors | threads | process groups | tensors |")
    print("|---|---|---|---|---|---|")
    for rule in settings.rules:
        first, last = check(rule, settings.rounds)
        names = ("descriptors", "threads", "groups", "tensors")
        counts = [f"{getattr(first, name)}, {getattr(last, name)}" for name in names]
        memory = f"{first.memory / 2**20:.1f}, {last.memory / 2**20:.1f}"
        print(f"| {rule} | {memory} | {' | '.join(counts)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
