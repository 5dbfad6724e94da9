"""The page: a table, the charts, and what their words mean, in one file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import draw, names
from .charts import Chart, Section, byte_unit, described
from .runs import Run

_STYLE = Path(__file__).with_name("page.css")
_NONE = "–"

_WORDS = (
    "Accuracy and loss are those of the consensus (the model that the replicas agree on) over all "
    "validation images; in the table, the last evaluation’s. H: the steps that replicas take alone "
    "before they meet. Syncs: how often they met, and their share of the steps. Sent: by each "
    "replica. Blocked: seconds in which training stood still for communication. Hidden: seconds of "
    "communication behind training. Training: seconds, evaluation left out.",
    "All figures are those that rank 0 wrote to metrics.jsonl in the runs’ folders.",
)


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading and unit, and a run's cell."""

    heading: str
    unit: str
    cell: Callable[[Run], str]
    words: bool = False


def page(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    """The whole page."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)} – localopt</title>",
        f"<style>\n{_style()}</style>",
        f"<h1>{_text(title)}</h1>",
        _table(runs),
        *(_section(section, runs) for section in sections),
        "<footer>",
        *(f"<p>{escape(words)}</p>" for words in _WORDS),
        "</footer>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _style() -> str:
    text = _STYLE.read_text(encoding="utf-8")
    for name, colours in (("LIGHT", draw.LIGHT), ("DARK", draw.DARK)):
        palette = " ".join(f"--run-{at}: {colour};" for at, colour in enumerate(colours))
        text = text.replace(name, palette)
    return text


def columns(runs: Sequence[Run]) -> list[Column]:
    """The table's columns; what no run has recorded has none, but for what every run should."""
    always = [
        Column("rule", "", lambda run: names.rule(run.settings), words=True),
        Column("period", "", lambda run: names.period(run.settings), words=True),
        Column("H", "", _h),
        Column("accuracy", "%", lambda run: _figure(run.last("top1", ("val",)), 100, 2)),
    ]
    unit, factor = byte_unit(max(run.last("bytes") or 0 for run in runs))
    average = Column("moving average", "%", lambda run: _figure(run.last("ema_top1"), 100, 2))
    hidden = Column("hidden", "s", lambda run: _figure(run.last("hidden_seconds"), 1, 1))
    return [
        *always,
        *([average] if any(run.last("ema_top1") is not None for run in runs) else []),
        Column("steps", "", lambda run: _figure(run.last("step"), 1, 0)),
        Column("syncs", "", lambda run: _figure(run.last("syncs"), 1, 0)),
        Column("share", "%", lambda run: _figure(share(run), 100, 1)),
        Column("sent", unit, lambda run: _figure(run.last("bytes"), factor, 1)),
        Column("exposed", "s", lambda run: _figure(run.last("exposed_seconds"), 1, 1)),
        *([hidden] if any((run.last("hidden_seconds") or 0) >= 0.05 for run in runs) else []),
        Column("images/s", "", lambda run: _figure(run.last("images_per_second"), 1, 0)),
        Column("training", "s", lambda run: _figure(run.last("train_seconds"), 1, 1)),
    ]


def share(run: Run) -> float | None:
    """Synchronisations per step, as far as the run has come."""
    if (share := run.last("share")) is not None:
        return share
    syncs, steps = run.last("syncs"), run.last("step")
    # Of a run that began with another's weights the first step it counted from is not known.
    known = syncs is not None and steps and not run.settings.get("resume_pth")
    return syncs / steps if known else None


def _table(runs: Sequence[Run]) -> str:
    shown = columns(runs)
    heads = "".join(
        f'<th scope="col"{_side(column)}>{column.heading}'
        + (f"<br>{column.unit}</th>" if column.unit else "</th>")
        for column in shown
    )
    rows = []
    for at, run in enumerate(runs):
        cells = "".join(f"<td{_side(c)}>{_text(c.cell(run))}</td>" for c in shown)
        rows.append(f"<tr>{_head(at, run, len(runs) > 1)}{cells}</tr>")
    return "\n".join(
        [
            '<div class="scroll" role="region" aria-label="Comparison" tabindex="0">',
            f'<table><thead><tr><th scope="col" class="words">run</th>{heads}</tr></thead>',
            "<tbody>",
            *rows,
            "</tbody></table></div>",
        ]
    )


def _side(column: Column) -> str:
    return ' class="words"' if column.words else ""


def _head(at: int, run: Run, several: bool) -> str:
    """A row's first cell: what the run is called, and in small what else is known of it."""
    replicas = run.last("replicas")
    count = f"{replicas:,.0f} replica{'s' * (replicas != 1)}" if replicas else ""
    facts = [
        ", ".join(filter(None, [names.subject(run.settings), count])),
        run.name if run.name != run.label else "",
        *run.notes,
    ]
    small = "".join(f"<span>{escape(words)}</span>" for words in facts if words)
    key = _key(at) if several else ""
    return f'<th scope="row"><div>{key}{_text(run.label)}</div>{small}</th>'


def _text(words: str) -> str:
    """Words as HTML, what belongs together on one line."""
    return escape(re.sub(r" ([=≥]) ", "\u00a0\\1\u00a0", words))


def _section(section: Section, runs: Sequence[Run]) -> str:
    legend = []
    if len(runs) > 1:
        items = (f"<li>{_key(at)}{_text(run.label)}</li>" for at, run in enumerate(runs))
        legend = ['<ul class="legend">', *items, "</ul>"]
    figures = (_figure_of(chart, runs) for chart in section.charts)
    return "\n".join(
        [f"<section><h2>{section.title}</h2>", *legend, '<div class="charts">', *figures,
         "</div></section>"]
    )  # fmt: skip


def _figure_of(chart: Chart, runs: Sequence[Run]) -> str:
    drawing = ""
    if chart.curves:
        words = escape(described(chart, runs))
        drawing = draw.svg(chart).replace("<svg", f'<svg role="img" aria-label="{words}"', 1)
    note = f'\n<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    caption = f"<figcaption>{escape(chart.title)}</figcaption>"
    return f"<figure>{caption}\n{drawing}{note}</figure>"


def _key(run: int) -> str:
    """A run's stroke, as in the charts."""
    dash = " ".join(f"{1.8 * length:g}" for length in draw.dashes(run))
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        '<svg class="key" viewBox="0 0 26 8" aria-hidden="true"><path d="M0 4h26" '
        f'stroke="var(--run-{run % len(draw.LIGHT)})" stroke-width="2.5"{dashed}/></svg>'
    )


def _h(run: Run) -> str:
    """The shortest and the longest round that was recorded."""
    values = [y for _, y in run.points(("train", "val", "sync"), "step", "h") if y == y]
    if not values:
        return _NONE
    least, most = min(values), max(values)
    return f"{least:,.0f}" if least == most else f"{least:,.0f}–{most:,.0f}"


def _figure(value: float | None, factor: float, digits: int) -> str:
    if value is None:
        return _NONE
    return f"{value * factor:,.{digits if abs(value * factor) < 10_000 else 0}f}"
