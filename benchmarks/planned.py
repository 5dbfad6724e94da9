"""What ``main.py --plan`` predicts of a run over a slow link, and what the run then takes.

    python -m benchmarks.planned                  # root, for the namespaces
    python -m benchmarks.planned --short

Two hosts with one or two replicas each, ResNet-18 with 11.2 M parameters on the embedded digits,
one epoch. The plan is told the seconds of a step, which a run over the same link without a cap has
shown, and the link's speed with the share of it that TCP reaches (--efficiency). Seconds are those
of training, evaluation left out; two replicas of a host share the machine's cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks._link import Host, capped_link, run_on, two_hosts
from training.plan.plan import plan

RUNS = {  # name -> flags on top of the recipe's
    "constant H = 4": ["--period", "constant", "--h-base", "4"],
    "QSR": ["--period", "qsr", "--h-base", "2", "--alpha", "0.07"],
    "OverlapLocalSGD": ["--sync", "overlap", "--period", "constant", "--h-base", "4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabits", type=float, nargs="+", default=[100.0, 1000.0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4], choices=(2, 4))
    parser.add_argument("--efficiency", type=float, default=0.94)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="a small model, one run, 1 Gbit/s")
    options = parser.parse_args()
    runs, model = RUNS, "resnet18-cifar"
    if options.short:
        options.megabits, options.replicas, options.repeats = [1000.0], [2], 1
        runs, model = {"constant H = 4": RUNS["constant H = 4"]}, "resnet-digits"
    print(f"{model}; medians of {options.repeats}; {options.efficiency:.0%} of the link reached\n")
    print("| replicas | Mbit/s | run | syncs | step, s | predicted, s | measured, s | measured / "
          "predicted | exposed, predicted | exposed, measured |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for replicas in options.replicas:
        batch = ["--total-batch-size", "64", "--physical-batch-size", str(64 // replicas)]
        for name, flags in runs.items():
            given = ["--recipe-pth", "recipe/digits-resnet-localsgd-qsr.yml", "--model", model,
                     "--epochs", "1", "--warmup-epochs", "0", *batch, *flags]  # fmt: skip
            free = [trained(two_hosts(), replicas, given) for _ in range(options.repeats)]
            step = statistics.median(
                (run["train_seconds"] - run["exposed_seconds"]) / run["step"] for run in free
            )
            for megabits in options.megabits:
                expected = plan(
                    ["--plan", *given, "--plan-nodes", "2", "--plan-gpus", str(replicas // 2),
                     "--plan-link-gbits", str(megabits / 1000), "--plan-step-seconds", str(step),
                     "--plan-link-efficiency", str(options.efficiency)]
                )  # fmt: skip
                chosen = expected.scenarios[expected.chosen]
                predicted, exposed = expected.seconds(chosen), expected.exposed(chosen)
                seen = [
                    trained(capped_link(megabits), replicas, given) for _ in range(options.repeats)
                ]
                measured = statistics.median(run["train_seconds"] for run in seen)
                waited = statistics.median(run["exposed_seconds"] for run in seen)
                print(
                    f"| {replicas} | {megabits:g} | {name} | {seen[0]['syncs']} | {step:.3f} | "
                    f"{predicted:.2f} | {measured:.2f} | {measured / predicted:.3f} | "
                    f"{exposed:.2f} | {waited:.2f} |",
                    flush=True,
                )


def trained(
    link: AbstractContextManager[list[Host]], replicas: int, flags: list[str]
) -> dict[str, float]:
    """Train once; the run's summary."""
    with tempfile.TemporaryDirectory() as logs, link as (a, b):
        hosts = [a] * (replicas // 2) + [b] * (replicas // 2)
        run_on(hosts, "main", *flags, "--log-pth", logs, timeout=600)
        (folder,) = Path(logs).iterdir()
        return json.loads((folder / "summary.json").read_text())


if __name__ == "__main__":
    main()
