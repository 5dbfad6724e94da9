"""Which charts there are, and what each shows: numbers and words, nothing drawn yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .runs import Points, Run


@dataclass(frozen=True)
class Axis:
    """What is measured along a side of a chart."""

    name: str  # without its unit
    unit: str = ""
    doubling: bool = False  # whether equal distances are equal factors of two
    from_zero: bool = True  # whether zero is shown

    @property
    def label(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{tidy(value)} {self.unit}".rstrip()


@dataclass(frozen=True)
class Curve:
    """The points of one run; ``faint`` is what only accompanies."""

    run: int
    points: Points
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart."""

    name: str  # its file's
    title: str
    x: Axis
    y: Axis
    curves: Sequence[Curve]  # in the units of the axes; none if nothing was recorded
    note: str = ""  # what a reader must know; why it is empty, where it is
    stepped: bool = False  # whether a point holds since the one before
    coinciding: bool = False  # whether curves may well lie on each other


@dataclass(frozen=True)
class Section:
    """Charts that are read together."""

    title: str
    charts: Sequence[Chart]


def sections(runs: Sequence[Run]) -> list[Section]:
    """Everything that is drawn of ``runs``."""
    return [
        Section(
            "Learning",
            [_learning(runs, what, along) for what in ("accuracy", "loss") for along in _PROGRESS],
        ),
        Section("Rounds", [_rounds(runs), _rate(runs), _drift(runs)]),
        Section("Cost", [_cost(runs, *what) for what in _COSTS]),
    ]


def described(chart: Chart, runs: Sequence[Run]) -> str:
    """The chart in words, for those who do not see it."""
    said = [f"{chart.title}."]
    for curve in chart.curves:
        values = [(x, y) for x, y in curve.points if math.isfinite(y)]
        if curve.faint or not values:
            continue
        (first, began), (last, ended) = values[0], values[-1]
        said.append(
            f"{runs[curve.run].label}: {chart.y.text(began)} at {chart.x.name} "
            f"{chart.x.text(first)}, {chart.y.text(ended)} at {chart.x.text(last)}."
        )
    return " ".join(said)


def tidy(value: float) -> str:
    """A number as a reader wants it: four digits at most, all of them where it has more."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


_LOGGED = ("train", "val")  # kinds of records that say where in the round it is, and the cost
# Along which training advances: the key in the records, a file's name, words.
_PROGRESS = (
    ("epoch", "epochs", "epochs"),
    ("bytes", "bytes", "data sent"),
    ("train_seconds", "seconds", "training time"),
)
_COSTS = (
    ("bytes", "sent", "Sent per replica", "Nothing was sent."),
    ("exposed_seconds", "exposed", "Exposed communication", "Training waited for none."),
    ("hidden_seconds", "hidden", "Hidden behind training", "Nothing travelled behind training."),
)


def _learning(runs: Sequence[Run], what: str, along: tuple[str, str, str]) -> Chart:
    """Accuracy or loss as training advances; over epochs the training's own as well."""
    x, name, words = along
    key, factor = ("top1", 100.0) if what == "accuracy" else ("loss", 1.0)
    curves = _curves(runs, ("val",), x, key)
    note = "" if curves else "No evaluation recorded."
    if x == "bytes" and curves and not any(at > 0 for c in curves for at, _ in c.points):
        curves, note = [], "Nothing was sent."
    if x == "epoch":
        training = _curves(runs, ("train",), x, what, faint=True)
        if training:
            note = f"{note} Faint: while training, on rank 0’s images.".strip()
        curves = training + curves
    curves, axis = _along(x, _scaled(curves, factor))
    y = Axis(what, "%" if what == "accuracy" else "", from_zero=False)
    return Chart(f"{what}-{name}", f"{what.capitalize()} over {words}", axis, y, curves, note)


def _rounds(runs: Sequence[Run]) -> Chart:
    curves = _curves(runs, _LOGGED, "step", "h")
    h = [y for curve in curves for _, y in curve.points if math.isfinite(y)]
    doubling = bool(h) and min(h) > 0 and max(h) > 8 * min(h)
    y = Axis("H", "steps", doubling=doubling, from_zero=not doubling)
    note = "" if curves else "No H recorded."
    title = "Length of rounds over steps"
    return Chart("h", title, Axis("step"), y, curves, note, stepped=True, coinciding=True)


def _rate(runs: Sequence[Run]) -> Chart:
    curves = _curves(runs, ("train",), "step", "lr")
    note = "" if curves else "No learning rate recorded."
    axes = Axis("step"), Axis("learning rate")
    return Chart("lr", "Learning rate over steps", *axes, curves, note, coinciding=True)


def _drift(runs: Sequence[Run]) -> Chart:
    """From the records of all synchronisations where there are, otherwise from the sampled ones."""
    own = _curves(runs, ("sync",), "begun_at", "drift")
    have = {curve.run for curve in own}
    sampled = _curves(runs, _LOGGED, "step", "drift")
    curves = sorted(own + [c for c in sampled if c.run not in have], key=lambda c: c.run)
    note = "Distance of the replicas just before they meet."
    note = note if curves else "Not recorded; --track-replicas records it."
    return Chart("drift", "Drift over steps", Axis("step"), Axis("drift"), curves, note)


def _cost(runs: Sequence[Run], key: str, name: str, title: str, none: str) -> Chart:
    """What has added up since the start."""
    curves = _curves(runs, _LOGGED, "step", key)
    most = max((y for c in curves for _, y in c.points if math.isfinite(y)), default=0.0)
    unit, factor = (byte_unit if key == "bytes" else second_unit)(most)
    y = Axis("sent" if key == "bytes" else "time", unit)
    curves, note = (_scaled(curves, factor), "") if most > 0 else ([], none)
    return Chart(name, title, Axis("step"), y, curves, note)


def _curves(
    runs: Sequence[Run], kinds: Sequence[str], x: str, y: str, *, faint: bool = False
) -> list[Curve]:
    """A curve for each run that recorded any finite value."""
    found = [Curve(at, run.points(kinds, x, y), faint) for at, run in enumerate(runs)]
    return [curve for curve in found if any(math.isfinite(y) for _, y in curve.points)]


def _along(x: str, curves: Sequence[Curve]) -> tuple[list[Curve], Axis]:
    """Curves in the unit that suits them along ``x``, and that axis."""
    if x == "epoch":
        return list(curves), Axis("epoch")
    most = max((at for curve in curves for at, _ in curve.points), default=0.0)
    unit, factor = (byte_unit if x == "bytes" else second_unit)(most)
    moved = [Curve(c.run, [(at * factor, y) for at, y in c.points], c.faint) for c in curves]
    return moved, Axis("sent per replica" if x == "bytes" else "training time", unit)


def _scaled(curves: Sequence[Curve], factor: float) -> list[Curve]:
    return [Curve(c.run, [(x, y * factor) for x, y in c.points], c.faint) for c in curves]


def byte_unit(most: float) -> tuple[str, float]:
    """The unit for up to ``most`` bytes, and what to multiply by."""
    return ("GB", 1e-9) if most >= 1e10 else ("MB", 1e-6)


def second_unit(most: float) -> tuple[str, float]:
    """The unit for up to ``most`` seconds, and what to multiply by."""
    return ("h", 1 / 3600) if most >= 7200 else ("s", 1.0)
