"""The studies' results as one page: README.md in this folder, with pictures in results/.

    python -m experiments.page

From the rows in results/*.csv and the words in page.md; trains nothing. Needs matplotlib.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from experiments import communication, digits, from_scratch, periods, retuned, rules
from experiments.rows import read
from experiments.small import RESULTS, Setting, rows_of
from experiments.statistics import accuracy_interval, differences, mean_and_interval

PAGE, WORDS = (Path(__file__).with_name(name) for name in ("README.md", "page.md"))
# Okabe and Ito's, which colour-blind people tell apart.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")

WIDEST = 4.0  # points, of the axes of differences

Row = dict[str, str]


def main() -> None:
    setting = Setting()
    when = rows_of(periods.OUT, setting)
    how = rows_of(communication.OUT, setting)
    plot_differences(
        when, periods.NAMES, "When: a tenth of the synchronisations", RESULTS / "periods.png"
    )
    plot_hs(setting, RESULTS / "hs.png")
    names = list(communication.RULES)
    plot_differences(how, names, "How: a sixteenth of the bytes", RESULTS / "communication.png")
    small = read(digits.RESULTS)
    again = rows_of(retuned.OUT, setting)
    plot_point(small, RESULTS / "qsr.png")
    scratch = read(from_scratch.RESULTS)
    plot_workers(scratch, RESULTS / "from_scratch.png")
    every = [*small, *again, *when, *how, *scratch]
    text = WORDS.read_text(encoding="utf-8").format(
        periods=periods.table(when, setting),
        communication=communication.table(how, setting),
        from_scratch=from_scratch.tables(scratch),
        digits=digits.table(small),
        retuned=retuned.table(again, setting),
        rules=rules.table(read(rules.RESULTS)),
        commits=", ".join(sorted({row["commit"][:7] for row in every})),
    )
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)


def plot_differences(rows: Sequence[Row], names: Sequence[str], title: str, path: Path) -> None:
    """By how many points each name is better than data-parallel training on the same seeds.

    Means with intervals, and a line for each seed. What lies beyond the axis is written at its end.
    """
    base, *others = [name for name in names if any(row["name"] == name for row in rows)]
    by_seed = {name: {r["seed"]: r for r in rows if r["name"] == name} for name in (base, *others)}
    figure, axes = pyplot.subplots(
        figsize=(7.2, 1.2 + 0.32 * len(others)), constrained_layout=True
    )
    axes.axvline(0, color=COLOURS[0], linewidth=1)
    for y, name in enumerate(reversed(others)):
        points = differences(by_seed[name], by_seed[base])
        mean, half = mean_and_interval(points)
        if abs(mean) > WIDEST:
            side = math.copysign(WIDEST, mean)
            text = f"{abs(mean):.1f} ± {half:.1f}"
            text = f"+{text} →" if mean > 0 else f"← −{text}"
            axes.text(side, y, text, ha="right" if mean > 0 else "left", va="center", fontsize=8)
            continue
        axes.plot(points, [y] * len(points), "|", color="#999999", markersize=7)
        axes.errorbar(mean, y, xerr=half, fmt="o", color=COLOURS[1], capsize=3, markersize=5)
    axes.set_yticks(range(len(others)), list(reversed(others)))
    axes.set_xlim(-WIDEST - 0.2, WIDEST + 0.2)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(
        f"test accuracy minus that of {base} with the same seed, points\n"
        "mean with 95 % interval; a line for each seed"
    )
    _save(figure, axes, path)


def plot_hs(setting: Setting, path: Path) -> None:
    """H over the steps, of every period."""
    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), constrained_layout=True)
    for (name, period), colour in zip(periods.periods(setting).items(), COLOURS, strict=True):
        hs = periods.hs(period, setting)
        ends = [sum(hs[:i]) for i in range(len(hs) + 1)]
        axes.stairs(hs, ends, baseline=None, label=name, color=colour, linewidth=1.3)
    axes.set(yscale="log", xlabel="step", ylabel="H, local steps in a round")
    axes.set_title("Periods that synchronise about equally often", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, axes, path)


def plot_workers(rows: Sequence[Row], path: Path) -> None:
    """Seconds of an epoch over the number of processes that compute gradients, by strategy."""
    figure, axes = pyplot.subplots(figsize=(7.2, 3.2), constrained_layout=True)
    whole = [row for row in rows if int(row["train_size"]) == from_scratch.WHOLE]
    for i, (strategy, colour) in enumerate(zip(from_scratch.STRATEGIES, COLOURS, strict=False)):
        points: dict[int, list[float]] = {}
        for row in whole:
            if row["strategy"] == strategy:
                workers = int(row["processes"]) - (strategy == "param_server")
                points.setdefault(workers, []).append(float(row["seconds"]))
        found = {n: mean_and_interval(values) for n, values in sorted(points.items())}
        axes.errorbar(
            [n + 0.06 * (i - 1) for n in found], [mean for mean, _ in found.values()],
            [half for _, half in found.values()],
            fmt="o-", capsize=3, markersize=4, color=colour, label=strategy,
        )  # fmt: skip
    axes.set(xlabel="processes that compute gradients (param_server has a server besides)")
    axes.set(ylabel="s per epoch")
    axes.set_xticks([1, 2, 3, 4])
    axes.set_ylim(bottom=0)
    axes.set_title("One epoch on two cores; mean with 95 % interval", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, axes, path)


def plot_point(rows: Sequence[Row], path: Path) -> None:
    """QSR in one picture: H over a cosine schedule, and what it saves beside data-parallel."""
    local, parallel = list(digits.RECIPES)[:2]
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(9, 2.9), width_ratios=(5, 2, 2), constrained_layout=True
    )
    hs, rates = digits.hs(local)
    ends = [sum(hs[:i]) for i in range(len(hs) + 1)]
    left.stairs(hs, ends, baseline=None, color=COLOURS[1], linewidth=1.6)
    left.set(yscale="log", xlabel="step", title="QSR: H grows as the rate decays")
    left.set_ylabel("H, local steps in a round", color=COLOURS[1])
    rate = left.twinx()
    rate.plot(rates, color="#999999", linewidth=1)
    rate.set_ylabel("learning rate", color="#777777")
    rate.set_ylim(bottom=0)
    rate.spines["top"].set_visible(False)
    names = ["data-\nparallel", "QSR"]
    runs = [[row for row in rows if row["recipe"] == recipe] for recipe in (parallel, local)]
    sent = [statistics.fmean(float(row["bytes"]) for row in some) / 1e6 for some in runs]
    bars = middle.bar(names, sent, color=[COLOURS[0], COLOURS[1]], width=0.6)
    middle.bar_label(bars, [f"{value:,.0f} MB" for value in sent], fontsize=8, padding=2)
    middle.set(title="sent per replica", ylim=(0, 1.15 * max(sent)), ylabel="MB")
    for x, (some, colour) in enumerate(zip(runs, (COLOURS[0], COLOURS[1]), strict=True)):
        values = [float(row["top1"]) for row in some]
        mean = statistics.fmean(values)
        low, high = accuracy_interval(values, digits.IMAGES)
        right.plot([x + 0.15] * len(values), [100 * v for v in values], "_", color="#999999")
        right.errorbar(
            x, 100 * mean, [[100 * (mean - low)], [100 * (high - mean)]], fmt="o", color=colour,
            capsize=4, markersize=5,
        )  # fmt: skip
    right.set_xticks(range(2), names)
    right.set(title="validation accuracy", ylabel="%", xlim=(-0.6, 1.6), ylim=(97, 100))
    for axes in (left, middle, right):
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _save(figure: pyplot.Figure, axes: Axes, path: Path) -> None:
    axes.grid(True, linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
