"""Faults drawn at random, the same for the same seed and code."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from random import Random

from .anchor import MODULE, Source, broken, files, source
from .listing import Fault, FaultError
from .sites import Site, sites

# Of each ten faults.
SHARES = {"localopt": 4.5, "training": 3.5, "data": 2.0}


def draw(root: Path, seed: int, count: int, kept: list[Fault]) -> list[Fault]:
    """``count`` faults for a seed; without those that are in ``kept`` already.

    Args:
        root: of the code.
        seed: decides which.
        count: how many, shared out over the packages.
        kept: the list so far; its names are not used again.
    """
    names = {fault.id for fault in kept}
    known = {(fault.file, fault.function, fault.old, fault.new) for fault in kept}
    drawn = []
    for package, number in quotas(count).items():
        for fault in _of_package(root, package, seed, number):
            if (fault.file, fault.function, fault.old, fault.new) not in known:
                name = _unused(fault.id, names)
                names.add(name)
                drawn.append(Fault(**{**vars(fault), "id": name}))
    return drawn


def quotas(count: int) -> dict[str, int]:
    """How many faults each package gets; they add up to ``count``."""
    parts = {package: int(count * share / 10) for package, share in SHARES.items()}
    parts["localopt"] += count - sum(parts.values())
    return parts


def _of_package(root: Path, package: str, seed: int, number: int) -> list[Fault]:
    """Faults of one package; each place has the same chance, but one to a line."""
    random = Random(f"{package} {seed}")
    candidates = [
        (path, random.choice(variants))
        for path in files(root)
        if path.relative_to(root).parts[0] == package and path.name != "__init__.py"
        for variants in _places(source(path))
    ]
    random.shuffle(candidates)
    found: list[Fault] = []
    lines: set[tuple[str, str, str]] = set()
    for path, site in candidates:
        if len(found) == number:
            break
        fault = fault_at(root, path, source(path), site)
        line = None if fault is None else (fault.file, fault.function, fault.old)
        if fault is not None and line not in lines:
            lines.add(line)
            found.append(fault)
    return found


def _places(code: Source) -> list[list[Site]]:
    """The sites of a file, those together that one operator makes of one place."""
    places: dict[tuple[int, int, str], list[Site]] = {}
    for site in sites(code):
        places.setdefault((site.start, site.end, site.operator), []).append(site)
    return list(places.values())


def fault_at(root: Path, path: Path, code: Source, site: Site) -> Fault | None:
    """The fault at a site; None where it cannot be told by its line, or is no Python."""
    statement = code.logical_line(site.start, site.end)
    if statement is None:
        return None
    for span in (_line(code, site, statement), statement):
        fault = _fault(root, path, code, site, span)
        try:
            place, text = broken(root, fault)
            compile(text, place.file, "exec", dont_inherit=True)
        except (FaultError, SyntaxError, ValueError):
            continue
        if (place.start, place.end) == span:
            return fault
    return None


def _line(code: Source, site: Site, statement: tuple[int, int]) -> tuple[int, int]:
    """The lines of a statement that a site is on, without the comma that ends them."""
    first = max(statement[0], code.text.rfind("\n", 0, site.start) + 1)
    last = code.text.find("\n", site.end)
    last = statement[1] if last < 0 else min(statement[1], last)
    text = code.text[first:last]
    cut = max(len(text.rstrip().removesuffix(",")), site.end - first)
    return first + len(text) - len(text.lstrip()), first + cut


def _fault(root: Path, path: Path, code: Source, site: Site, span: tuple[int, int]) -> Fault:
    start, end = span
    old = code.text[start:end]
    new = old[: site.start - start] + site.new + old[site.end - start :]
    indent = code.text[code.text.rfind("\n", 0, start) + 1 : start]
    function, file = code.scope_of(start, end), str(path.relative_to(root))
    return Fault(
        id=_name(file, function, site.operator),
        origin="drawn",
        file=file,
        function=function,
        old=textwrap.dedent(indent + old),
        new=textwrap.dedent(indent + new),
        what=site.what,
    )


def _name(file: str, function: str, operator: str) -> str:
    last = "" if function == MODULE else function.rpartition(".")[2]
    parts = [Path(file).stem, last, operator]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _unused(name: str, names: set[str]) -> str:
    number = 2
    made = name
    while made in names:
        made, number = f"{name}-{number}", number + 1
    return made
