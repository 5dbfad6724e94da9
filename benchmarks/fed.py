"""From .beton to weights: whether the loader keeps up with training, in images per second.

    python -m benchmarks.fed                          # ResNet-50 and ViT-B/16, 14 threads
    python -m benchmarks.fed --models resnet50 --threads 8
    python -m benchmarks.fed --short                  # the digits, to see that it runs

A step is what `training.loop` does for one, with the recipe's augmentation, in mid-round of one
replica. "fed" is an epoch of them on what main.py's loader delivers, "held" the same step on a
batch that is on the device already, "loader" an epoch of the loader without steps. They take turns;
rates are medians, without an epoch's first steps. Fed should be at least 0.95 of the lesser of the
other two. The file has JPEGs of 400 × 500 pixels.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.data_path import write_photographs
from benchmarks.throughput import RECIPES, device_name, now
from benchmarks.training_step import SHORT_RECIPE, Step, ours
from training.engine import Batch
from training.run import Run, assembled
from training.settings import load

UNTIMED = 4  # steps: more than the loader is ahead
STEPS = 32
DIGITS = {"simplevit-digits": (SHORT_RECIPE, 32)}


def measured(name: str, folder: str, threads: int, repeats: int) -> str:
    """A row of the table."""
    recipe, batch = (RECIPES | DIGITS)[name]
    given = ["--recipe-pth", recipe, "--model", name, "--log-pth", folder, "--data-pth", folder]
    given += ["--total-batch-size", str(batch), "--physical-batch-size", str(batch)]
    given += ["--nw", str(threads), "--period", "constant", "--h-base", "1000000"]
    if name not in DIGITS:
        given += ["--data", "photographs", "--resolution", "224"]
    with assembled(load(given)) as run:
        figures = compared(run, repeats)
    fed, held, loader = (statistics.median(figures[way]) for way in ("fed", "held", "loader"))
    ratio = statistics.median(a / b for a, b in zip(figures["fed"], figures["held"], strict=True))
    return (
        f"| {name} | {batch} | {threads} | {held:,.0f} | {loader:,.0f} | {fed:,.0f} | {ratio:.3f} "
        f"| {fed / min(held, loader):.3f} |"
    )


def compared(run: Run, repeats: int) -> dict[str, list[float]]:
    """Images per second of each repeat, in each way."""
    step, epochs = ours(run), itertools.count()
    held = next(run.train_data.epoch(next(epochs)))
    figures: dict[str, list[float]] = {"fed": [], "held": [], "loader": []}
    for repeat in range(repeats + 1):
        turns = {
            "fed": (run.train_data.epoch(next(epochs)), step),
            "held": (itertools.repeat(held, run.steps_per_epoch), step),
            "loader": (run.train_data.epoch(next(epochs)), lambda batch: None),
        }
        for name, (batches, made) in turns.items():
            rate = images_per_second(run, batches, made)
            if repeat:  # the first is for warming up
                figures[name].append(rate)
    return figures


def images_per_second(run: Run, batches: Iterable[Batch], step: Step) -> float:
    started, images = 0.0, 0
    for number, batch in enumerate(batches):
        if number == UNTIMED:
            started = now(run.process)
        step(batch)
        if number >= UNTIMED:
            images += len(batch[0])
    return images / (now(run.process) - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=sorted(RECIPES))
    parser.add_argument("--threads", type=int, default=min(14, len(os.sched_getaffinity(0))))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="the digits, a small model")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(measured(*options.only, options.threads, options.repeats))
        return
    print(f"{device_name()}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores\n")
    print("| model | batch | loader threads | held, images/s | loader, images/s | fed, images/s | "
          "fed / held | fed / least of both |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not options.short:
            most = max(RECIPES[name][1] for name in options.models)
            write_photographs(Path(folder, "photographs"), most * STEPS)
        for name in DIGITS if options.short else options.models:  # each in a process of its own
            command = [sys.executable, "-m", "benchmarks.fed", "--only", name, folder]
            command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows = [line for line in ended.stdout.splitlines() if line.startswith("|")]
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
