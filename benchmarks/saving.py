"""How long training stands still for a checkpoint: `python -m benchmarks.saving`.

A replica's state with AdamW, three times the parameters, is saved by `training.checkpoint.saver`
while nothing else runs; next to it, in turn, only its copying to the host's memory, and saving it
at once, without a thread. On a GPU the copying is what crosses the bus.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from localopt import Constant, LocalAdamW
from localopt.collective import Collective
from training import models
from training.checkpoint import files as checkpoint
from training.checkpoint.saver import Saver, State, copied
from training.config import Config


def measured(model: nn.Module, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, by name."""
    optimizer = LocalAdamW(model.parameters(), period=Constant(4), model=model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = State(model, optimizer)
    recorder: Any = SimpleNamespace(state_dict=dict, sync=lambda: None)

    def content() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    seconds: dict[str, list[float]] = {}
    spare = copied(content())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        saver = Saver(place, Config(alpha=1.0), Collective(), publishes=True, versions={})
        for step in range(1, repeats + 2):  # the first time is for warming up
            ways: list[tuple[str, Callable[[], Any]]] = [
                ("copying", lambda: copied(content(), spare)),
                ("copying to new memory", lambda: copied(content())),
                ("save, as training sees it", lambda s=step: saver.save(s, state, recorder, {})),
                ("until it is whole", saver.wait),
                ("saving without a thread", lambda: checkpoint.write_rank(place, 0, content())),
            ]
            for name, way in ways if step % 2 else [*ways[2:], *ways[:2]]:
                started = time.perf_counter()
                way()
                took = time.perf_counter() - started
                if step > 1:
                    seconds.setdefault(name, []).append(took)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="simplevit-b16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="a small model, two repeats")
    settings = parser.parse_args(arguments)
    name, repeats = settings.model, settings.repeats
    if settings.short:
        name, repeats = "simplevit-ti16", 2
    model = models.build(name, classes=1000, resolution=224, seed=0)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    seconds = measured(model, repeats)
    copying = median(seconds["copying"])
    numel = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}, {numel / 1e6:.1f} M parameters, AdamW; medians of {repeats}\n")
    print("| | seconds | / copying |\n|---|---|---|")
    for way, some in seconds.items():
        print(f"| {way} | {median(some):.3f} | {median(some) / copying:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
