"""The studies' results as one page: README.md in this folder, with pictures in results/.

    python -m experiments.page

From the rows in results/*.csv and the words in page.md; trains nothing. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from experiments import communication, from_scratch, periods, rules
from experiments.rows import read
from experiments.small import RESULTS, Setting, rows_of
from experiments.statistics import mean_and_interval

PAGE, WORDS = (Path(__file__).with_name(name) for name in ("README.md", "page.md"))
# Okabe and Ito's, which colour-blind people tell apart.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")

Row = dict[str, str]


def main() -> None:
    setting = Setting()
    when = rows_of(periods.OUT, setting)
    how = rows_of(communication.OUT, setting)
    plot_accuracies(when, periods.NAMES, RESULTS / "periods.png")
    plot_hs(setting, RESULTS / "hs.png")
    plot_accuracies(how, list(communication.RULES), RESULTS / "communication.png")
    taught = read(from_scratch.RESULTS)
    plot_workers(taught, RESULTS / "from_scratch.png")
    text = WORDS.read_text(encoding="utf-8").format(
        periods=periods.table(when, setting),
        communication=communication.table(how, setting),
        from_scratch=from_scratch.tables(taught),
        rules=rules.table(read(rules.RESULTS)),
        commits=", ".join(sorted({row["commit"] for row in [*when, *how, *taught]})),
    )
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)


def plot_accuracies(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Mean test accuracy of each name with its interval, and every seed's."""
    named = [name for name in names if any(row["name"] == name for row in rows)]
    figure, axes = pyplot.subplots(
        figsize=(6.4, 0.6 + 0.32 * len(named)), constrained_layout=True
    )
    for place, name in enumerate(reversed(named)):
        values = [100 * float(row["top1"]) for row in rows if row["name"] == name]
        mean, half = mean_and_interval(values)
        axes.plot(values, [place] * len(values), "|", color="#999999", markersize=7)
        axes.errorbar(mean, place, xerr=half, fmt="o", color=COLOURS[1], capsize=3, markersize=5)
    axes.set_yticks(range(len(named)), list(reversed(named)))
    axes.set_xlabel("test accuracy, %; mean with 95 % interval, a line for each seed")
    _save(figure, axes, path)


def plot_hs(setting: Setting, path: Path) -> None:
    """H over the steps, of every period."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), constrained_layout=True)
    for (name, period), colour in zip(periods.periods(setting).items(), COLOURS, strict=True):
        hs = periods.hs(period, setting)
        ends = [sum(hs[:i]) for i in range(len(hs) + 1)]
        axes.stairs(hs, ends, baseline=None, label=name, color=colour, linewidth=1.3)
    axes.set(yscale="log", xlabel="step", ylabel="H")
    axes.legend(frameon=False, fontsize=8)
    _save(figure, axes, path)


def plot_workers(rows: Sequence[Row], path: Path) -> None:
    """Seconds of an epoch over the number of processes, of every strategy."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), constrained_layout=True)
    for strategy, colour in zip(from_scratch.STRATEGIES, COLOURS, strict=False):
        points = {}
        for row in rows:
            if (row["strategy"], int(row["train_size"])) == (strategy, from_scratch.WHOLE):
                points.setdefault(int(row["processes"]), []).append(float(row["seconds"]))
        told = {n: mean_and_interval(values) for n, values in sorted(points.items())}
        axes.errorbar(
            list(told), [mean for mean, _ in told.values()], [half for _, half in told.values()],
            fmt="o-", capsize=3, markersize=4, color=colour, label=strategy,
        )  # fmt: skip
    axes.set(xlabel="processes (param_server's server is one of them)", ylabel="s per epoch")
    axes.set_xticks([1, 2, 3, 4])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, axes, path)


def _save(figure: pyplot.Figure, axes: Axes, path: Path) -> None:
    axes.grid(True, linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
