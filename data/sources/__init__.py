"""The kinds of data that can be written: a file each, which has a `SOURCE` and names it."""

from __future__ import annotations

import importlib
import pkgutil

from data.source import Known, Source

NAMES = sorted(module.name for module in pkgutil.iter_modules(__path__))


def source(name: str) -> Source:
    """The kind of data of that name, one of `NAMES`."""
    return importlib.import_module(f"{__name__}.{name}").SOURCE


def known(name: str) -> Known | None:
    """The size of a data set that is usually called so, if a kind of data knows it."""
    found = (known for kind in NAMES for known in source(kind).known if known.name == name)
    return next(found, None)
