"""When to synchronise, at the same number of synchronisations: QSR and what it is compared with.

    python -m experiments.periods              # some minutes on two cores
    python -m experiments.periods --seeds 0 1 --steps 600 --out /tmp/periods.csv

On `experiments.small`: few images, wrong labels and long training, where the noise of SGD, and so
H, may show in the test accuracy. Each rule for H has one free number, chosen so that it
synchronises as often as QSR does; data-parallel is H = 1. Rows go to results/periods.csv, and those
that are there are not run again. Intervals are Student's t, 95 %; differences are of equal seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from experiments.small import (
    RESULTS,
    Setting,
    by_name,
    compared,
    heading,
    parser,
    run_missing,
    setting_of,
)
from localopt import QSR, Constant, Period, PostLocal, PowerRule

OUT = RESULTS / "periods.csv"
DATA_PARALLEL = "data-parallel (H = 1)"
NAMES = (DATA_PARALLEL, "QSR (H ∝ η⁻²)", "constant H", "H ∝ η⁻¹", "H ∝ η⁻³", "post-local")
ALPHA, BASE = 0.2, 4  # QSR's


def main() -> None:
    options = parser(__doc__.splitlines()[0], OUT, seeds=8).parse_args()
    setting, wanted = setting_of(options), [(n, seed) for seed in options.seeds for n in NAMES]
    print(table(run_missing(setting, made, wanted, options.out), setting))


def made(setting: Setting, name: str) -> tuple[Period, None]:
    return periods(setting)[name], None


def periods(setting: Setting) -> dict[str, Period]:
    """By name; all but data-parallel have as many rounds as QSR, or nearly."""
    common = {"total_steps": setting.steps, "warmup_steps": setting.warmup}
    qsr = QSR(ALPHA, BASE, **common)
    rounds = len(hs(qsr, setting))
    slow, fast = (
        fitted(lambda a, p=p: PowerRule(a, BASE, p, **common), setting, rounds) for p in (1, 3)
    )
    switch = rounds // 2  # half of the rounds are single steps
    after = round((setting.steps - switch) / (rounds - switch))
    even = Constant(round(setting.steps / rounds), total_steps=setting.steps)
    post_local = PostLocal(switch, after, total_steps=setting.steps)
    every = Constant(1, total_steps=setting.steps)
    return dict(zip(NAMES, (every, qsr, even, slow, fast, post_local), strict=True))


def hs(period: Period, setting: Setting) -> list[int]:
    """H of every round."""
    step, found = 0, []
    while step < setting.steps:
        found.append(period(step, setting.lr(step)))
        step += found[-1]
    return found


def fitted(make: Callable[[float], Period], setting: Setting, rounds: int) -> Period:
    """The period whose α gives so many rounds, or as near as bisection comes."""
    low, high = 1e-4 * setting.peak_lr, 1e4 * setting.peak_lr
    for _ in range(60):
        middle = math.sqrt(low * high)
        if len(hs(make(middle), setting)) > rounds:
            low = middle  # rounds get longer with α
        else:
            high = middle
    return min((make(low), make(high)), key=lambda one: abs(len(hs(one, setting)) - rounds))


def table(rows: list[dict[str, str]], setting: Setting) -> str:
    """Means over the seeds, and differences to data-parallel, in points."""
    found = by_name(rows, NAMES)
    lines = [
        heading(setting, found),
        "",
        "| period | test accuracy, % | minus data-parallel's, points | training loss | "
        "synchronisations | longest H |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        loss = statistics.fmean(float(row["train_loss"]) for row in runs.values())
        one = next(iter(runs.values()))
        lines.append(
            f"| {name} | {compared(runs, found.get(DATA_PARALLEL, {}))} | {loss:.3f} | "
            f"{int(one['syncs']):,} of {setting.steps:,} | {int(one['longest']):,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
