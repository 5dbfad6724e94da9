"""Single values: made of what a file or a flag says, and shown in messages."""

from __future__ import annotations

import difflib
import reprlib
import typing
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A setting that cannot be: one line that names it, its value and what to do."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Of what is wrong inside, the one line begins with ``what`` it is about."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from None


def absolute(path: str) -> Path:
    """``path`` as it stands, or below the repository where it is relative."""
    return ROOT / Path(path).expanduser()


def checked_path(path: str, name: str) -> None:
    """Raise ConfigError for a path that no file can have."""
    try:
        absolute(converted(path, str)).exists()
    except OSError as error:
        raise ConfigError(f"{name} is {shortened(path)}: {error.strerror}") from None
    except (ValueError, RuntimeError) as error:  # the latter for ~nobody
        raise ConfigError(f"{name} is {shortened(path)}: {error}") from None


def shortened(value: Any) -> str:
    """``repr(value)``, as far as it fits a message."""
    text = _REPR.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple, _REPR.maxset = 4, 20, 20, 20, 20
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 150


def converted(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or ValueError saying what it must be."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            hint = did_you_mean(value, arguments)
            raise ValueError(f"it must be one of {', '.join(map(str, arguments))}{hint}")
        return value
    if origin is tuple:
        return _convert_tuple(value, arguments)
    if origin is dict:
        return _convert_mapping(value)
    if bool in arguments:  # or None
        if value is None or value == "auto":
            return None
        try:
            return converted(value, bool)
        except ValueError:
            raise ValueError("it must be true, false or auto") from None
    if kind is bool and isinstance(value, str) and value.lower() in _BOOLS:
        return _BOOLS[value.lower()]
    if kind in (int, float) and isinstance(value, str):  # YAML reads 1e-3 as text
        value = _number(value, kind)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return _number(str(value) if abs(value) < 10**300 else "too large", float)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"it must be {_KINDS[kind]}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise ValueError("it must be an integer of at most 64 bits")
    if kind is str and not all(_is_plain(character) for character in value):
        raise ValueError("it must be text, without control characters")
    return value


def _is_plain(character: str) -> bool:
    """Neither a control character, which could break the line, nor half of a UTF-16 pair."""
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")


_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"it must be {_KINDS[kind]}") from None


def did_you_mean(value: Any, choices: Iterable[Any], cutoff: float = 0.6) -> str:
    """The choice that may have been meant, for the end of a message; "" if none is near."""
    close = difflib.get_close_matches(str(value), list(map(str, choices)), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("it must be a mapping; as a flag NAME=VALUE, such as lr=0.7")
    return value


def _convert_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError("it must be a list")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise ValueError(f"it must be a list of {len(arguments)}")
    return tuple(converted(v, arguments[0]) for v in value)
