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
    options = parser(__doc__.splitlines()[0], OUT, seeds=5).parse_args()
    setting, wanted = setting_of(options), [(n, seed) for seed in options.seeds for n in RULES]
    print(table(run_missing(setting, made, wanted, options.out), setting))


def made(setting: Setting, name: str) -> tuple[Period, Rule]:
    h, rule = RULES[name]
    return Constant(h, total_steps=setting.steps), rule()


def table(rows: list[dict[str, str]], setting: Setting) -> str:
    """Means over the seeds, and differences to data-parallel, in points."""
    found = by_name(rows, RULES)
    lines = [
        heading(setting, found),
        "",
        "| rule | H | MB sent per replica | test accuracy, % | minus data-parallel's, points | "
        "drift |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        drift, sent = (
            statistics.fmean(float(row[column]) for row in runs.values())
            for column in ("drift", "sent")
        )
        lines.append(
            f"| {name} | {RULES[name][0]} | {sent / 1e6:.1f} | "
            f"{compared(runs, found.get(DATA_PARALLEL, {}))} | {drift:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
