"""from_scratch's strategies side by side, and with torch's DDP: accuracy, seconds, and on what.

    python -m experiments.from_scratch --seeds 0 1 2

Each run is a process of its own (python -m from_scratch), which starts the others. Its row goes to
results/from_scratch.csv; rows that are there are not run again. Prints means with 95 % confidence
intervals (Student's t). Seconds need a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from experiments.rows import append, read
from experiments.statistics import mean_and_interval

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "from_scratch.csv"

EPOCHS = 12
TARGET = 0.95  # of the test images: the time until then is measured
WHOLE = 1438  # training images

Row = dict[str, str]


class Case(NamedTuple):
    """What is run, for several seeds. `processes` counts the parameter server's server too."""

    strategy: str
    processes: int
    train_size: int = WHOLE


STRATEGIES = ("ring_all_reduce", "param_server", "ddp")
# One worker more than computes gradients: the server.
SIDE_BY_SIDE = (
    Case("ring_all_reduce", 1), Case("ring_all_reduce", 2), Case("param_server", 3), Case("ddp", 2)
)  # fmt: skip
SCALING = tuple(
    Case(strategy, n)
    for n in (1, 2, 3, 4)
    for strategy in STRATEGIES
    if (strategy, n) != ("param_server", 1)
)
SIZES = tuple(
    Case(strategy, 3 if strategy == "param_server" else 2, size)
    for size in (359, 719, WHOLE)
    for strategy in STRATEGIES
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    done = {(_case(row), int(row["seed"])) for row in read(options.out)}
    cases = dict.fromkeys([*SIDE_BY_SIDE, *SCALING, *SIZES])
    wanted = [(case, seed) for seed in options.seeds for case in cases]
    for run in tqdm([run for run in wanted if run not in done], unit="run"):
        append(options.out, measure(*run))
    print(tables(read(options.out)))


def measure(case: Case, seed: int) -> dict[str, object]:
    """Train once; the row of the result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        command = [
            sys.executable, "-m", "from_scratch", "--strategy", case.strategy,
            "--workers", str(case.processes), "--train-size", str(case.train_size),
            "--epochs", str(EPOCHS), "--seed", str(seed), "--out", str(out),
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{case}, seed {seed}:\n{ended.stderr}")
        figures = json.loads(out.read_text())
    epochs = figures["epochs"]
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "strategy": case.strategy,
        "processes": case.processes,
        "train_size": case.train_size,
        "seed": seed,
        "accuracy": figures["accuracy"],
        "loss": epochs[-1]["loss"],
        "seconds": figures["seconds"] / EPOCHS,
        **_spent(figures["processes"]),
        "target_seconds": time_to(TARGET, epochs),
        "epochs": EPOCHS,
        "cores": len(os.sched_getaffinity(0)),
        "commit": subprocess.check_output(commit, cwd=ROOT, text=True).strip(),
    }


def _spent(processes: dict[str, dict[str, float]]) -> dict[str, float | None]:
    """Seconds per epoch of the processes that compute gradients, means; and the most bytes sent."""
    workers = [spent for name, spent in processes.items() if not name.startswith("server")]
    sent = [spent["bytes"] for spent in processes.values()]
    return {
        what: statistics.fmean(spent[what] for spent in workers) / EPOCHS
        for what in ("compute", "send", "wait")
    } | {"bytes": None if None in sent else max(sent) / EPOCHS}


def time_to(target: float, epochs: Sequence[dict[str, float]]) -> float:
    """Seconds of training until an epoch ends with this test accuracy; NaN if none does."""
    seconds = 0.0
    for epoch in epochs:
        seconds += epoch["seconds"]
        if epoch["accuracy"] >= target:
            return seconds
    return math.nan


def tables(rows: list[Row]) -> str:
    """The three tables, as Markdown, with what a reader must know of them."""
    cores = ", ".join(sorted({row["cores"] for row in rows}))
    return "\n\n".join([
        "Side by side: two processes that compute gradients (and one alone), a joint batch of 64.",
        side_by_side(rows),
        f"Against the number of processes (param_server's server is one of them), {WHOLE} images. "
        f"Measured on {cores} cores: more processes than that share them, so nothing is gained "
        "beyond; what more processes cost is what these lines show.",
        _grid(rows, SCALING, "processes", lambda case: str(case.processes)),
        f"Against the number of training images, {SIZES[0].processes} processes "
        "(param_server: 3, one of them the server).",
        _grid(rows, SIZES, "images", lambda case: str(case.train_size)),
    ])  # fmt: skip


def side_by_side(rows: list[Row]) -> str:
    """Accuracy, and where the seconds of an epoch go; means over the seeds."""
    lines = [
        "| strategy | processes | test accuracy | s per epoch | computing | sending | waiting | "
        "MB per epoch sent by the busiest process |",
        "|" + "---|" * 8,
    ]
    for case in SIDE_BY_SIDE:
        own = _of(rows, case)
        if own:
            spent = [f"{statistics.fmean(_numbers(own, what)):.3f}" for what in (
                "compute", "send", "wait"
            )]  # fmt: skip
            sent = f"{float(own[0]['bytes']) / 1e6:.2f}" if own[0]["bytes"] else "-"
            lines.append(_line(
                case.strategy, case.processes, _told(own, "accuracy", 100, 2) + " %",
                _told(own, "seconds", 1, 3), *spent, sent,
            ))  # fmt: skip
    return "\n".join(lines)


def _grid(rows: list[Row], cases: Sequence[Case], head: str, label: Callable[[Case], str]) -> str:
    """Seconds per epoch and to the target: a line per label, columns per strategy."""
    heads = [f"{s}, s per epoch" for s in STRATEGIES]
    heads += [f"{s}, s to {TARGET:.0%}" for s in STRATEGIES]
    lines = ["| " + " | ".join([head, *heads]) + " |", "|" + "---|" * (1 + len(heads))]
    for name in dict.fromkeys(map(label, cases)):
        own = {case.strategy: _of(rows, case) for case in cases if label(case) == name}
        lines.append(_line(name, *(
            _told(own.get(strategy, []), column, 1, 3 if column == "seconds" else 2)
            for column in ("seconds", "target_seconds")
            for strategy in STRATEGIES
        )))  # fmt: skip
    return "\n".join(lines)


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _of(rows: list[Row], case: Case) -> list[Row]:
    return [row for row in rows if _case(row) == case]


def _case(row: Row) -> Case:
    return Case(row["strategy"], int(row["processes"]), int(row["train_size"]))


def _numbers(rows: list[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows]


def _told(rows: list[Row], column: str, scale: float, digits: int) -> str:
    """Mean and interval; how many runs never got there, if some did not."""
    values = _numbers(rows, column)
    missing = sum(map(math.isnan, values))
    if not values:
        return "-"
    if missing:
        return f"not reached in {missing} of {len(values)}"
    mean, interval = mean_and_interval([scale * value for value in values])
    return f"{mean:.{digits}f} ± {interval:.{digits}f}"


if __name__ == "__main__":
    main()
