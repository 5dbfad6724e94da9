"""The report's command line, and how its files are written: all of them or none."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..settings import Parser
from ..values import ConfigError
from . import draw
from .charts import sections
from .page import page
from .runs import ReportError, Run, read

PAGE = "report.html"


def report(runs: Sequence[Run]) -> dict[str, bytes | None]:
    """The report's files by name, the page last; None for a chart that there is nothing for."""
    parts = sections(runs)
    labels = [run.label for run in runs]
    charts = [chart for section in parts for chart in section.charts]
    files: dict[str, bytes | None] = {
        f"{chart.name}.png": draw.png(chart, labels) if chart.curves else None for chart in charts
    }
    return {**files, PAGE: page(runs, parts).encode()}


def write(files: Mapping[str, bytes | None], out: Path) -> None:
    """Put ``files`` into folder ``out``; what an earlier report left under their names goes.

    Raises:
        ReportError: if that cannot be; then nothing has changed.
    """
    draft, made = out / f".{os.getpid()}.tmp", not out.exists()
    try:
        draft.mkdir(parents=True)
        for name, content in files.items():
            if content is not None:
                (draft / name).write_bytes(content)
        for name, content in files.items():
            if content is None:
                (out / name).unlink(missing_ok=True)
            else:
                (draft / name).replace(out / name)
    except OSError as error:
        raise ReportError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # with a report inside it stays
                out.rmdir()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    purpose = "Draw what runs have recorded: a page that needs no other file, and PNGs."
    parser = Parser(prog="python -m training.report", description=purpose)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    default = "default: folder report in the first run's"
    parser.add_argument("--out", type=Path, metavar="DIR", help=default)
    try:
        flags = parser.parse_args(arguments)
        out = flags.out or flags.runs[0] / "report"
        runs = read(flags.runs)
        write(report(runs), out)
    except (ConfigError, ReportError) as error:
        print(f"training.report: {error}", file=sys.stderr)
        return 2
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{out / PAGE}: {count}")
    return 0
