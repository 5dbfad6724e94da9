"""What runs recorded: metrics.jsonl, and names for it from config.yml where that is there too."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .names import labels

METRICS = "metrics.jsonl"
Points = list[tuple[float, float]]


class ReportError(ValueError):
    """A run that cannot be read, or a report that cannot be written. One line."""


@dataclass(frozen=True)
class Run:
    """One run."""

    name: str  # its folder's, with as much of the path as distinguishes it from the others
    label: str  # what it is called in charts
    settings: Mapping[str, Any]  # its config.yml, or nothing
    records: Sequence[Mapping[str, Any]]  # by step; "train_seconds" in each is without evaluation
    summary: Mapping[str, Any] | None  # what it ended with, None if it has not
    notes: Sequence[str]  # what a reader should know about it

    def points(self, kinds: Sequence[str], x: str, y: str) -> Points:
        """``y`` over ``x`` in records of ``kinds`` that have both; NaN where y is not finite."""
        return [
            (at, math.nan if (value := number(record[y])) is None else value)
            for record in self.records
            if record["kind"] in kinds and y in record and (at := number(record.get(x))) is not None
        ]

    def last(self, key: str, kinds: Sequence[str] = ("train", "val")) -> float | None:
        """What was recorded last under ``key``, in the summary or in records of ``kinds``."""
        found = [record for record in self.records if record["kind"] in kinds and key in record]
        if self.summary and key in self.summary:
            found.append(self.summary)
        return number(found[-1][key]) if found else None


def number(value: Any) -> float | None:
    """``value`` if it is a finite number."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if real and math.isfinite(value) else None


def read(folders: Iterable[Path]) -> list[Run]:
    """The runs of ``folders``, each once.

    Raises:
        ReportError: if one is no run's folder, or nothing is recorded in it.
    """
    paths = list({path.resolve(): None for path in folders})
    runs = [_read(path, name) for path, name in zip(paths, shortest_names(paths), strict=True)]
    names = labels([(run.name, run.settings) for run in runs])
    return [replace(run, label=label) for run, label in zip(runs, names, strict=True)]


def shortest_names(paths: Sequence[Path]) -> list[str]:
    """The ends of paths, as long as it takes for no two to be the same."""
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if max(Counter(names).values()) == 1:
            return names
    return [str(path) for path in paths]


def _read(folder: Path, name: str) -> Run:
    records, damaged = _records(folder)
    summary = next((record for record in records[::-1] if record["kind"] == "summary"), None)
    summary = summary or _mapping(_text(folder / "summary.json"))
    notes = [] if summary else [_unfinished(folder, records[-1])]
    if damaged:
        notes.append(f"{damaged} damaged line{'s' * (damaged > 1)} left out")
    settings = _settings(folder / "config.yml")
    return Run(name, name, settings, records, summary, notes)


def _records(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a run, and how many lines are none."""
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder")
    file = folder / METRICS
    if not file.is_file():
        raise ReportError(f"{folder}: not a run's folder: it has no {METRICS}")
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ReportError(f"{file}: {error.strerror}") from None
    found = [_record(line) for line in lines]
    # The last line has no end yet: it is being written, or was when the run was killed.
    damaged = sum(
        record is None and line.strip() != ""
        for line, record in zip(lines[:-1], found[:-1], strict=True)
    )
    records = _without_evaluation(_recorded_last([record for record in found if record]))
    if not any(record["kind"] in ("train", "val") for record in records):
        raise ReportError(f"{file}: nothing is recorded there yet")
    return records, damaged


def _record(line: str) -> dict[str, Any] | None:
    record = _mapping(line) or {}
    return record if "kind" in record and number(record.get("step")) is not None else None


def _mapping(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    if "blocked_seconds" in value:  # what it was called in runs of before
        value["exposed_seconds"] = value.pop("blocked_seconds")
    return value


def _recorded_last(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the records of steps that were gone back on: a resumed run records them once more."""
    kept: list[dict[str, Any]] = []
    for record in records:
        if kept and (kept[-1]["step"] > record["step"] or _identity(kept[-1]) == _identity(record)):
            while kept and kept[-1]["step"] >= record["step"]:
                kept.pop()
        kept.append(record)
    return kept


def _identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["kind"], record["step"], record.get("begun_at")


def _without_evaluation(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each record with the seconds of training alone until then, as the summary counts them."""
    paused = 0.0
    for record in records:
        paused += number(record.get("eval_seconds")) or 0.0
        if (seconds := number(record.get("seconds"))) is not None:
            record.setdefault("train_seconds", seconds - paused)
    return records


def _unfinished(folder: Path, last: Mapping[str, Any]) -> str:
    """Why a run has no summary."""
    if marker := _text(folder / "preempted"):
        stop = _mapping(marker) or {}
        step = number(stop.get("step")) or last["step"]
        return f"stopped at step {step:,}: {stop.get('reason', 'asked to')}"
    if "loss" in last and number(last["loss"]) is None:
        return f"diverged by step {last['step']:,}"
    return f"not finished: step {last['step']:,}"


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(_text(file))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
