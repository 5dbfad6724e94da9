"""Rules and periods by name: a built-in one's, or the import path ``module:Class`` of one's own.

An import path runs code. So only what the command line or a recipe gives comes here, never a name
that a run has left in its files.

Built-in names, and what a built-in period takes, are known without torch, whose import takes longer
than all else that a wrong flag waits for.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from .values import ROOT, did_you_mean

# By setting: the class in localopt that must be made.
KINDS = {"period": "Period", "sync": "Rule"}


@functools.cache
def names(setting: str) -> list[str]:
    """The built-in ones."""
    if setting == "period":
        return list(_periods().PERIODS)
    tree = ast.parse((ROOT / "localopt/sync/__init__.py").read_text(encoding="utf-8"))
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "RULES"
    )
    return [ast.literal_eval(key) for key in table.keys]


@functools.cache
def _periods() -> ModuleType:
    """localopt/period.py by itself: it needs no torch, its package does."""
    if found := sys.modules.get("localopt.period"):
        return found
    name = "training._localopt_period"
    spec = importlib.util.spec_from_file_location(name, ROOT / "localopt/period.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def base_of(setting: str) -> type:
    """The class that must be made."""
    import localopt

    return getattr(localopt, KINDS[setting])


def _builtin(setting: str, name: str) -> Callable[..., Any]:
    from localopt.period import PERIODS
    from localopt.sync import RULES

    return {"period": PERIODS, "sync": RULES}[setting][name]


def is_own(name: str) -> bool:
    """Whether ``name`` is an import path."""
    return ":" in name


def check(setting: str, name: str) -> None:
    """Raise ValueError unless ``name`` is a built-in one or can be an import path. No import."""
    if not is_own(name):
        builtin = names(setting)
        if name not in builtin:
            raise ValueError(
                f"it must be one of {', '.join(builtin)}, or the import path module:Class of a "
                f"{KINDS[setting]} of your own{did_you_mean(name, builtin)}"
            )
        return
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ValueError("an import path is module:Class, such as mypackage.mine:Mine")


def maker(setting: str, name: str) -> Callable[..., Any]:
    """The class of that name, or the function that makes one. Imports what is no built-in one.

    Raises:
        ValueError: if there is none.
    """
    check(setting, name)
    if not is_own(name):
        return _builtin(setting, name)
    base = base_of(setting)
    path, _, attribute = name.partition(":")
    module = _imported(path)
    found = getattr(module, attribute, None)
    if found is None:
        there = [
            key for key, value in vars(module).items()
            if _makes(value, base) and value.__module__ == path
        ]  # fmt: skip
        raise ValueError(
            f"module {path} has no {attribute}" + (f"; it has {', '.join(there)}" if there else "")
        )
    if not _makes(found, base):
        raise ValueError(
            f"it is no subclass of localopt.{base.__name__}, nor a function that is annotated to "
            "return one"
        )
    return found


def _imported(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and f"{path}.".startswith(f"{missing}."):
            raise ValueError(
                f"there is no module {missing}: it must be in main.py's folder, in one of "
                "PYTHONPATH's, or installed"
            ) from None
        raise ValueError(f"importing {path} raised {_described(error)}") from error


def _described(error: BaseException) -> str:
    """An error in a line, with where it is in the code that was imported."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (__file__, importlib.__file__)
    lines = [
        f" ({frame.filename}, line {frame.lineno})"
        for frame in frames
        if frame.filename not in ours and not frame.filename.startswith("<frozen")
    ]
    # A SyntaxError has none: it says itself where it is.
    return f"{type(error).__name__}: {one_line(error)}{lines[-1] if lines else ''}"


def one_line(error: BaseException) -> str:
    """What an error says, as far as it fits a message."""
    text = " ".join(str(error).split())
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _makes(found: Any, base: type) -> bool:
    """Whether it is a subclass, or a function that says that it returns one.

    A function is not called to find out: any function of any module could be named.
    """
    if isinstance(found, type):
        return issubclass(found, base)
    if not inspect.isfunction(found):
        return False
    try:
        made = typing.get_type_hints(found).get("return")
    except (NameError, TypeError, AttributeError):
        return False
    return isinstance(made, type) and issubclass(made, base)


def parameters(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What ``make`` takes, by name."""
    return {
        name: parameter
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def period_parameters(name: str) -> dict[str, inspect.Parameter]:
    """What the period of that name takes. Imports what is no built-in one.

    Raises:
        ValueError: if there is none.
    """
    check("period", name)
    return parameters(maker("period", name) if is_own(name) else _periods().PERIODS[name])


def types(make: Callable[..., Any]) -> dict[str, Any]:
    """The types that the parameters are annotated with.

    Raises:
        ValueError: if one is not there where it is named.
    """
    # A dataclass's __init__ has the annotations of its bases too, written in their modules.
    of, names = make, None
    if isinstance(make, type):
        of, names = make.__init__, {}
        for cls in reversed(make.__mro__):
            names |= vars(sys.modules[cls.__module__])
    try:
        return typing.get_type_hints(of, localns=names)
    except NameError as error:
        raise ValueError(f"the types of its settings cannot be read: {one_line(error)}") from None


def own_code(names: Iterable[str]) -> dict[str, str]:
    """A checksum of each module that one of the ``names`` was imported from."""
    modules = {name.partition(":")[0] for name in names if is_own(name)}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)}
    return {
        name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
        for name, file in files.items()
        if file
    }
