"""A whole training step of the program beside a bare PyTorch loop: images per second, MFU, memory.

    python -m benchmarks.throughput                  # ViT-B/16, ResNet-50; bf16; compiled and not
    python -m benchmarks.throughput --short          # small models, to see that it runs
    python -m benchmarks.throughput --peak-tflops 71 --deterministic
    python -m benchmarks.throughput --profile        # where the device's time of a step goes

One replica through the training program's own engine, on images that are already on the device: the
compute path alone, without loading and without communication. A step is forward, loss, backward,
and AdamW or SGD with the recipe's settings; losses are read once, at the end of a repeat. The bare
loop has the same model, autocast and a fused optimizer, and takes turns with ours. FLOPs are those
of the model's matrix products and convolutions, counted by torch, backward included. Memory is the
peak beyond what was there before.

With --profile, of ours alone, compiled where main.py does so by itself: "host" is what it takes to
launch one step on an idle device, "device" what its kernels take, "step" a step among others. Where
host comes close to step the device waits for it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from localopt.traffic import synchronised_clock
from training import checks, distributed, models, optimizers
from training.config import Config
from training.deepspeed_engine import engine_of
from training.distributed import Process
from training.engine import Batch
from training.lr import Schedule
from training.settings import load

Step = Callable[[Tensor, Tensor], Tensor]  # images and labels to the loss


@dataclass
class Row:
    """One way's images per second, and its peak memory in bytes."""

    peak: int
    figures: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.figures)


# Dense bf16, from NVIDIA's data sheets.
TOP = 15  # operations of a profile
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
RECIPES = {
    "simplevit-b16": ("recipe/vit-b-localadamw-cosine.yml", 128),
    "resnet50": ("recipe/resnet50-localsgd-cosine.yml", 128),
}
SMALL = {
    "simplevit-ti16": ("recipe/vit-b-localadamw-cosine.yml", 4),
    "resnet18": ("recipe/resnet50-localsgd-cosine.yml", 4),
}


def ours(config: Config, process: Process) -> Step:
    """A step of the program's engine, in mid-round."""
    model = new_model(config, process)
    optimizer = optimizers.build(config, model, Schedule.of(config, 1_000_000))
    trainer = engine_of(config, model, optimizer, world_size=1)
    return lambda images, labels: trainer.step([(images, labels)]).loss


def bare(config: Config, process: Process) -> Step:
    """What one would write without the program."""
    model = new_model(config, process)
    if config.optimizer.endswith("sgd"):
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), config.max_lr, config.momentum, weight_decay=config.wd, fused=True
        )
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), config.max_lr, weight_decay=config.wd, fused=True
        )
    if config.compile:
        model.compile()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(process.device.type, torch.bfloat16):
            logits = model(images)
        loss = functional.cross_entropy(
            logits.float(), labels, label_smoothing=config.label_smoothing
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def new_model(config: Config, process: Process) -> nn.Module:
    return models.build(
        config.model, classes=1000, resolution=224, seed=0, channels_last=config.channels_last
    ).to(process.device)


def batch_of(config: Config, process: Process) -> Batch:
    """Noise, of the kind that the loader delivers."""
    batch = config.physical_batch_size
    images = torch.randn(batch, 3, 224, 224, device=process.device)
    labels = torch.randint(1000, (batch,), device=process.device)
    return images.contiguous(memory_format=torch.channels_last), labels


def compared(config: Config, process: Process, repeats: int, steps: int) -> list[Row]:
    """Ours and the bare loop: images per second of each repeat, of ``steps`` steps each."""
    batch = config.physical_batch_size
    images, labels = batch_of(config, process)
    ways, rows = [], []
    for make in (ours, bare):
        held = _reset_peak(process)
        step = make(config, process)
        for _ in range(3):  # compiles, allocates, chooses kernels
            assert step(images, labels).isfinite()
        ways.append(step)
        rows.append(Row(peak=_peak(process) - held))
    for _ in range(repeats):
        for step, row in zip(ways, rows, strict=True):
            before = now(process)
            losses = [step(images, labels) for _ in range(steps)]
            assert torch.stack(losses).isfinite().all()
            row.figures.append(batch * steps / (now(process) - before))
    return rows


def profiled(config: Config, process: Process, steps: int) -> tuple[str, list[str]]:
    """A row of host and device, and rows of the operations that take most."""
    step, batch = ours(config, process), batch_of(config, process)
    for _ in range(3):
        step(*batch)
    launched = []
    for _ in range(steps):
        started = now(process)
        step(*batch)
        launched.append(time.perf_counter() - started)
    started = now(process)
    for _ in range(steps):
        step(*batch)
    whole = (now(process) - started) / steps
    on_gpu = process.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step(*batch)
        now(process)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key)
        for e in recorded.key_averages()
        if e.device_type == kind and not e.is_user_annotation  # ranges of code contain operations
    ]
    found.sort(reverse=True)
    device = sum(microseconds for microseconds, _, _ in found)
    rows = [
        f"| {config.model} | `{_short(key)}` | {count / steps:g} | "
        f"{microseconds / steps / 1e3:.3f} | {microseconds / device:.1%} |"
        for microseconds, count, key in found[:TOP]
    ]
    host, each = statistics.median(launched), device / steps / 1e6
    return (
        f"| {config.model} | {config.physical_batch_size} | {'yes' if config.compile else 'no'} | "
        f"{host * 1e3:.2f} | {each * 1e3:.2f} | {whole * 1e3:.2f} | {host / whole:.0%} |"
    ), rows


