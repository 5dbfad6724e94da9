"""The kinds of data that can be written: a file each, which has a `SOURCE` and names it."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.source import Known, Source

NAMES = sorted(module.name for module in pkgutil.iter_modules(__path__))


def source(name: str) -> Source:
    """The kind of data of that name, one of `NAMES`."""
    return importlib.import_module(f"{__name__}.{name}").SOURCE


def known(name: str) -> Known | None:
    """The size of a data set that is usually called so, if a kind of data knows it."""
    found = (known for kind in NAMES for known in source(kind).known if known.name == name)
    return next(found, None)


def kind_of(data_set: str) -> str | None:
    """The kind of a data set, as far as its name tells."""
    names = {known.name: kind for kind in NAMES for known in source(kind).known}
    return next((names[name] for name in names if data_set.startswith(name)), None)


def command(
    kind: str | None, out: Path, recorded: Mapping[str, Any], *, force: bool = False
) -> str:
    """The command that writes a kind of data into a folder, as one would type it.

    Args:
        kind: None where it is not known.
        out: the folder.
        recorded: settings that dataset.json has; it may be damaged, and hold anything.
        force: whether it writes over what is there.
    """
    parser = argparse.ArgumentParser(add_help=False)
    if kind:
        source(kind).add_flags(parser)
    words = [kind or "SOURCE"]
    for action in parser._actions:
        flag, value = action.option_strings[0], recorded.get(action.dest)
        if action.required:
            words += [flag, action.metavar or action.dest.upper()]
        elif action.const is True and value is True:
            words.append(flag)
        elif value != action.default and _fits(action, value):
            words += [flag, str(value)]
    words += ["--out", str(out), *(["--force"] if force else [])]
    return f"`python -m data.write {' '.join(words)}`"


def _fits(action: argparse.Action, value: Any) -> bool:
    if action.choices:
        return value in action.choices
    return action.type in (int, float) and type(value) is action.type
