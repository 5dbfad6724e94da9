"""Seconds from starting a run to its first step, phase by phase.

    python -m benchmarks.startup
    python -m benchmarks.startup --short

Two replicas on this machine do what ``main.py`` does, on the embedded digits with RandAugment: with
an empty cache of compiled code ("first run"), and once more with what that has left. A figure is
the slower rank's, median over the repeats. Reading files from the disk for the first time is not in
it: the first repeat is for warming up.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from benchmarks._link import Here, run_on

RECIPE = "recipe/digits-resnet-localsgd-qsr.yml"
RUNS = ("first run", "later runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--randaugment", type=int, default=2, metavar="DEPTH")
    parser.add_argument("--short", action="store_true", help="one repeat")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options)
        return
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for repeat in range(1 if options.short else options.repeats + 1):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["NUMBA_CACHE_DIR"] = cache
            for name in RUNS:
                told = run_on(
                    [Here()] * 2, "benchmarks.startup", "--worker", str(time.time()),
                    "--randaugment", str(options.randaugment), timeout=300,
                )  # fmt: skip
                if repeat or options.short:
                    seen[name].append(json.loads(told.splitlines()[-1]))
    print(report(seen))


class Laps:
    """Seconds of each phase, from the one before on."""

    def __init__(self, since: float) -> None:
        self.seconds: dict[str, float] = {}
        self._since = since

    def end(self, phase: str) -> None:
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


def worker(options: argparse.Namespace) -> None:
    """One rank."""
    laps = Laps(options.worker)
    for module, phase in (
        ("torch.distributed", "Python, torch"), ("training.deepspeed_engine", "deepspeed"),
        ("data.loaders", "ffcv, numba"), ("training.loop", "the rest of the imports"),
    ):  # fmt: skip
        importlib.import_module(module)
        laps.end(phase)
    from training import distributed, run
    from training.loop import grouped
    from training.settings import load

    with tempfile.TemporaryDirectory() as logs, ExitStack() as inside:
        flags = ["--recipe-pth", RECIPE, "--randaugment-depth", str(options.randaugment)]
        config = load([*flags, "--log-pth", logs])
        for owner, name, before, during in (
            (distributed, "join", "settings", "process group"),
            (run, "_open_data", "agreeing on settings, data", "compiling, opening the data"),
        ):
            timed = lapped(getattr(owner, name), laps, before, during)
            inside.enter_context(patch.object(owner, name, timed))
        made = inside.enter_context(run.assembled(config))
        laps.end("model, optimizer, engine, folder")
        batches = next(grouped(made.train_data.epoch(0), made.engine.accumulation))
        laps.end("first batch")
        made.engine.step(made.prepared(batches, 0), norms=False)
        laps.end("first step")
        of_ranks = [json.loads(told) for told in gathered(json.dumps(laps.seconds))]
        made.optimizer.finish()
    if made.process.rank == 0:
        slower = max(of_ranks, key=lambda seconds: sum(seconds.values()))
        print(json.dumps(slower), flush=True)
    sys.stdout.flush()
    os._exit(0)


def lapped(
    function: Callable[..., object], laps: Laps, before: str, during: str
) -> Callable[..., object]:
    """A function that ends a lap where it begins, and another where it ends."""

    def wrapped(*args: object) -> object:
        laps.end(before)
        result = function(*args)
        laps.end(during)
        return result

    return wrapped


def gathered(text: str) -> list[str]:
    from localopt.collective import Collective
    from localopt.faults import control

    return control.gather(Collective(), text)


def report(seen: dict[str, list[dict[str, float]]]) -> str:
    phases = list(seen[RUNS[0]][0])
    lines = [
        f"Two replicas, {Path(RECIPE).name}; medians of {len(seen[RUNS[0]])}",
        "",
        "| phase | " + " | ".join(f"{name}, s" for name in RUNS) + " |",
        "|---|" + "---|" * len(RUNS),
    ]
    for phase in phases:
        medians = [statistics.median(row[phase] for row in seen[name]) for name in RUNS]
        lines.append(f"| {phase} | " + " | ".join(f"{x:.2f}" for x in medians) + " |")
    totals = [statistics.median(sum(row.values()) for row in seen[name]) for name in RUNS]
    lines.append("| in all | " + " | ".join(f"{x:.2f}" for x in totals) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
