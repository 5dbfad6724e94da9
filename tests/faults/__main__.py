"""Put faults into the code one at a time, and show which test catches each.

    python -m tests.faults check
    python -m tests.faults draw --seed 0 --count 40
    python -m tests.faults run --origin chosen --out results.json -- -n 4
    python -m tests.faults table results.json
    python -m tests.faults record results.json

Each command tells more with --help.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import listing
from .anchor import broken, reanchored
from .draw import draw
from .listing import LIST, ROOT, Fault, FaultError, dump, load
from .run import Settings, interruptible, try_all
from .table import table, total


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; the exit status."""
    ours, extra = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        ours, extra = arguments[:cut], arguments[cut + 1 :]
    asked = _parser().parse_args(ours)
    try:
        return {"check": _check, "draw": _draw, "run": _run, "table": _table, "record": _record}[
            asked.command
        ](asked, extra)
    except FaultError as error:
        print(f"tests.faults: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tests.faults: stopped; the results so far are kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="whether each fault of the list is found, once")
    check.add_argument("--reanchor", action="store_true", help="take up what was moved")
    drawer = commands.add_parser("draw", help="add faults drawn at random")
    drawer.add_argument("--seed", type=int, required=True)
    drawer.add_argument("--count", type=int, required=True)
    runner = commands.add_parser("run", help="try the tests; more pytest arguments after --")
    runner.add_argument("--only", nargs="+", metavar="ID", help="these faults")
    runner.add_argument("--origin", choices=["drawn", "chosen"], help="only those of one origin")
    runner.add_argument("--tests", nargs="+", metavar="PATH", help="these tests alone")
    runner.add_argument(
        "--jobs", type=int, default=1, help="faults at a time; with 1 tests that need quiet have it"
    )
    runner.add_argument("--out", type=Path, default=Path("faults.json"), help="file of results")
    runner.add_argument("--timeout", type=float, default=900.0, help="seconds for each stage")
    runner.add_argument("--subject-only", action="store_true", help="not other packages' tests")
    runner.add_argument("--again", action="store_true", help="also faults that have a result")
    runner.add_argument("--reanchor", action="store_true", help="first take up what was moved")
    tables = commands.add_parser("table", help="results as Markdown")
    tables.add_argument("results", type=Path)
    tables.add_argument("before", type=Path, nargs="?")
    recorder = commands.add_parser("record", help="keep in the list which test caught a fault")
    recorder.add_argument("results", type=Path)
    return parser


def _check(asked: argparse.Namespace, extra: list[str]) -> int:
    faults = load()
    if asked.reanchor:
        faults = _taken_up(faults)
    problems = 0
    for fault in faults:
        try:
            place, _ = broken(ROOT, fault)
        except FaultError as error:
            print(f"tests.faults: {error}", file=sys.stderr)
            problems += 1
        else:
            if place.moved:
                print(f"{fault.id}: now in {place.file}, {place.function} (--reanchor takes it up)")
    print(f"{len(faults) - problems} of {len(faults)} faults can be put in")
    return 2 if problems else 0


def _taken_up(faults: list[Fault]) -> list[Fault]:
    now = reanchored(ROOT, faults)
    for old, new in zip(faults, now, strict=True):
        if old != new:
            print(f"{new.id}: {old.file}, {old.function} -> {new.file}, {new.function}")
    if now != faults:
        dump(now)
    return now


def _draw(asked: argparse.Namespace, extra: list[str]) -> int:
    kept = load() if LIST.exists() else []
    drawn = draw(ROOT, asked.seed, asked.count, kept)
    dump([*kept, *drawn])
    print(f"{len(drawn)} faults added to {len(kept)}")
    return 0


def _run(asked: argparse.Namespace, extra: list[str]) -> int:
    faults = load()
    if asked.reanchor:
        faults = _taken_up(faults)
    if unknown := sorted(set(asked.only or ()) - {fault.id for fault in faults}):
        raise FaultError(f"no such faults: {', '.join(unknown)}")
    faults = [
        fault
        for fault in faults
        if (fault.id in asked.only if asked.only else not fault.equivalent)
        and asked.origin in (None, fault.origin)
    ]
    interruptible()
    settings = Settings(
        ROOT, asked.out, asked.tests, extra, asked.timeout, asked.jobs, asked.subject_only,
        asked.again,
    )  # fmt: skip
    known = try_all(faults, settings).known
    mine = {fault.id: known[fault.id] for fault in faults}
    print(total(mine))
    return 0 if all(result["caught_by"] for result in mine.values()) else 1


def _table(asked: argparse.Namespace, extra: list[str]) -> int:
    print(table(_read(asked.results), asked.before and _read(asked.before)))
    return 0


def _record(asked: argparse.Namespace, extra: list[str]) -> int:
    faults = load()
    now = listing.caught(faults, _read(asked.results))
    dump(now)
    changed = sum(old != new for old, new in zip(faults, now, strict=True))
    print(f"{changed} of {len(faults)} faults have another test recorded")
    return 0


def _read(path: Path) -> dict[str, dict[str, object]]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FaultError(f"{path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
