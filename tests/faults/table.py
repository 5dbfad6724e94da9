"""A table of what was caught."""

from __future__ import annotations

from collections import Counter
from typing import Any

Result = dict[str, Any]


def table(results: dict[str, Result], before: dict[str, Result] | None = None) -> str:
    """Markdown: a line for each fault, and the totals."""
    heads = ["fault", "origin", "file", "what is wrong"]
    heads += ["caught by"] if before is None else ["caught before", "caught now"]
    heads.append("s")
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for name in dict.fromkeys([*results, *(before or {})]):
        told = results.get(name) or before[name]
        cells = [f"`{name}`", told["origin"], told["file"], told["what"]]
        if before is not None:
            cells.append(_caught(before.get(name)))
        cells += [_caught(results.get(name)), f"{told['seconds']:.0f}"]
        lines.append(_row(cells))
    totals = [] if before is None else [f"Before: {total(before)}."]
    totals.append(f"{'Now: ' if before is not None else ''}{total(results)}.")
    return "\n".join([*lines, "", *totals])


def total(results: dict[str, Result]) -> str:
    """How many were caught, in all and by origin, and where."""
    counted = {name: r for name, r in results.items() if not r.get("equivalent")}
    parts = []
    for origin in ("drawn", "chosen"):
        some = [r for r in counted.values() if r["origin"] == origin]
        if some:
            parts.append(f"{sum(bool(r['caught_by']) for r in some)} of {len(some)} {origin}")
    stages = Counter(r["stage"] for r in counted.values() if r["caught_by"])
    where = ", ".join(f"{stage} {number}" for stage, number in stages.most_common())
    alike = len(results) - len(counted)
    told = f"{', '.join(parts) or 'no fault'} caught"
    told += f" ({where})" if where else ""
    told += f"; {alike} equivalent" if alike else ""
    return f"{told}; {sum(r['seconds'] for r in results.values()):.0f} s"


def _caught(result: Result | None) -> str:
    if result is None:
        return "-"
    if result["caught_by"]:
        return f"`{result['caught_by']}`"
    if result.get("equivalent"):
        return "equivalent"
    doubts = f" ({'; '.join(result['doubts'])})" if result.get("doubts") else ""
    return f"**nothing**{doubts}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
