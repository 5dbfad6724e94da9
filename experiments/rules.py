"""Every synchronisation rule on the digits, with the same recipe: 20 epochs, H = 4.

    python -m experiments.rules --seeds 0 1 2 3 4 --replicas 2 4

Each run is a process of its own (torchrun main.py). Its row goes to results/rules.csv; rows that
are there are not run again. Prints means with 95 % confidence intervals.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from tqdm import tqdm

from experiments.digits import IMAGES
from experiments.program import ROOT, trained
from experiments.rows import append, read
from experiments.statistics import accuracy

RESULTS = ROOT / "experiments" / "results" / "rules.csv"

EPOCHS = 20

# Name in the table -> recipe, and flags on top of it.
RULES: dict[str, tuple[str, list[str]]] = {
    "data-parallel SGD": ("sgd", []),
    "Average": ("localsgd-qsr", ["--period", "constant", "--h-base", "4"]),
    "Average, QSR": ("localsgd-qsr", []),
    "Average, bf16": (
        "localsgd-qsr",
        ["--period", "constant", "--h-base", "4", "--sync-settings", "compress=bf16"],
    ),
    "Average, int8": (
        "localsgd-qsr",
        ["--period", "constant", "--h-base", "4", "--sync-settings", "compress=int8"],
    ),
    "HierarchicalAverage": ("hierarchical", []),
    "BMUF": ("bmuf", ["--sync-settings", "nesterov=false"]),
    "BMUF, Nesterov": ("bmuf", []),
    "BMUF, Nesterov, int8": ("bmuf", ["--sync-settings", "nesterov=true", "compress=int8"]),
    "SlowMo": ("slowmo", []),
    "DiLoCo": ("diloco", []),
    "EASGD": ("easgd", []),
    "OverlapLocalSGD": ("overlap", []),
    "CoCoDSGD": ("cocod", []),
    "LSGD": ("lsgd", []),
    "Streaming": ("streaming", ["--sync-settings", "fragments=4"]),
    "Streaming, overlapped": ("streaming", []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    wanted = [
        (rule, m, seed)
        for seed in options.seeds
        for m in options.replicas
        for rule in options.rules
        if (rule, m) != ("HierarchicalAverage", 2)  # one pair: there it is Average
    ]
    done = {(row["rule"], int(row["replicas"]), int(row["seed"])) for row in read(options.out)}
    for run in tqdm([run for run in wanted if run not in done], unit="run"):
        append(options.out, measure(*run))
    print(table(read(options.out)))


def measure(rule: str, replicas: int, seed: int) -> dict[str, object]:
    """Train once; the row of the result."""
    recipe, flags = RULES[rule]
    flags = [*flags, "--epochs", str(EPOCHS), "--physical-batch-size", str(32 // replicas)]
    return {"rule": rule, **trained(f"digits-resnet-{recipe}.yml", replicas, seed, flags)}


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds, as Markdown: a line per rule, figures for each number of replicas."""
    counts = sorted({int(row["replicas"]) for row in rows})
    cells = {
        (rule, m): [r for r in rows if r["rule"] == rule and int(r["replicas"]) == m]
        for rule in RULES
        for m in counts
    }
    accuracies = [f"validation accuracy, {m} replicas" for m in counts]
    several = ", ".join(map(str, counts))
    rest = [f"{what} ({several})" for what in ("MB sent per replica", "s exposed", "s hidden")]
    heads = ["rule", *accuracies, "synchronisations", *rest]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for rule in RULES:
        if any(cells[rule, m] for m in counts):
            lines.append(_line(rule, [cells[rule, m] for m in counts]))
    return "\n".join(lines)


def _line(rule: str, runs: list[list[dict[str, str]]]) -> str:
    def means(column: str, scale: float, form: str) -> str:
        return ", ".join(
            format(statistics.fmean(float(r[column]) for r in rows) * scale, form) if rows else "-"
            for rows in runs
        )

    accuracies = [
        accuracy([float(row["top1"]) for row in rows], IMAGES) if rows else "-" for rows in runs
    ]
    one = next(rows for rows in runs if rows)[0]
    figures = [
        f"{int(one['syncs']):,} of {int(one['steps']):,}",
        means("bytes", 1e-6, ",.0f"),
        means("exposed", 1, ".1f"),
        means("hidden", 1, ".1f"),
    ]
    return "| " + " | ".join([rule, *accuracies, *figures]) + " |"


if __name__ == "__main__":
    main()
