"""RandAugment where training does it: milliseconds for a batch, and images per second.

    python -m benchmarks.randaugment            # 128 images of 224 pixels, two operations each

On a GPU whole batches, on the device; else in the threads that decode, one of them here. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from data import randaugment_torch
from data.randaugment import RandAugment


def seconds(batch: int, side: int, repeats: int) -> list[float]:
    """Of each repeat, after one that is not counted."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (batch, side, side, 3), np.uint8)
    augment = RandAugment(depth=2)
    on_gpu = torch.cuda.is_available()
    images = torch.from_numpy(pixels).cuda() if on_gpu else pixels
    figures = []
    for _ in range(repeats + 1):
        seeds = random.integers(0, 2**63, batch).astype(np.uint64)
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        if on_gpu:
            randaugment_torch.transform(images, augment.plan(seeds, side, side))
            torch.cuda.synchronize()
        else:
            augment.apply(images.copy(), seeds)
        figures.append(time.perf_counter() - started)
    return figures[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few small images")
    options = parser.parse_args()
    batch, side, repeats = (8, 64, 3) if options.short else (128, 224, 21)
    median = statistics.median(seconds(batch, side, repeats))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    print(f"{device}, torch {torch.__version__}, medians of {repeats}\n")
    print("| images | pixels | ms a batch | images/s |\n|---|---|---|---|")
    print(f"| {batch} | {side} x {side} | {1e3 * median:.2f} | {batch / median:,.0f} |")


if __name__ == "__main__":
    main()