def _short(key: str) -> str:
    """The name of a kernel, without what a table cannot hold."""
    return key.removeprefix("void ").replace("|", "/").replace("`", "'")[:70]


def print_profiles(chosen: dict[str, tuple[str, int]], deterministic: bool, steps: int) -> None:
    """Two tables."""
    operations = []
    for number, name in enumerate(chosen):
        config = configured(name, *chosen[name], deterministic)
        process = distributed.join(config)
        if not number:
            _print_head(process, deterministic, steps)
            print("| model | batch | compiled | host, ms | device, ms | step, ms | host / step |")
            print("|---|---|---|---|---|---|---|", flush=True)
        row, rows = profiled(checks.with_compile(config, process.device), process, steps)
        print(row, flush=True)
        operations += rows
    print("\n| model | operation | calls per step | ms per step | share of device |")
    print("|---|---|---|---|---|")
    print("\n".join(operations))


def flops_per_image(name: str) -> float:
    """Forward and backward, a multiplication and an addition being two."""
    with torch.device("meta"):
        model = models.build(name, classes=1000, resolution=224, seed=0)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224)).sum().backward()
    return float(counter.get_total_flops())


def now(process: Process) -> float:
    """Seconds, read when the device has done all that it was given."""
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    return synchronised_clock(process.device)


def _reset_peak(process: Process) -> int:
    if process.device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(process.device)
    return torch.cuda.memory_allocated(process.device)


def _peak(process: Process) -> int:
    return torch.cuda.max_memory_allocated(process.device) if process.device.type == "cuda" else 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--short", action="store_true", help="small models, few steps")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the last column")
    parser.add_argument("--deterministic", action="store_true", help="with the program's setting")
    parser.add_argument("--profile", action="store_true", help="what takes the time, instead")
    options = parser.parse_args(arguments)
    chosen = SMALL if options.short else RECIPES
    repeats, steps = (3, 2) if options.short else (7, 20)
    if options.profile:
        print_profiles(chosen, options.deterministic, steps)
        return
    process = None
    for (name, (recipe, batch)), compiled in itertools.product(chosen.items(), (False, True)):
        config = configured(name, recipe, batch, options.deterministic, compile=compiled)
        if process is None:
            process = distributed.join(config)
            _print_head(process, options.deterministic, repeats)
            print("| model | batch | compiled | ours, images/s | bare, images/s | ours / bare | "
                  "MFU | ours, GiB | bare, GiB |")  # fmt: skip
            print("|---|---|---|---|---|---|---|---|---|", flush=True)
        known = next((value for key, value in PEAK_TFLOPS.items() if key in device_name()), None)
        peak, flops = options.peak_tflops or known, flops_per_image(name)
        mine, other = compared(config, process, repeats, steps)
        share = f"{mine.median * flops / peak / 1e12:.1%}" if peak else "peak unknown"
        ratio = statistics.median(a / b for a, b in zip(mine.figures, other.figures, strict=True))
        print(
            f"| {name} | {batch} | {'yes' if compiled else 'no'} | {mine.median:,.1f} | "
            f"{other.median:,.1f} | {ratio:.3f} | {share} | {mine.peak / 2**30:.2f} | "
            f"{other.peak / 2**30:.2f} |",
            flush=True,
        )


def configured(
    name: str, recipe: str, batch: int, deterministic: bool, compile: bool | None = None
) -> Config:
    return replace(
        load(["--recipe-pth", recipe, "--model", name]), physical_batch_size=batch,
        total_batch_size=batch, compile=compile, deterministic=deterministic,
    )  # fmt: skip


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _print_head(process: Process, deterministic: bool, repeats: int) -> None:
    told = ", deterministic" if deterministic else ""
    print(f"{device_name()}, torch {torch.__version__}, bf16{told}, medians of {repeats}, "
          f"{time.strftime('%Y-%m-%d')}\n")  # fmt: skip


if __name__ == "__main__":
    main()
