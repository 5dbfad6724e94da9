"""What a local step costs beyond the inner optimizer's.

    python -m benchmarks.step
    python -m benchmarks.step --short

Microseconds that ``LocalOptimizer.step()`` adds to ``inner.step()``, in the middle of a round, on
one process. The two are called in turn, and a figure is the median over blocks of the difference of
the medians. No parameter has a gradient, so that what is added can be seen beside it; it does not
depend on that. A bare wrapper is a torch optimizer whose ``step`` calls the inner one's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from localopt import Constant, LocalOptimizer
from training import models

NEVER = Constant(10**9)


class Trivial(Optimizer):
    """What any torch optimizer around another adds."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)

    def step(self, closure: Callable | None = None) -> object:
        return self.inner.step(closure)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def vit_small() -> nn.Module:
    return models.build("simplevit-s16", classes=1000, resolution=224, seed=0)


INNERS: dict[str, Callable] = {
    "SGD, momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW, foreach": lambda p: AdamW(p, lr=1e-3, foreach=True),
    "AdamW, fused": lambda p: AdamW(p, lr=1e-3, fused=True),
}


def added(bare: Optimizer, wrapped: Optimizer, blocks: int, calls: int) -> tuple[float, float]:
    """Medians over blocks: µs of the bare step, and µs that the other takes more."""
    steps, more = [], []
    for block in range(blocks + 1):
        taken: dict[Optimizer, list[float]] = {bare: [], wrapped: []}
        for call in range(calls):
            for optimizer in (bare, wrapped) if call % 2 else (wrapped, bare):
                started = time.perf_counter()
                optimizer.step()
                taken[optimizer].append(time.perf_counter() - started)
        if block:  # the first is for warming up
            medians = {optimizer: statistics.median(t) * 1e6 for optimizer, t in taken.items()}
            steps.append(medians[bare])
            more.append(medians[wrapped] - medians[bare])
    return statistics.median(steps), statistics.median(more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--calls", type=int, default=400, help="per block")
    parser.add_argument("--short", action="store_true", help="three blocks of 50 calls")
    options = parser.parse_args()
    if options.short:
        options.blocks, options.calls = 3, 50
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; medians of {options.blocks} blocks of "
          f"{options.calls} calls\n")  # fmt: skip
    print("| model | inner optimizer | its step, µs | LocalOptimizer adds | a bare wrapper adds |")
    print("|---|---|---|---|---|")
    for name, build in (("tiny, 4 tensors", tiny), ("ViT-S/16, 22 M", vit_small)):
        for label, make in INNERS.items():
            wraps: list[Callable[[Optimizer], Optimizer]] = [
                lambda inner: LocalOptimizer(inner, NEVER), Trivial,
            ]  # fmt: skip
            figures = []
            for wrap in wraps:
                bare = make(build().parameters())
                figures.append(added(bare, wrap(make(build().parameters())), options.blocks,
                                     options.calls))  # fmt: skip
            print(f"| {name} | {label} | {figures[0][0]:.0f} | {figures[0][1]:.1f} | "
                  f"{figures[1][1]:.1f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
