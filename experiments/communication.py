"""How to synchronise, at the same number of bytes: every rule's accuracy, and its drift.

    python -m experiments.communication        # some minutes on two cores
    python -m experiments.communication --seeds 0 1 --steps 600 --out /tmp/communication.csv

On `experiments.small`. H is 16 for a rule that sends what averaging sends, and less or more for one
that sends more or less, so that over the run each replica sends about as many bytes; "same H" shows
what compression alone does. Settings are the rules' defaults, or published ones. Rows go to
results/communication.csv, and those that are there are not run again. Intervals are Student's t,
95 %; differences are of equal seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from experiments.small import RESULTS, Setting, rows_of, run_missing
from experiments.statistics import difference, interval
from localopt import (
    BMUF,
    EASGD,
    LSGD,
    Average,
    CoCoDSGD,
    Constant,
    DiLoCo,
    HierarchicalAverage,
    OverlapLocalSGD,
    Period,
    Rule,
    SlowMo,
    Streaming,
)

OUT = RESULTS / "communication.csv"
DATA_PARALLEL = "data-parallel"
RULES: dict[str, tuple[int, Callable[[], Rule]]] = {  # H, and the rule
    DATA_PARALLEL: (1, Average),
    "Average": (16, Average),
    "Average, bf16": (8, lambda: Average(compress="bf16")),
    "Average, int8": (4, lambda: Average(compress="int8")),
    "Average, bf16, same H": (16, lambda: Average(compress="bf16")),
    "Average, int8, same H": (16, lambda: Average(compress="int8")),
    "HierarchicalAverage(2, 4)": (14, lambda: HierarchicalAverage(2, 4)),
    "BMUF": (16, BMUF),
    "BMUF, int8, same H": (16, lambda: BMUF(compress="int8")),
    "SlowMo(0.5)": (16, lambda: SlowMo(0.5)),
    "DiLoCo": (16, DiLoCo),
    "EASGD": (16, EASGD),
    "OverlapLocalSGD": (16, OverlapLocalSGD),
    "CoCoDSGD": (16, CoCoDSGD),
    "LSGD": (8, LSGD),
    "Streaming(4)": (16, lambda: Streaming(4)),
    "Streaming(4), overlapped": (16, lambda: Streaming(4, overlap=True)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    for name, value in vars(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    setting = Setting(**{name: getattr(options, name) for name in vars(Setting())})
    wanted = [(name, seed) for seed in options.seeds for name in RULES]
    run_missing(setting, made, wanted, options.out)
    print(table(rows_of(options.out, setting), setting))


def made(setting: Setting, name: str) -> tuple[Period, Rule]:
    h, rule = RULES[name]
    return Constant(h, total_steps=setting.steps), rule()


def table(rows: list[dict[str, str]], setting: Setting) -> str:
    """Means over the seeds, and differences to data-parallel, in points."""
    by_name = {n: {row["seed"]: row for row in rows if row["name"] == n} for n in RULES}
    seeds = max(map(len, by_name.values()))
    lines = [
        f"{setting.told()}; {seeds} seeds",
        "",
        "| rule | H | MB sent per replica | test accuracy, % | minus data-parallel's, points | "
        "drift |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in by_name.items():
        if not runs:
            continue
        accuracies = [100 * float(row["top1"]) for row in runs.values()]
        drift = statistics.fmean(float(row["drift"]) for row in runs.values())
        sent = statistics.fmean(float(row["sent"]) for row in runs.values())
        apart = "" if name == DATA_PARALLEL else difference(runs, by_name[DATA_PARALLEL])
        lines.append(
            f"| {name} | {RULES[name][0]} | {sent / 1e6:.1f} | {interval(accuracies, '.2f')} | "
            f"{apart} | {drift:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
