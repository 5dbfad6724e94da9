"""A training step of main.py beside a bare PyTorch loop over the same batches.

    python -m benchmarks.training_step                 # ViT-S/16 at 224 px, and a tiny ViT
    python -m benchmarks.training_step --short

One replica. Ours is what `training.loop` does for a step: watch, learning rate, DeepSpeed's engine
forward and backward, LocalAdamW in mid-round, metrics. Bare is forward, backward and AdamW with the
same settings. DeepSpeed alone is its engine around the bare model and optimizer. They make the same
steps in turn; ratios and differences are medians over the steps of all repeats.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from training import deepspeed_settings, models
from training.engine import Batch
from training.run import Run, assembled
from training.settings import load

SHORT_RECIPE = "recipe/digits-vit-localadamw-qsr.yml"
Step = Callable[[Batch], None]
MODELS = {"simplevit-s16": (224, 4, 3), "simplevit-digits": (32, 16, 40)}  # pixels, batch, steps


def measured(name: str, resolution: int, batch: int, steps: int, repeats: int) -> str:
    with tempfile.TemporaryDirectory() as logs:
        config = load([
            "--recipe-pth", SHORT_RECIPE, "--model", name, "--resolution", str(resolution),
            "--physical-batch-size", str(batch), "--total-batch-size", str(batch),
            "--period", "constant", "--h-base", "1000000", "--log-pth", logs,
        ])  # fmt: skip
        with assembled(config) as run:
            figures = compared(run, steps, repeats)
    ratio = statistics.median(a / b for a, b in zip(figures["ours"], figures["bare"], strict=True))
    again = statistics.median(a / b for a, b in zip(figures["again"], figures["bare"], strict=True))
    more = [
        statistics.median(a - b for a, b in zip(figures[way], figures["bare"], strict=True)) * 1e3
        for way in ("ours", "DeepSpeed")
    ]
    return (f"| {name}, {resolution} px, batch {batch} | {statistics.median(figures['bare']):.4f} "
            f"| {again:.3f} | {ratio:.3f} | {more[0]:.2f} | {more[1]:.2f} |")  # fmt: skip


def ours(run: Run) -> Step:
    """What `training.loop` does for a step of one micro-batch, between two evaluations."""
    made = itertools.count()

    def make(batch: Batch) -> None:
        step = next(made)
        run.watch.begin(step)
        lr = run.schedule(step)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        measures = run.engine.step(run.prepared([batch], step), norms=run.recorder.due(step + 1))
        run.recorder.step(step + 1, lr, measures)

    return make


def compared(run: Run, steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, in each way."""
    batches = list(itertools.islice(run.train_data.epoch(0), steps))
    smoothing = run.config.label_smoothing
    options = {name: run.optimizer.inner.defaults[name] for name in ("lr", "betas", "weight_decay")}

    def bare() -> Step:
        model = new_model(run)
        optimizer = torch.optim.AdamW(model.parameters(), **options)

        def step(batch: Batch) -> None:
            images, labels = batch
            with run.engine.autocast():
                logits = model(images)
            functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def with_deepspeed() -> Step:
        model = new_model(run)
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        settings = deepspeed_settings.settings_of(run.config, 1)
        wrapped, *_ = deepspeed_settings.deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        wrapped.enable_backward_allreduce = False

        def step(batch: Batch) -> None:
            images, labels = batch
            logits = wrapped(images).float()
            wrapped.backward(functional.cross_entropy(logits, labels, label_smoothing=smoothing))
            wrapped.step()

        return step

    ways = {"bare": bare(), "ours": ours(run), "again": bare(), "DeepSpeed": with_deepspeed()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for i, batch in enumerate(batches):
            order = list(ways) if i % 2 else list(ways)[::-1]
            for name in order:
                started = time.perf_counter()
                ways[name](batch)
                if repeat:  # the first is for warming up
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def new_model(run: Run) -> torch.nn.Module:
    """The run's model, as it was before it was given to anything."""
    return models.build(
        run.config.model, classes=run.train_data.num_classes, resolution=run.config.resolution,
        seed=0, channels_last=run.config.channels_last,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="the tiny model, two repeats")
    parser.add_argument("--only", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = list(MODELS)
    if options.short:
        options.repeats, names = 2, ["simplevit-digits"]
    if options.only:
        print(measured(options.only, *MODELS[options.only], options.repeats))
        return
    lines = []
    for name in names:  # each in a process group, and so in a process, of its own
        command = [sys.executable, "-m", "benchmarks.training_step", "--only", name]
        command += ["--repeats", str(options.repeats)]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        lines += [line for line in ended.stdout.splitlines() if line.startswith("|")]
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads; {options.repeats} "
          "repeats\n")  # fmt: skip
    print("| model | bare step, s | bare again / bare | ours / bare | ours adds, ms | DeepSpeed "
          "alone adds, ms |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
