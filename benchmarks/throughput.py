"""Images per second of a training step, and what share of the device's peak that is.

    python -m benchmarks.throughput                          # ViT-B/16 and ResNet-50, bf16
    python -m benchmarks.throughput --short                  # small models, to see that it runs
    python -m benchmarks.throughput --peak-tflops 71 --compile

One replica through the training program's own engine, on images that are already on the device: the
compute path alone, without loading and without communication. A step is forward, loss, backward,
and AdamW or SGD with the recipe's settings; losses are read once, at the end of a repeat. FLOPs are
those of the model's matrix products and convolutions, counted by torch, backward included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from localopt.collective import clock
from training import engine, models, optimizers
from training.config import Config, load
from training.lr import Schedule

# Dense bf16, from NVIDIA's data sheets.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
RECIPES = {
    "simplevit-b16": ("recipe/vit-b-localadamw-cosine.yml", 128),
    "resnet50": ("recipe/resnet50-localsgd-cosine.yml", 128),
}
SMALL = {
    "simplevit-ti16": ("recipe/vit-b-localadamw-cosine.yml", 4),
    "resnet18": ("recipe/resnet50-localsgd-cosine.yml", 4),
}


def images_per_second(config: Config, place: engine.Place, repeats: int, steps: int) -> list[float]:
    """One figure per repeat, of ``steps`` steps each, after one that is not counted."""
    model = models.build(
        config.model, classes=1000, resolution=224, seed=0, channels_last=config.channels_last
    ).to(place.device)
    optimizer = optimizers.build(config, model, Schedule.of(config, steps))
    trainer = engine.Engine(config, model, optimizer, world_size=1)
    batch = config.physical_batch_size
    images = torch.randn(batch, 3, 224, 224, device=place.device)
    images = images.contiguous(memory_format=torch.channels_last)  # as the loader gives them
    labels = torch.randint(1000, (batch,), device=place.device)
    figures = []
    for _ in range(repeats + 1):
        before = _now(place)
        losses = [trainer.step([(images, labels)]).loss for _ in range(steps)]
        assert torch.stack(losses).isfinite().all()
        figures.append(batch * steps / (_now(place) - before))
    return figures[1:]


def flops_per_image(name: str) -> float:
    """Forward and backward, a multiplication and an addition being two."""
    with torch.device("meta"):
        model = models.build(name, classes=1000, resolution=224, seed=0)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224)).sum().backward()
    return float(counter.get_total_flops())


def _now(place: engine.Place) -> float:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return clock(place.device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--short", action="store_true", help="small models, few steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the last column")
    options = parser.parse_args(arguments)
    chosen = SMALL if options.short else RECIPES
    repeats, steps = (3, 2) if options.short else (7, 20)
    place, rows = None, []
    for name, (recipe, batch) in chosen.items():
        config = load(["--recipe-pth", recipe, "--model", name])
        config = replace(
            config, physical_batch_size=batch, total_batch_size=batch, compile=options.compile
        )
        place = place or engine.start(config)
        figures = images_per_second(config, place, repeats, steps)
        rows.append((name, batch, statistics.median(figures), figures, flops_per_image(name)))
    device = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU"
    peak = options.peak_tflops
    if peak is None:
        peak = next((value for key, value in PEAK_TFLOPS.items() if key in device), None)
    print(f"{device}, torch {torch.__version__}, bf16, compile {options.compile}, "
          f"medians of {repeats}, {time.strftime('%Y-%m-%d')}\n")  # fmt: skip
    print("| model | batch | images/s (least to most) | GFLOP per image | MFU |")
    print("|---|---|---|---|---|")
    for name, batch, median, figures, flops in rows:
        share = f"{median * flops / peak / 1e12:.1%}" if peak else "peak unknown"
        span = f"{median:,.1f} ({min(figures):,.1f} to {max(figures):,.1f})"
        print(f"| {name} | {batch} | {span} | {flops / 1e9:.1f} | {share} |")


if __name__ == "__main__":
    main()
