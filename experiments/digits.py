"""QSR beside data-parallel training: the recipes of the digits, as they are.

    python -m experiments.digits --seeds 0 1 2 3 4

Two replicas. Each run is a process of its own (torchrun main.py). Its row goes to
results/digits.csv; rows that are there are not run again. Prints the table.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from tqdm import tqdm

from experiments.program import ROOT, trained
from experiments.rows import append, read
from experiments.statistics import accuracy
from training.plan.plan import plan

RESULTS = ROOT / "experiments" / "results" / "digits.csv"
IMAGES = 359  # to test on
TRAINED_ON = 1438

# Recipe -> name in the table. A recipe and the one behind it differ in the optimizer only.
RECIPES = {
    "digits-vit-localadamw-qsr.yml": "SimpleViT, LocalAdamW + QSR",
    "digits-vit-adamw.yml": "SimpleViT, data-parallel AdamW",
    "digits-resnet-localsgd-qsr.yml": "ResNet, LocalSGD + QSR",
    "digits-resnet-sgd.yml": "ResNet, data-parallel SGD",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    done = {(row["recipe"], int(row["seed"])) for row in read(options.out)}
    wanted = [(recipe, seed) for seed in options.seeds for recipe in RECIPES]
    for recipe, seed in tqdm([run for run in wanted if run not in done], unit="run"):
        append(options.out, {"recipe": recipe, **trained(recipe, 2, seed)})
    print(table(read(options.out)))


def hs(recipe: str) -> tuple[list[int], list[float]]:
    """H of each round, and the learning rate of each step."""
    found = plan(["--plan", "--recipe-pth", f"recipe/{recipe}", "--plan-images", str(TRAINED_ON)])
    rates = [found.schedule(step) for step in range(found.schedule.total_steps)]
    return [h for _, h in found.scenarios[found.chosen].rounds], rates


def table(rows: list[dict[str, str]]) -> str:
    """Means over the seeds, as Markdown."""
    heads = ["recipe", "validation accuracy", "synchronisations", "sent per replica"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for recipe, name in RECIPES.items():
        runs = [row for row in rows if row["recipe"] == recipe]
        if not runs:
            continue
        syncs, steps = int(runs[0]["syncs"]), int(runs[0]["steps"])
        share = "" if syncs == steps else f" ({100 * syncs / steps:.1f} %)"
        sent = statistics.fmean(float(row["bytes"]) for row in runs) / 1e6
        top1 = accuracy([float(row["top1"]) for row in runs], IMAGES)
        cells = [name, top1, f"{syncs:,} of {steps:,}{share}", f"{sent:,.0f} MB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
