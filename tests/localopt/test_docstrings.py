"""What the public names' docstrings owe a reader, and the tables that are made of them."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import localopt
from localopt import Period, Rule
from localopt.period import PERIODS
from localopt.sync import RULES

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("settings_table", ROOT / "docs/settings_table.py")
settings_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(settings_table)

PUBLIC = {name: getattr(localopt, name) for name in localopt.__all__}
PUBLIC.pop("__version__", None)
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}
METHODS = [*RULES.values(), localopt.BlockMomentum, *PERIODS.values()]


@pytest.mark.parametrize("name", PUBLIC)
def test_one_line_says_what_it_is(name: str) -> None:
    first, _, rest = (inspect.getdoc(PUBLIC[name]) or "").partition("\n")
    assert first.endswith((".", ":", ").")), f"{name}: {first!r}"
    assert len(first) < 100
    assert not rest or rest.startswith("\n"), "the first line stands alone"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_has_a_meaning(name: str) -> None:
    thing = PUBLIC[name]
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return
    if thing is Rule:  # an abstract class without settings
        return
    texts = settings_table.meanings(thing)
    for base in thing.__mro__ if inspect.isclass(thing) else ():
        texts |= settings_table.meanings(base) if base.__module__.startswith("localopt") else {}
    if name in ("LocalSGD", "LocalAdamW"):  # "The others are torch's"
        inner = inspect.signature(getattr(torch.optim, name.removeprefix("Local")))
        texts |= dict.fromkeys(inner.parameters, "torch's")
    attributes = set(re.findall(r"^    (\w+(?:, \w+)*): ", inspect.getdoc(thing), re.MULTILINE))
    known = texts.keys() | {n for names in attributes for n in names.split(", ")}
    assert inspect.signature(thing).parameters.keys() <= known


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_method_says_what_it_does(name: str) -> None:
    for method, value in vars(CLASSES[name]).items():
        if method.startswith("_") or not (inspect.isfunction(value) or isinstance(value, property)):
            continue
        assert inspect.getdoc(getattr(CLASSES[name], method)), f"{name}.{method}"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_method_has_its_equation_and_its_source(method: Any) -> None:
    text = inspect.getdoc(method)
    assert re.search(r"←|H = |H local steps", text), "no equation"
    assert re.search(r"Source: [\s\S]*(arXiv\s+\d{4}\.\d{5}|ICASSP 2016)", text), "no source"


@pytest.mark.parametrize("name", CLASSES)
def test_errors_are_named(name: str) -> None:
    """A class whose construction raises says so."""
    own = vars(CLASSES[name])
    name_ = "__post_init__" if "__dataclass_fields__" in own else "__init__"
    if name_ in own and "raise " in inspect.getsource(own[name_]):
        assert "\nRaises:\n" in inspect.getdoc(CLASSES[name])


def test_the_tables_are_those_of_the_code() -> None:
    page = settings_table.PAGE.read_text(encoding="utf-8")
    assert settings_table.filled(page) == page, "run python docs/settings_table.py"


def test_the_tables_have_every_setting() -> None:
    text = "".join(settings_table.tables().values())
    for made in (*RULES.values(), *PERIODS.values(), Period):
        for setting in inspect.signature(made).parameters:
            assert f"| `{setting}` |" in text
