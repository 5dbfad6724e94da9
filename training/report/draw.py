"""Charts drawn by matplotlib, which nothing else here knows: SVGs for a page, and PNGs.

The same charts give the same bytes: identifiers are salted with a constant, and no date is written.
In an SVG text stays text, and colours are the page's, by the names of its CSS variables.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .charts import Chart, Curve, tidy

# No two are alike to the colour-blind, and none is lost on the page: at least 18 apart in CIELAB,
# as seen and as simulated for three dichromacies (Machado et al. 2009), and 3:1 to the ground.
LIGHT = ("#2488ee", "#d96800", "#036149", "#9b2993", "#4d3803", "#878b99")
DARK = ("#2b8af8", "#c25c14", "#2ec97f", "#d067c4", "#f8c439", "#c4c8ce")
# With more runs than colours, the second six are dashed and the third dotted.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))

_WIDTH, _HEIGHT = 360.0, 236.0  # of a chart, in points; an SVG's are a page's pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 18.0, 30.0, 44.0  # around the axes
_TEXT = 13.0
_PAD, _LINE = 12.0, 20.0  # around a PNG; its title, and each run in its legend
_LONGEST = 46  # characters of a label in a PNG
_FEW, _DENSE = 14, 400  # a curve of so few points shows them; of so many it is drawn thin
_SALTED = {
    "svg.fonttype": "none", "svg.hashsalt": "localopt", "font.size": _TEXT,
    "path.simplify_threshold": 0.4, "axes.formatter.use_locale": False,
}  # fmt: skip


@dataclass(frozen=True)
class _Colours:
    ink: str
    muted: str
    rule: str
    runs: Sequence[str]


_PAPER = _Colours("#16181b", "#5c626b", "#dfe2e6", LIGHT)
# Stand for the page's: no colour of a chart is one of these.
_NAMED = _Colours("#00010a", "#00010b", "#00010c", [f"#0002{at:02x}" for at in range(len(LIGHT))])
_VARIABLES = {
    "#00010a": "var(--ink)", "#00010b": "var(--muted)", "#00010c": "var(--rule)",
    **{name: f"var(--run-{at})" for at, name in enumerate(_NAMED.runs)},
}  # fmt: skip


def dashes(run: int) -> tuple[float, ...]:
    """Lengths of the dashes and gaps of a run's line."""
    return DASHES[run // len(LIGHT) % len(DASHES)]


def svg(chart: Chart) -> str:
    """``chart`` for a page: an svg element without a title or a legend."""
    with _own_style():
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
        figure.patch.set_visible(False)
        _fill(_axes(figure), chart, _NAMED)
        return _inline(_saved(figure, "svg").decode(), chart.name)


def png(chart: Chart, labels: Sequence[str]) -> bytes:
    """``chart`` by itself: with its title, and a legend where there are several runs."""
    shown = sorted({curve.run for curve in chart.curves}) if len(labels) > 1 else []
    legend = _LINE * len(shown) + _PAD * bool(shown)
    width, height = _WIDTH + 2 * _PAD, _HEIGHT + legend + _LINE + 2 * _PAD
    with _own_style():
        figure = Figure(figsize=(width / 72, height / 72), dpi=216, facecolor="white")
        _fill(_axes(figure, _PAD, _PAD + legend), chart, _PAPER)
        style = {"va": "center", "color": _PAPER.ink, "parse_math": False}
        top = height - _PAD - _LINE / 2
        figure.text(_PAD / width, top / height, chart.title, weight="bold", **style)
        for row, run in enumerate(reversed(shown)):
            y = (_PAD + (row + 0.5) * _LINE) / height
            figure.add_artist(_stroke(run, [_PAD / width, (_PAD + 24) / width], y))
            figure.text((_PAD + 31) / width, y, _cut(labels[run]), **style)
        return _saved(figure, "png")


def _axes(figure: Figure, left: float = 0.0, bottom: float = 0.0) -> Axes:
    """Axes of the same size in every chart, so far from the figure's corner."""
    width, height = figure.get_size_inches() * 72
    return figure.add_axes(
        (
            (left + _LEFT) / width,
            (bottom + _BOTTOM) / height,
            (_WIDTH - _LEFT - _RIGHT) / width,
            (_HEIGHT - _TOP - _BOTTOM) / height,
        )
    )


def _stroke(run: int, x: Sequence[float], y: float) -> Line2D:
    """A run's line in a legend."""
    dash = dashes(run)
    style = (0, dash) if dash else "-"
    colour = LIGHT[run % len(LIGHT)]
    return Line2D(x, [y, y], linewidth=1.8, color=colour, linestyle=style)


def _cut(label: str) -> str:
    """What fits into a legend's line."""
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…"


@contextmanager
def _own_style() -> Iterator[None]:
    """matplotlib's defaults and ours, whatever a user's own settings are."""
    with style.context(["default", _SALTED]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name, in a PNG: a box
        yield


def _saved(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    nothing = ("Creator", "Date", "Format", "Type") if kind == "svg" else ("Software",)
    figure.savefig(file, format=kind, metadata=dict.fromkeys(nothing))
    return file.getvalue()


def _fill(axes: Axes, chart: Chart, colours: _Colours) -> None:
    for curve in chart.curves:
        _line(axes, chart, curve, colours)
    _scale(axes, chart)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=colours.rule, linewidth=0.8)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(colours.muted)
    axes.tick_params(length=0, pad=5, labelsize=_TEXT - 1, labelcolor=colours.muted)
    axes.tick_params(axis="x", length=3, pad=3, color=colours.muted)
    axes.set_xlabel(chart.x.label, color=colours.ink, fontsize=_TEXT, labelpad=3)
    # Above the axis and level: read without turning the head.
    axes.annotate(
        chart.y.label, (0, 1), (-_LEFT, 10), xycoords="axes fraction",
        textcoords="offset points", color=colours.ink, fontsize=_TEXT,
    )  # fmt: skip


def _line(axes: Axes, chart: Chart, curve: Curve, colours: _Colours) -> None:
    x, y = zip(*curve.points, strict=True)
    dash = dashes(curve.run)
    # Where curves coincide the ones below are wider, and so are seen.
    above = len(chart.curves) - 1 - chart.curves.index(curve) if chart.coinciding else 0
    thin = curve.faint or (len(x) > _DENSE and not chart.coinciding)
    width = 1.0 if thin else 1.8 + 1.4 * min(above, 2)
    few = sum(map(math.isfinite, y)) <= _FEW and not (curve.faint and len(y) > 1)
    axes.plot(
        x, y,
        color=colours.runs[curve.run % len(colours.runs)],
        alpha=0.4 if curve.faint else 1.0,
        linewidth=width,
        linestyle=(0, dash) if dash else "-",
        drawstyle="steps-pre" if chart.stepped else "default",
        marker="o" if few else "", markersize=4.5, markeredgewidth=0,
        solid_joinstyle="round", clip_on=False,
    )  # fmt: skip


def _scale(axes: Axes, chart: Chart) -> None:
    """Limits, and a few ticks with plain numbers."""
    points = [point for curve in chart.curves for point in curve.points]
    axes.set_xlim(0, max((x for x, _ in points), default=0) or 1)
    if chart.y.from_zero:
        finite = [0.0, *(y for _, y in points if math.isfinite(y))]
        axes.set_ylim(min(finite), 1.05 * max(finite) if max(finite) > 0 else 1)
    elif chart.y.doubling:
        axes.set_yscale("log", base=2)
    steps = [1, 2, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=steps))
    axes.yaxis.set_major_locator(
        LogLocator(2, numticks=7) if chart.y.doubling else MaxNLocator(5, steps=steps)
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tidy(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    """A number of at most five characters or so."""
    for factor, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= max(factor, 1e4):
            return f"{value / factor:.3g}{letter}"
    return tidy(value)


def _inline(text: str, name: str) -> str:
    """An SVG file as an element of a page: colours by name, identifiers that no other one has."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", text).strip()
