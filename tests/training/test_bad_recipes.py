"""Recipes and host files that cannot be are refused in one line that names file and place."""

from __future__ import annotations

import tempfile
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.support.refusals import FEW, SETTINGS, check, converts, numbered, told, untouched
from training.config import HOST_KEYS
from training.settings import load
from training.values import shortened

BOMB = "data:\n" + "".join(
    f"- &a{level} [{', '.join([f'*a{level - 1}' if level else 'x'] * 9)}]\n" for level in range(12)
)

# What neither a recipe nor a host file can be.
NO_YAML: list[tuple[str | bytes, list[str]]] = [
    ("", ["key: value"]),
    ("# only a comment\n", ["key: value"]),
    ("- 1\n- 2\n", ["key: value"]),
    ("just text\n", ["key: value"]),
    ("42\n", ["key: value"]),
    ("nw: [1\n", ["not valid YAML", "line"]),
    ("nw: 1\n\tdata_pth: x\n", ["not valid YAML", "line 2"]),
    ("nw:\t: 1\n", ["not valid YAML"]),
    ("nw: 1\nnw: 2\n", ["'nw'", "twice"]),
    ("nw: 1\n---\nnw: 2\n", ["not valid YAML", "document"]),
    ("data_pth: 2024-13-41\n", ["not valid YAML", "month"]),
    ("data_pth: !!python/object:os.system ls\n", ["python/object:os.system"]),
    ("data_pth: !!python/object/apply:os.system [ls]\n", ["python/object/apply:os.system"]),
    ("data_pth: !!timestamp x\n", ["not valid YAML"]),
    ("nw: !!int ''\n", ["not valid YAML"]),
    ("nw: !!bool x\n", ["not valid YAML", "x"]),
    ("nw: " + "9" * 5000 + "\n", ["not valid YAML", "digits"]),
    ("data_pth: " + "[" * 3000, ["not valid YAML"]),
    ("data_pth: " + "[" * 3000 + "]" * 3000, ["not valid YAML"]),
    (BOMB, ["alias *a0"]),
    ("data_pth: &a [*a]\n", ["alias *a"]),
    ("a: &a {nw: 1}\nb: {<<: [*a, *a]}\n", ["alias *a"]),
    ("? [a, b]\n: 1\n", ["not valid YAML", "unhashable"]),
    ("1: 2\n", ["unknown key 1"]),
    ("~: 2\n", ["unknown key None"]),
    ('"a\\nb": 2\n', ["unknown key 'a\\nb'"]),
    ("no_such_key: 2\n", ["unknown key 'no_such_key'"]),
    ("x" * 5000 + ": 2\n", ["not valid YAML"]),
    ("nw: x\n", ["nw is 'x'", "an integer"]),
    ('data_pth: "a\\0b"\n', ["data_pth is 'a\\x00b'"]),
    ('data_pth: "\\ud800"\n', ["data_pth is '\\ud800'"]),
    (b"\x00\x01\x02", ["not valid YAML", "#x0000"]),
    (bytes(range(256)), ["UTF-8", "byte 128"]),
    ("data_pth: café\n".encode("latin-1"), ["UTF-8", "byte 13"]),
    ("nw: 1\n".encode("utf-16"), ["UTF-8", "byte 0"]),
    (b"#" * 2**21, ["1048576 bytes"]),
]


@pytest.mark.parametrize("flag", ["--recipe-pth", "--config-pth"])
@pytest.mark.parametrize(("content", "parts"), NO_YAML, ids=numbered(NO_YAML))
def test_a_recipe_or_host_file(
    tmp_path: Path, flag: str, content: str | bytes, parts: list[str]
) -> None:
    path = tmp_path / "given.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with untouched(tmp_path):
        check([str(path), *parts], told(load, [flag, str(path)]))


