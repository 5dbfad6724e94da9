"""The kept list of faults."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("list.yml")
PACKAGES = ("localopt", "training", "data")

_HEAD = """\
# Faults that tests are tried on: python -m tests.faults --help.
# Each is found by its text `old` inside `function`, at any line and with any indentation.
# origin: drawn at random, or chosen by hand. caught_by: a test that is known to fail.
# equivalent: why the fault changes nothing that can be seen.
"""


class FaultError(ValueError):
    """A fault that cannot be used as the list has it."""


@dataclass(frozen=True)
class Fault:
    """One change that makes the code wrong.

    Attributes:
        id: a short name.
        origin: "drawn" or "chosen".
        file: where it is, from the root.
        function: the function's qualified name, a class's, or "<module>".
        old: the text that is replaced, as often there as once.
        new: what replaces it.
        what: what is wrong then, in one line.
        caught_by: a test that fails with it.
        equivalent: why nothing can be seen of it.
    """

    id: str
    origin: str
    file: str
    function: str
    old: str
    new: str
    what: str
    caught_by: str | None = None
    equivalent: str | None = None


_KEYS = [f.name for f in fields(Fault)]


def load(path: Path = LIST) -> list[Fault]:
    """The faults of a list.

    Raises:
        FaultError: if an entry is not of its form, or two have one name.
    """
    entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    faults = [_fault(entry, number) for number, entry in enumerate(entries, 1)]
    names = [fault.id for fault in faults]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FaultError(f"{path.name}: these names are given twice: {', '.join(twice)}")
    return faults


def _fault(entry: Any, number: int) -> Fault:
    name = entry.get("id") if isinstance(entry, dict) else None
    where = f"entry {number} ({name or 'without id'})"
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        raise FaultError(f"{where}: it must be a mapping of texts")
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise FaultError(f"{where}: unknown keys {', '.join(unknown)}")
    if missing := [key for key in _KEYS[:7] if not entry.get(key)]:
        raise FaultError(f"{where}: {', '.join(missing)} must be given")
    if entry["origin"] not in ("drawn", "chosen"):
        raise FaultError(f"{where}: origin is {entry['origin']!r}: it must be drawn or chosen")
    return Fault(**entry)


def dump(faults: Iterable[Fault], path: Path = LIST) -> None:
    """Write a list."""
    entries = [
        {key: value for key in _KEYS if (value := getattr(fault, key)) is not None}
        for fault in faults
    ]
    text = yaml.dump(
        entries, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, indent=2
    )
    path.write_text(_HEAD + "\n" + text.replace("\n- id:", "\n\n- id:"), encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def caught(faults: Iterable[Fault], results: dict[str, dict[str, Any]]) -> list[Fault]:
    """The faults with the tests that have caught them."""
    found = {
        name: result["caught_by"]
        for name, result in results.items()
        if "::" in (result["caught_by"] or "")
    }
    return [replace(fault, caught_by=found.get(fault.id, fault.caught_by)) for fault in faults]
