"""The report's command line, and how its files are written: all of them or none."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.dataset import regular

from ..settings import Parser
from ..values import ConfigError
from . import draw, names
from .charts import sections
from .page import page
from .runs import ReportError, Run, read

PAGE = "report.html"
_OURS = b" localopt</title>"  # early in every page
_LARGEST = 2**28  # bytes of one


def report(runs: Sequence[Run]) -> dict[str, bytes | None]:
    """The report's files by name, the page last; None for a chart that there is nothing for."""
    parts = sections(runs)
    labels = [run.label for run in runs]
    charts = [chart for section in parts for chart in section.charts]
    files: dict[str, bytes | None] = {
        f"{chart.name}.png": draw.png(chart, labels) if chart.curves else None for chart in charts
    }
    return {**files, PAGE: page(runs, parts).encode(errors="replace")}


def write(files: Mapping[str, bytes | None], out: Path, *, force: bool = False) -> None:
    """Put ``files`` into folder ``out``; what an earlier report left under their names goes.

    Args:
        files: content by name, None for a name under which nothing may be.
        out: the folder.
        force: also write over files that no report has left.

    Raises:
        ReportError: if that cannot be; then nothing has changed.
    """
    there = [name for name in files if os.path.lexists(out / name)]
    if there and not force and not _is_report(out / PAGE):
        raise ReportError(
            f"{out / there[0]} is there already, and no report of ours with it: choose another "
            "--out, or --force to write over it"
        )
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


def _is_report(path: Path) -> bool:
    try:
        return _OURS in regular(path, _LARGEST)[:8192]
    except (OSError, ValueError):
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    purpose = "Draw what runs have recorded: a page that needs no other file, and PNGs."
    parser = Parser(prog="python -m training.report", description=purpose)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    default = "default: folder report in the first run's"
    parser.add_argument("--out", type=Path, metavar="DIR", help=default)
    parser.add_argument("--force", action="store_true", help="write over other files of its names")
    try:
        flags = parser.parse_args(arguments)
        out = flags.out or flags.runs[0] / "report"
        runs = read(flags.runs)
        if warning := names.different_data([run.settings for run in runs]):
            print(f"training.report: {warning}", file=sys.stderr)
        write(report(runs), out, force=flags.force)
    except (ConfigError, ReportError) as error:
        print(f"training.report: {error}", file=sys.stderr)
        return 2
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    where = str(out / PAGE).encode(errors="replace").decode()  # a name may be no text
    print(f"{where}: {count}")
    return 0