RECIPES: list[tuple[str, list[str]]] = [
    ("base: none.yml\n", ["given.yml", "base", "none.yml", "No such file"]),
    ("base: given.yml\n", ["given.yml", "base 'given.yml' leads back"]),
    ("base: folder/../given.yml\n", ["base 'folder/../given.yml' leads back"]),
    ("base: link.yml\n", ["base 'link.yml' leads back"]),
    ("base: folder\n", ["base", "folder", "Is a directory"]),
    ("base: ''\n", ["given.yml", "base", "Is a directory"]),
    ("base:\n", ["base is None"]),
    ("base: [a.yml]\n", ["base is ['a.yml']"]),
    ('base: "a\\0b"\n', ["base is 'a\\x00b'"]),
    ("base: ~no-such-user/x\n", ["base", "~no-such-user/x", "No such file"]),
    (f"base: {'x' * 300}\n", ["base", "xxx", "name too long"]),
    ("sync_settings: {1: 2}\n", ["sync_settings is {1: 2}"]),
    ("sync_settings: {a: 1, a: 2}\n", ["'a'", "twice"]),
    ("crop_scale: [0.1, 0.2, 0.3]\n", ["crop_scale is [0.1, 0.2, 0.3]", "list of 2"]),
    ("crop_scale: {0.1: 0.2}\n", ["crop_scale is {0.1: 0.2}"]),
    ("epochs: 1e400\n", ["epochs is '1e400'"]),
    ("max_lr: .nan\n", ["max_lr is nan"]),
    ("max_lr: 1" + "0" * 400 + "\n", ["max_lr is 1000", "a number"]),
    ("data: 2024-01-01\n", ["data is datetime.date(2024, 1, 1)"]),
    ("data: !!binary aGk=\n", ["data is b'hi'"]),
    ("data: !!set {a}\n", ["data is {'a'}"]),
    ("wandb_tags: [1]\n", ["wandb_tags is [1]"]),
]


@pytest.mark.parametrize(("text", "parts"), RECIPES, ids=numbered(RECIPES))
def test_a_recipe(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "given.yml"
    path.write_text(text)
    (tmp_path / "link.yml").symlink_to(path)
    (tmp_path / "folder").mkdir()
    with untouched(tmp_path):
        check(parts, told(load, ["--recipe-pth", str(path)]))


def test_a_folder_for_a_recipe_or_a_host_file(tmp_path: Path) -> None:
    for flag in ("--recipe-pth", "--config-pth"):
        check([str(tmp_path), "Is a directory"], told(load, [flag, str(tmp_path)]))


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - set(HOST_KEYS)))
def test_a_setting_that_is_not_a_hosts(tmp_path: Path, name: str) -> None:
    path = tmp_path / "host.yml"
    path.write_text(f"{name}: 1\n")
    check([str(path), repr(name)], told(load, ["--config-pth", str(path)]))


def wrong_objects(kind: Any) -> st.SearchStrategy[Any]:
    """What YAML can hold, and the type cannot be."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    word = st.text("abcxyz", min_size=1, max_size=8)
    mapping = st.dictionaries(word, st.integers(), max_size=2)
    numbers = st.integers(-9, 9) | st.floats(-9, 9).filter(lambda x: not x.is_integer())
    odd = st.none() | st.dates()
    if origin is dict:
        return odd | numbers | st.booleans() | word | st.lists(numbers, min_size=1, max_size=2)
    if origin is tuple:
        return odd | numbers | mapping | word | st.lists(mapping | odd, min_size=1, max_size=3)
    lists = st.lists(numbers, max_size=2)
    if origin is typing.Literal:
        return odd | numbers | mapping | lists | word.filter(lambda w: w not in arguments)
    if kind is str:
        return odd | numbers | mapping | lists | st.booleans()
    if bool in arguments:  # or None
        return st.dates() | numbers | mapping | lists | word
    if kind is bool:
        return odd | numbers | mapping | lists | word
    if kind is int:
        return odd | mapping | lists | word | st.booleans() | st.sampled_from([0.5, 3.0, 1e300])
    return odd | mapping | lists | st.booleans() | word.filter(lambda w: not converts(w, float))


@pytest.mark.parametrize("name", SETTINGS)
def test_generated_values_in_a_recipe_for_every_setting(tmp_path: Path, name: str) -> None:
    path = tmp_path / "given.yml"

    @FEW
    @given(wrong_objects(SETTINGS[name]))
    def refused(value: Any) -> None:
        path.write_text(yaml.safe_dump({name: value}))
        wanted = [str(path), f"{name} is {shortened(value)}: "]
        check(wanted, told(load, ["--recipe-pth", str(path)]))

    refused()


@FEW
@given(st.binary(max_size=60))
def test_generated_bytes_are_a_recipe_or_refused(content: bytes) -> None:
    """Nothing but a complaint comes of them."""
    with tempfile.NamedTemporaryFile(suffix=".yml") as file:
        file.write(content)
        file.flush()
        check([file.name], told(load, ["--recipe-pth", file.name]))
