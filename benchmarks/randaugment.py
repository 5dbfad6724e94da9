"""RandAugment where training does it: milliseconds for a batch, and images per second.

    python -m benchmarks.randaugment            # 128 images of 224 pixels, two operations each

On a GPU whole batches, on the device, by either of the two implementations; else in the threads
that decode, one of them here. From drawing the plan to the last pixel. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import import_module

import numpy as np
import torch

from data.randaugment import RandAugment

AUGMENT = RandAugment(depth=2)


def on_cpu(pixels: np.ndarray) -> Callable[[np.ndarray], float]:
    """What takes seeds (m,) and returns milliseconds."""

    def milliseconds(seeds: np.ndarray) -> float:
        images = pixels.copy()
        started = time.perf_counter()
        AUGMENT.apply(images, seeds)
        return 1e3 * (time.perf_counter() - started)

    return milliseconds


def on_gpu(pixels: np.ndarray, by: str) -> Callable[[np.ndarray], float]:
    """The same, by the clock of the GPU."""
    transform = import_module(f"data.randaugment_{by}").transform
    images = torch.from_numpy(pixels).cuda()

    def milliseconds(seeds: np.ndarray) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        transform(images, AUGMENT.plan(seeds, *pixels.shape[1:3]))
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return milliseconds


def median(milliseconds: Callable[[np.ndarray], float], batch: int, repeats: int) -> float:
    """Of repeats with plans of their own, after one that is not counted."""
    random = np.random.default_rng(0)
    seeds = random.integers(0, 2**63, (repeats + 1, batch)).astype(np.uint64)
    return statistics.median([milliseconds(some) for some in seeds][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few small images")
    options = parser.parse_args()
    batch, side, repeats = (8, 64, 3) if options.short else (128, 224, 21)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "CPU, one thread"
    print(f"{device}, torch {torch.__version__}, medians of {repeats}\n")
    print("| by | images | pixels | ms a batch | images/s |\n|---|---|---|---|---|")
    for by in ("torch", "triton") if gpu else ("numba",):
        timed = median(on_gpu(pixels, by) if gpu else on_cpu(pixels), batch, repeats)
        row = f"| {by} | {batch} | {side} x {side} | {timed:.2f} | {1e3 * batch / timed:,.0f} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
