"""What tests of refusals share: one line of complaint, and all that was there is there still."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from training.config import TYPES, Config, fields
from training.values import ConfigError

SETTINGS = {f.name: TYPES[f.name] for f in fields(Config)}
FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
QUICK = 5.0  # seconds of computing that no refusal may take, however busy the machine


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """What is done inside is over soon, and changes nothing in the folder."""
    before, started = contents(folder), time.process_time()
    yield
    seconds = time.process_time() - started
    assert seconds < QUICK, f"it took {seconds:.1f} seconds"
    changed = {name for name, _ in before.items() ^ contents(folder).items()}
    assert not changed, f"changed: {changed}"


def told(call: Callable[..., Any], *arguments: Any, error: type[Exception] = ConfigError) -> str:
    """The one line of complaint, all of it printable."""
    with pytest.raises(error) as caught:
        call(*arguments)
    assert type(caught.value) is error, repr(caught.value)
    line = str(caught.value)
    assert line.isprintable(), line
    assert len(line) < 2500, line
    return line


def check(parts: list[str], line: str) -> None:
    """The line names all that it should."""
    assert all(part in line for part in parts), line


def numbered(cases: list[Any]) -> list[str]:
    """Names for cases whose own content no terminal should see."""
    return [str(number) for number, _ in enumerate(cases)]


def converts(text: str, kind: type) -> bool:
    """Whether a number can be made of the text."""
    try:
        kind(text)
    except ValueError:
        return False
    return True
