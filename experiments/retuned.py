"""DiLoCo, BMUF and SlowMo with their outer rate and momentum searched, beside the published ones.

    python -m experiments.retuned              # some twenty minutes on two cores

On `experiments.small`, H = 16, a sixteenth of data-parallel's bytes. Of the images that are not
trained on, 397 are looked at in the search (seeds 0, 1, 2), and the other 1,000 only afterwards,
with other seeds, that is other weights, batches and wrong labels. Rows go to results/retuned.csv,
and those that are there are not run again. Intervals are Student's t, 95 %, over seeds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

from experiments.small import (
    RESULTS,
    Runs,
    Setting,
    by_name,
    compared,
    heading,
    parser,
    run_missing,
    setting_of,
)
from localopt import BMUF, Average, Constant, DiLoCo, Period, Rule, SlowMo

OUT = RESULTS / "retuned.csv"
H, TUNED_ON = 16, 397
SEARCH, FRESH = (0, 1, 2), 100  # seeds of the search; the first of those afterwards

DATA_PARALLEL = "data-parallel"
RATES, MOMENTA = (0.7, 1.0), (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
# Name -> the rule for an outer rate and momentum, and the published pair.
RULES: dict[str, tuple[Callable[[float, float], Rule], tuple[float, float]]] = {
    "BMUF": (lambda lr, momentum: BMUF(momentum=momentum, lr=lr), (1.0, 0.75)),  # 1 - 1/4
    "SlowMo": (lambda lr, momentum: SlowMo(momentum, lr), (1.0, 0.5)),
    "DiLoCo": (lambda lr, momentum: DiLoCo(lr, momentum), (0.7, 0.9)),
}


def main() -> None:
    options = parser(__doc__.splitlines()[0], OUT, seeds=5).parse_args()
    setting = setting_of(options)
    searched = [
        ("tune " + name_of(rule, *pair), seed)
        for seed in SEARCH
        for rule in RULES
        for pair in itertools.product(RATES, MOMENTA)
    ]
    rows = run_missing(setting, made, searched, options.out)
    chosen = [
        name_of(rule, *pair)
        for rule, (_, published) in RULES.items()
        for pair in dict.fromkeys((published, best(rows, rule)))
    ]
    names = [DATA_PARALLEL, "Average", *chosen]
    wanted = [(name, FRESH + seed) for seed in options.seeds for name in names]
    print(table(run_missing(setting, made, wanted, options.out), setting))


def name_of(rule: str, lr: float, momentum: float) -> str:
    return f"{rule} {lr:g} {momentum:g}"


def made(setting: Setting, name: str) -> tuple[Period, Rule, slice]:
    """Period and rule of a name, and which of the images it is looked at on."""
    tuned, short = name.startswith("tune "), name.removeprefix("tune ")
    seen = slice(None, TUNED_ON) if tuned else slice(TUNED_ON, None)
    h = 1 if short == DATA_PARALLEL else H
    period = Constant(h, total_steps=setting.steps)
    if short in (DATA_PARALLEL, "Average"):
        return period, Average(), seen
    rule, lr, momentum = short.split()
    return period, RULES[rule][0](float(lr), float(momentum)), seen


def best(rows: list[dict[str, str]], rule: str) -> tuple[float, float]:
    """The outer rate and momentum with the highest mean accuracy in the search."""
    means = {
        pair: statistics.fmean(float(row["top1"]) for row in runs.values())
        for pair in itertools.product(RATES, MOMENTA)
        for runs in by_name(rows, ["tune " + name_of(rule, *pair)]).values()
    }
    return max(means, key=means.__getitem__)


def table(rows: list[dict[str, str]], setting: Setting) -> str:
    """Published settings beside those that the search chose."""
    names = dict.fromkeys(row["name"] for row in rows if not row["name"].startswith("tune"))
    found = by_name(rows, names)
    base: Runs = found.get(DATA_PARALLEL, {})
    lines = [
        heading(setting, found),
        "",
        "| rule | outer rate, momentum | test accuracy, % | minus data-parallel's, points |",
        "|---|---|---|---|",
    ]
    for name in (DATA_PARALLEL, "Average"):
        lines.append(f"| {name} | | {compared(found.get(name, {}), base)} |")
    for rule, (_, published) in RULES.items():
        for words, pair in (("published", published), ("searched", best(rows, rule))):
            runs = found.get(name_of(rule, *pair), {})
            lines.append(f"| {rule}, {words} | {pair[0]:g}, {pair[1]:g} | {compared(runs, base)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
