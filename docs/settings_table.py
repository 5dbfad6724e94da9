"""The tables of docs/rules.md: every setting of every rule and period, from their docstrings.

    python docs/settings_table.py            # write them into docs/rules.md
    python docs/settings_table.py --check    # exit with 1 if they are not what is there
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from localopt.period import PERIODS, Period
from localopt.sync import RULES

PAGE = Path(__file__).resolve().parent / "rules.md"
BEGIN, END = "<!-- settings: {} -->", "<!-- end -->"


def meanings(made: Callable[..., Any]) -> dict[str, str]:
    """What the section "Args" of a docstring says of each argument."""
    _, _, section = (inspect.getdoc(made) or "").partition("\nArgs:\n")
    lines = section.partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n?^    (?=\S)", lines, flags=re.MULTILINE)[1:]:
        names, _, text = entry.partition(": ")
        found |= {name.strip(" *"): " ".join(text.split()) for name in names.split(",")}
    return found


def rows(made: Callable[..., Any], without: frozenset[str] = frozenset()) -> Iterator[list[str]]:
    """Name, type, default and meaning of each argument."""
    texts = meanings(made)
    for name, parameter in inspect.signature(made).parameters.items():
        if name not in without:
            kind = getattr(parameter.annotation, "__name__", parameter.annotation)
            needed = parameter.default is parameter.empty
            default = "must be given" if needed else f"`{parameter.default!r}`"
            yield [f"`{name}`", f"`{kind}`", default, texts[name].replace("``", "`")]


def table(named: dict[str, Callable[..., Any]], without: frozenset[str] = frozenset()) -> str:
    """A table in Markdown."""
    lines = ["| name | class | setting | type | default | meaning |", "|---|---|---|---|---|---|"]
    for name, made in named.items():
        who = [f"`{name}`", f"`{made.__name__}`"]
        cells = list(rows(made, without)) or [["none", "", "", ""]]
        for cell in cells:
            lines.append("| " + " | ".join(c.replace("|", r"\|") for c in [*who, *cell]) + " |")
            who = ["", ""]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """By the name in the page's markers."""
    common = frozenset(inspect.signature(Period).parameters)
    return {
        "rules": table(dict(RULES)),
        "periods": table(dict(PERIODS), common),
        "every period": table({"every period": Period}),
    }


def filled(page: str) -> str:
    """The page with its tables as they should be."""
    for name, text in tables().items():
        begin = BEGIN.format(name)
        before, found, rest = page.partition(begin)
        if not found or END not in rest:
            raise SystemExit(f"{PAGE.name} has no {begin} with {END} behind it")
        page = f"{before}{begin}\n\n{text}\n\n{END}{rest.partition(END)[2]}"
    return page


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    wanted = filled(page)
    if "--check" in sys.argv[1:]:
        raise SystemExit(page != wanted and f"{PAGE.name}: run python {sys.argv[0]}")
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
