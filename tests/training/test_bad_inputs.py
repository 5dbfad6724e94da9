"""What cannot be is refused in one line that names it, and leaves everything as it was.

Whatever a user hands over: flags, recipes, host files, host files of DeepSpeed, data, its JSON.
`test_bad_inputs_of_main.py` looks at the same from outside the process.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data import write
from data.dataset import DataError, Dataset, checked
from data.loaders import stored_side
from training import checks, engine
from training.config import (
    _BOOLS,
    _TYPES,
    HOST_KEYS,
    Config,
    ConfigError,
    fields,
    load,
    shortened,
)
from training.plan import plan

SETTINGS = {f.name: _TYPES[f.name] for f in fields(Config)}
NUMBERS = {name: kind for name, kind in SETTINGS.items() if kind in (int, float)}
FEW = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
QUICK = 5.0  # seconds that no refusal may take


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    before, started = contents(folder), time.perf_counter()
    yield
    assert time.perf_counter() - started < QUICK
    assert contents(folder) == before


def told(call: Callable[..., Any], *arguments: Any, error: type[Exception] = ConfigError) -> str:
    """The one line of complaint, all of it printable."""
    with pytest.raises(error) as caught:
        call(*arguments)
    assert type(caught.value) is error
    line = str(caught.value)
    assert line.isprintable(), line
    assert len(line) < 2500
    return line


def check(parts: list[str], line: str) -> None:
    assert all(part in line for part in parts), line


# Flags.

FLAGS: list[tuple[list[str], list[str]]] = [
    (["--no-such-flag", "1"], ["--no-such-flag"]),
    (["--max-lrr=1"], ["--max-lrr", "--max-lr"]),
    (["--epoch", "3"], ["--epoch", "--epochs"]),
    (["-x"], ["-x"]),
    (["--"], ["--"]),
    (["stray"], ["stray"]),
    (["--a\nb"], ["'--a\\nb'"]),
    (["\udcff"], ["'\\udcff'"]),
    (["--" + "x" * 10_000], ["--xxx"]),
    (["--epochs"], ["--epochs", "expected one argument"]),
    (["--epochs", ""], ["--epochs", "''"]),
    (["--epochs", "1e3"], ["--epochs", "'1e3'"]),
    (["--epochs", "9" * 5000], ["--epochs", "'999"]),
    (["--epochs", "0x10"], ["--epochs", "'0x10'"]),
    (["--epochs", "1", "--epochs", "x"], ["--epochs", "'x'"]),
    (["--bn="], ["--bn", "''"]),
    (["--no-bn=1"], ["--no-bn", "'1'"]),
    (["--deepspeed=1"], ["--deepspeed", "'1'"]),
    (["--crop-scale"], ["--crop-scale", "[]"]),
    (["--crop-scale", "1"], ["--crop-scale", "['1']"]),
    (["--crop-scale", "0.1", "0.2", "0.3"], ["--crop-scale", "'0.3'"]),
    (["--crop-scale", "nan", "1"], ["crop_scale", "nan"]),
    (["--crop-scale", "0.9", "0.1"], ["crop_scale", "0.9"]),
    (["--decay-points", "1", "nan"], ["decay_points", "nan"]),
    (["--decay-points", "30", "10"], ["decay_points", "30"]),
    (["--decay-points", "-1"], ["decay_points", "-1"]),
    (["--decay-points", "1e300"], ["decay_points", "1e+300"]),
    (["--scheduler", "step"], ["decay_points", "step"]),
    (["--scheduler", "Cosine"], ["--scheduler", "'Cosine'", "'cosine'"]),
    (["--scheduler", "cosine-step", "--min-lr", "0"], ["min_lr is 0", "cosine-step"]),
    (["--min-lr", "2", "--max-lr", "1"], ["min_lr", "2.0", "max_lr", "1.0"]),
    (["--alpha", "0"], ["alpha is 0.0", "qsr"]),
    (["--period", "swap"], ["switch_step is -1", "swap"]),
    (["--period", "power", "--power", "0"], ["power is 0.0"]),
    (["--switch-step", "-5"], ["switch_step is -5"]),
    (["--nesterov", "--momentum", "0"], ["nesterov is true", "momentum, not 0"]),
    (["--momentum", "1"], ["momentum is 1"]),
    (["--gamma", "1e308"], ["gamma is 1e+308"]),
    (["--randaugment-depth", "1000000000"], ["randaugment_depth is 1000000000"]),
    (["--label-skew", "1e-9"], ["label_skew is 1e-09"]),
    (["--crop-padding", "4", "--crop-scale", "0.5", "1"], ["crop_scale", "crop_padding 4"]),
    (["--optimizer", "sgd", "--track-replicas"], ["track_replicas is True", "sgd"]),
    (["--optimizer", "adamw", "--buffers", "average"], ["buffers is 'average'", "adamw"]),
    (["--resume", "auto", "--no-save-opt"], ["resume is 'auto'", "save_opt is false"]),
    (["--init-model-by-seed", "-1"], ["init_model_by_seed is -1"]),
    (["--resume-from-step", "3"], ["resume_from_step is 3", "resume_pth"]),
    (["--resume-from-epoch", "3"], ["resume_from_epoch is 3", "resume_pth"]),
    (["--optimizer-resume-pth", "x"], ["optimizer_resume_pth is 'x'", "resume_pth"]),
    (["--data", ""], ["data is empty"]),
    (["--model", ""], ["model is empty"]),
    (["--data-pth", "a\0b"], ["--data-pth", "'a\\x00b'"]),
    (["--log-pth", "a\nb"], ["--log-pth", "'a\\nb'"]),
    (["--data", "a\u2028b"], ["--data", "'a\\u2028b'"]),
    (["--data", "\udcff"], ["--data", "'\\udcff'"]),
    (["--wandb-tags", "fine", "a\x1b[1m"], ["--wandb-tags", "\\x1b"]),
    (["--data-pth", "x" * 5000], ["data_pth", "'xxx", "name too long"]),
    (["--data-pth", "/tmp", "--data", "x" * 300], ["data is", "xxx", "name too long"]),
    (["--log-pth", "~no-such-user/x"], ["log_pth", "'~no-such-user/x'"]),
    (["--recipe-pth", ""], ["--recipe-pth", "empty"]),
    (["--recipe-pth", "a\0b"], ["--recipe-pth", "'a\\x00b'"]),
    (["--recipe-pth", "x" * 5000], ["--recipe-pth", "'xxx", "name too long"]),
    (["--recipe-pth", "~no-such-user/x"], ["--recipe-pth", "'~no-such-user/x'"]),
    (["--recipe-pth", "/no/such.yml"], ["/no/such.yml", "No such file"]),
    (["--recipe-pth", "/dev/zero"], ["/dev/zero", "1048576 bytes"]),
    (["--recipe-pth", "/proc/self/mem"], ["/proc/self/mem", "Input/output"]),
    (["--config-pth", ""], ["--config-pth", "empty"]),
    (["--config-pth", "a\nb"], ["--config-pth", "'a\\nb'"]),
    (["--config-pth", "/no/host.yml"], ["/no/host.yml", "No such file"]),
    (["--sync-settings", "alpha"], ["--sync-settings", "'alpha'"]),
    (["--sync-settings", "a=[1"], ["--sync-settings", "'a=[1'"]),
    (["--sync-settings", "a=1", "a=2"], ["--sync-settings", "a is given twice"]),
    (["--sync-settings", "a=2024-13-41"], ["--sync-settings", "2024-13-41"]),
    (["--sync-settings", "a=!!python/object:os.system x"], ["--sync-settings", "os.system"]),
    (["--sync-settings", "a=!!bool x"], ["--sync-settings", "!!bool x"]),
    (["--sync-settings", "a=" + "[" * 3000], ["--sync-settings", "a=[[["]),
    (["--sync-settings", "a=&a [*a]"], ["--sync-settings", "alias *a"]),
]


def numbered(cases: list[Any]) -> list[str]:
    """Names for cases whose own content no terminal should see."""
    return [str(number) for number, _ in enumerate(cases)]


@pytest.mark.parametrize(("argv", "parts"), FLAGS, ids=numbered(FLAGS))
def test_a_flag(tmp_path: Path, argv: list[str], parts: list[str]) -> None:
    places = ["--data-pth", str(tmp_path / "data"), "--log-pth", str(tmp_path / "runs")]
    with untouched(tmp_path):
        check(parts, told(load, [*places, *argv]))


def converts(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def wrong_words(kind: Any) -> st.SearchStrategy[list[str]]:
    """Words after a flag that its type cannot have."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    text = st.text(max_size=20)
    # What starts with a dash is a flag of its own.
    word = text.filter(lambda w: w and not w.startswith("-"))
    if origin is tuple and arguments[0] is str:
        return st.lists(word.map(lambda w: f"{w}\x07"), min_size=1, max_size=3)
    if origin is tuple:
        return st.lists(word.filter(lambda w: not converts(w, float)), min_size=1, max_size=3)
    if origin is dict:
        return st.lists(word.filter(lambda w: "=" not in w), min_size=1, max_size=3)
    if origin is typing.Literal:
        return st.tuples(text.filter(lambda w: w not in arguments)).map(list)
    if kind is bool:
        return st.tuples(text.filter(lambda w: w.lower() not in _BOOLS)).map(list)
    if kind is str:
        return st.tuples(text.map(lambda w: f"{w}\x07")).map(list)
    return st.tuples(text.filter(lambda w: not converts(w, kind))).map(list)


@pytest.mark.parametrize("name", SETTINGS)
def test_generated_words_for_every_setting(name: str) -> None:
    flag, kind = f"--{name.replace('_', '-')}", SETTINGS[name]
    several = typing.get_origin(kind) in (tuple, dict)

    @FEW
    @given(wrong_words(kind))
    def refused(words: list[str]) -> None:
        argv = [flag, *words] if several else [f"{flag}={words[0]}"]
        check([flag, shortened(words if several else words[0])], told(load, argv))

    refused()


IMPOSSIBLE = {
    int: ("-1000000", "1" + "0" * 30),
    float: ("nan", "inf", "-inf", "-1e300", "1e999"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_impossible_numbers_for_every_numeric_setting(name: str) -> None:
    kind = NUMBERS[name]
    for text in IMPOSSIBLE[kind]:
        line = told(load, [f"--{name.replace('_', '-')}={text}"])
        assert name in line or name.replace("_", "-") in line
        assert text in line or str(kind(text)) in line


# Recipes, and host files, which are YAML too.

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


# Plans, and the host files of DeepSpeed that they read.

HOSTFILES: list[tuple[bytes | None, list[str]]] = [
    (None, ["No such file"]),
    (b"", ["no host"]),
    (b"# node1 slots=2\n\n", ["no host"]),
    (b"node1\n", ["'node1'"]),
    (b"node1 slots=\n", ["'node1 slots='"]),
    (b"node1 slots=0\n", ["'node1 slots=0'"]),
    (b"node1 slots=-1\n", ["'node1 slots=-1'"]),
    (b"node1 slots=two\n", ["'node1 slots=two'"]),
    (b"node1 slots=1.5\n", ["'node1 slots=1.5'"]),
    (b"node1 slots = 2\n", ["'node1 slots = 2'"]),
    (b"slots=2\n", ["'slots=2'"]),
    (b"node1 slots=2 slots=3\n", ["'node1 slots=2 slots=3'"]),
    (b"node1 slots=2\nnode1 slots=2\n", ["'node1 slots=2'", "second time"]),
    (b"node1 slots=999999\n", ["999999", "100000"]),
    (b"node1 slots=" + b"9" * 5000, ["'node1 slots=999"]),
    (b"node1 slots=\xd9\xa1\n", ["node1 slots="]),
    (b"\x00\x01 slots=2\x02\n", ["\\x02"]),
    (b"\xff\xfe\n", ["UTF-8"]),
]


@pytest.mark.parametrize(("content", "parts"), HOSTFILES, ids=numbered(HOSTFILES))
def test_a_hostfile(tmp_path: Path, content: bytes | None, parts: list[str]) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_bytes(content)
    with untouched(tmp_path):
        check([str(path), *parts], told(plan, ["--plan", "--plan-hostfile", str(path)]))


PLANS: list[tuple[str, list[str]]] = [
    ("--plan-nodes 0", ["--plan-nodes is 0"]),
    ("--plan-nodes -1", ["--plan-nodes is -1"]),
    ("--plan-nodes 1.5", ["--plan-nodes", "'1.5'"]),
    ("--plan-nodes", ["--plan-nodes", "expected one argument"]),
    ("--plan-nodes 1000000000000", ["--plan-nodes is 1000000000000"]),
    ("--plan-gpus 1000000000000", ["--plan-gpus 1000000000000"]),
    ("--plan-gpus nan", ["--plan-gpus", "'nan'"]),
    ("--plan-link-gbits nan", ["--plan-link-gbits is nan"]),
    ("--plan-link-gbits 0", ["--plan-link-gbits is 0"]),
    ("--plan-link-gbits x", ["--plan-link-gbits", "'x'"]),
    ("--plan-link-efficiency 75", ["--plan-link-efficiency is 75"]),
    ("--plan-step-seconds inf", ["--plan-step-seconds is inf"]),
    ("--plan-step-seconds -1", ["--plan-step-seconds is -1"]),
    ("--plan-alphas", ["--plan-alphas", "at least one"]),
    ("--plan-alphas 0.1 x", ["--plan-alphas", "'x'"]),
    ("--plan-images 0", ["--plan-images is 0"]),
    ("--plan-images 1000000000000", ["epochs is 60", "10000000 steps"]),
    ("--plan-images 5", ["total_batch_size is 32", "5 images"]),
    ("--plan-classes -1", ["--plan-classes is -1"]),
    ("--plan-node 2", ["--plan-node", "--plan-nodes"]),
    ("--plan=yes", ["--plan", "'yes'"]),
    ("--plan-hostfile ~no-such-user/x", ["--plan-hostfile", "'~no-such-user/x'"]),
    ("--plan-hostfile /dev/zero", ["/dev/zero", "bytes"]),
    ("--plan-hostfile /tmp", ["/tmp", "Is a directory"]),
    ("--epochs 1000000", ["epochs is 1000000", "steps"]),
    ("--epoch 2", ["--epoch", "--epochs"]),
    ("--data flowers", ["data is 'flowers'", "--plan-images"]),
    ("--total-batch-size 33", ["total_batch_size is 33", "2 replicas"]),
    ("--physical-batch-size 3", ["physical_batch_size is 3", "16"]),
    ("--mixup 0.2 --physical-batch-size 1", ["physical_batch_size is 1", "mixup"]),
    ("--total-batch-size 4096 --physical-batch-size 8", ["4096", "1438 images"]),
    ("--steps-per-epoch 45", ["steps_per_epoch is 45", "44 steps"]),
    ("--model nothing", ["'nothing'"]),
    ("--resolution 7", ["model simplevit-digits", "7"]),
    ("--data imagenet", ["resolution is -1", "imagenet"]),
    ("--model resnet-digits --no-bn", ["bn is false"]),
    ("--resize-initial-scale 0.5", ["resize_initial_scale is 0.5", "simplevit-digits"]),
    ("--model resnet-digits --bn-batches 1", ["bn_batches is 1", "2 replicas"]),
    ("--ema 0.5 --sync easgd", ["ema is 0.5", "easgd"]),
    ("--sync-settings alpha=1", ["'alpha'", "sync average"]),
    ("--sync easgd --sync-settings alpha=x", ["alpha is 'x'"]),
    ("--sync easgd --sync-settings alpha=.nan", ["alpha is nan"]),
    ("--sync easgd --sync-settings =1", ["''", "easgd"]),
    ("--sync slowmo --sync-settings beta=2", ["'beta': 2"]),
    ("--sync average --sync-settings state_fields=[a]", ["state_fields", "'a'"]),
    ("--sync hierarchical", ["hierarchical", "group_size and global_every"]),
    ("--sync hierarchical --sync-settings group_size=0 global_every=1", ["group_size is 0"]),
]


@pytest.mark.parametrize(("flags", "parts"), PLANS, ids=[flags for flags, _ in PLANS])
def test_a_plan(tmp_path: Path, flags: str, parts: list[str]) -> None:
    with untouched(tmp_path):
        check(parts, told(plan, ["--plan", "--data-pth", str(tmp_path), *flags.split()]))


# Data.


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    settings = {"size": 8, "split": "test"}
    with redirect_stderr(io.StringIO()):
        write.write("digits", settings, folder)
    return folder


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)


def replaced_by_text(path: Path) -> None:
    path.write_text("text\n")


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def removed(path: Path) -> None:
    path.unlink()


def extended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES = [
    truncated,
    emptied,
    flipped_header,
    replaced_by_text,
    replaced_by_folder,
    removed,
    extended,
]


@pytest.mark.parametrize("name", ["train.beton", "dataset.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_data(digits: Path, tmp_path: Path, damage: Any, name: str) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    damage(folder / name)
    with untouched(tmp_path):
        for call in (checked, stored_side):
            line = told(call, folder / "train.beton", error=DataError)
            check([str(folder / name), "python -m data.write"], line)


# What is written in place of an entry of dataset.json; a dotted name is of an entry's entry.
ENTRIES: list[tuple[str, Any, list[str]]] = [
    ("name", 3, ["name is 3"]),
    ("settings", [], ["settings is []"]),
    ("classes", "abc", ["classes is 'abc'"]),
    ("classes", [1, 2], ["classes is [1, 2]"]),
    ("classes", None, ["classes is None"]),
    ("mean", [0.5], ["mean is [0.5]"]),
    ("mean", [0.5, 0.5, "x"], ["mean is [0.5, 0.5, 'x']"]),
    ("mean", [0.5, 0.5, float("nan")], ["mean is [0.5, 0.5, nan]"]),
    ("std", [0, 1, 1], ["std is [0, 1, 1]"]),
    ("std", 0.5, ["std is 0.5"]),
    ("files", [], ["cannot be read"]),
    ("files", {}, ["train.beton isn't described"]),
    ("files", {"train.beton": 3}, ["cannot be read"]),
    ("files.images", "many", ["images of 'train.beton' is 'many'"]),
    ("files.images", -1, ["images of 'train.beton' is -1"]),
    ("files.images", True, ["images of 'train.beton' is True"]),
    ("files.images", 7, ["train.beton", "inconsistent tables"]),
    ("files.bytes", 1.5, ["bytes of 'train.beton' is 1.5"]),
    ("files.bytes", 7, ["train.beton", "instead of 7"]),
    ("files.sha256", None, ["sha256 of 'train.beton' is None"]),
    ("files.sha256", "0" * 64, ["train.beton", "checksum"]),
    ("skipped", {"a": 1}, ["skipped is {'a': 1}"]),
    ("an\nextra", 1, ["cannot be read"]),
]


@pytest.mark.parametrize(("entry", "value", "parts"), ENTRIES, ids=numbered(ENTRIES))
def test_a_wrong_entry_of_a_description(
    digits: Path, tmp_path: Path, entry: str, value: Any, parts: list[str]
) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    content = json.loads((folder / "dataset.json").read_text())
    section, _, key = entry.partition(".")
    (content["files"]["train.beton"] if key else content)[key or section] = value
    (folder / "dataset.json").write_text(json.dumps(content))
    with untouched(tmp_path):
        line = told(stored_side, folder / "train.beton", error=DataError)
        check([str(folder), *parts], line)
    if entry not in ("files.bytes", "files.sha256", "files.images"):  # the plan opens no images
        line = told(plan, ["--plan", "--data-pth", str(tmp_path)])
        check([str(folder / "dataset.json")], line)


@pytest.mark.parametrize("key", ["name", "settings", "classes", "mean", "std", "files"])
def test_a_description_that_lacks_an_entry(digits: Path, tmp_path: Path, key: str) -> None:
    content = json.loads((digits / "dataset.json").read_text())
    del content[key]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content))
    check([str(path), repr(key)], told(Dataset.load, path, error=DataError))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", "\x00", "[" * 100_000])
def test_a_description_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(text)
    check([str(path)], told(Dataset.load, path, error=DataError))


def test_a_description_of_another_data_set(digits: Path, tmp_path: Path) -> None:
    with redirect_stderr(io.StringIO()):
        write.write("digits", {"size": 16, "split": "test"}, tmp_path / "other")
        shutil.copy(tmp_path / "other" / "train.beton", tmp_path / "train.beton")
    shutil.copy(digits / "dataset.json", tmp_path)
    line = told(checked, tmp_path / "train.beton", error=DataError)
    check([str(tmp_path / "train.beton"), "checksum"], line)


def test_settings_that_the_images_or_the_model_do_not_fit() -> None:
    config = load(["--total-batch-size", "64", "--physical-batch-size", "16"])
    check(["total_batch_size is 64", "3 replicas"], told(checks.with_fitting_batches, config, 3))
    check(["resolution is -1", "digits"], told(checks.with_resolution, config, None))
    long = load(["--steps-per-epoch", "9"])
    check(["steps_per_epoch is 9", "64 images"], told(checks.steps_per_epoch, long, 64))


# python -m data.write.

WRITES: list[tuple[str, list[str]]] = [
    ("", ["SOURCE"]),
    ("flowers --out OUT", ["'flowers'"]),
    ("digits", ["--out"]),
    ("digits --out", ["--out"]),
    ("digits --out=", ["--out", "''"]),
    ("digits --out OUT --unknown 1", ["--unknown"]),
    ("digits --out OUT --size x", ["--size", "'x'"]),
    ("digits --out OUT --size 1.5", ["--size", "'1.5'"]),
    ("digits --out OUT --size 0", ["size", "0"]),
    ("digits --out OUT --size -3", ["size", "-3"]),
    ("digits --out OUT --size 1000000", ["size", "1000000"]),
    ("digits --out OUT --split none", ["--split", "'none'"]),
    ("digits --out TMP/file", ["TMP/file"]),
    ("digits --out TMP/file/folder", ["TMP/file/folder"]),
    ("digits --out TMP/digits", ["TMP/digits", "--force"]),
    ("cifar10 --out OUT", ["--folder"]),
    ("cifar10 --out OUT --folder /no/folder", ["/no/folder"]),
    ("cifar10 --out OUT --folder TMP/file", ["TMP/file"]),
    ("cifar10 --out OUT --folder TMP/cifar-10-batches-py", ["test_batch"]),
    ("imagefolder --out OUT --folder /no/tree", ["/no/tree"]),
    ("imagefolder --out OUT --folder TMP/file", ["TMP/file"]),
    ("imagefolder --out OUT --folder TMP/digits", ["TMP/digits"]),
    ("imagefolder --out OUT --folder TMP/tree --quality 0", ["quality", "0"]),
    ("imagefolder --out OUT --folder TMP/tree --quality 101", ["quality", "101"]),
    ("imagefolder --out OUT --folder TMP/tree --quality x", ["--quality", "'x'"]),
    ("imagefolder --out OUT --folder TMP/tree --max-size 0", ["size", "0"]),
    ("imagefolder --out OUT --folder TMP/tree --max-size 5000", ["size", "5000"]),
    ("imagefolder --out OUT --folder TMP/tree --jpeg-share 2", ["share", "2"]),
    ("imagefolder --out OUT --folder TMP/tree --jpeg-share nan", ["share", "nan"]),
    ("imagefolder --out OUT --folder TMP/tree --jpeg-share 0.25 --mode raw", ["0.25", "raw"]),
    ("imagefolder --out OUT --folder TMP/tree --mode bmp", ["--mode", "'bmp'"]),
    ("imagefolder --out OUT --folder TMP/tree --workers 0", ["workers", "0"]),
    ("imagefolder --out OUT --folder TMP/tree --workers -1", ["workers", "-1"]),
    ("imagefolder --out OUT --folder TMP/tree --statistics none", ["--statistics", "'none'"]),
]


@pytest.mark.parametrize(("flags", "parts"), WRITES, ids=[flags for flags, _ in WRITES])
def test_what_cannot_be_written(digits: Path, tmp_path: Path, flags: str, parts: list[str]) -> None:
    shutil.copytree(digits, tmp_path / "digits")
    (tmp_path / "file").touch()
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    for part in ("train", "val"):
        (tmp_path / "tree" / part / "a").mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "tree" / part / "a/1.png")

    def filled(text: str) -> str:
        return text.replace("OUT", f"{tmp_path}/out").replace("TMP", str(tmp_path))

    errors = io.StringIO()
    with untouched(tmp_path), redirect_stderr(errors), redirect_stdout(io.StringIO()) as output:
        try:
            status = write.main([filled(word) for word in flags.split()])
        except SystemExit as stopped:
            status = stopped.code
    line = errors.getvalue()
    assert (status, output.getvalue()) == (2, "")
    assert line.count("\n") == 1 and line.endswith("\n"), line
    check([filled(part) for part in parts], line)


# --deepspeed_config.

RESTS_ON_DEEPSPEED = "DeepSpeed refuses it"
JSONS: list[tuple[Any, list[str]]] = [
    ("", ["not valid JSON"]),
    ("{", ["not valid JSON"]),
    ("{'a': 1}", ["not valid JSON"]),
    ("text", ["not valid JSON"]),
    (b"\xff{}", ["UTF-8"]),
    ("\ufeff{}", ["not valid JSON", "BOM"]),
    ("[" * 100_000, ["not valid JSON"]),
    ('{"aio":' * 50_000, ["not valid JSON"]),
    ('{"steps_per_print": NaN}', ["NaN"]),
    ('{"steps_per_print": 1, "steps_per_print": 2}', ["'steps_per_print'", "twice"]),
    ('{"aio": {"block_size": 1, "block_size": 2}}', ["'block_size'", "twice"]),
    ("[]", ["one JSON object", "[]"]),
    ("3", ["one JSON object", "3"]),
    ("null", ["one JSON object", "None"]),
    ('"text"', ["one JSON object", "'text'"]),
    ({"zero_optimization": {"stage": 1}}, ["stage is 1", "local optimizer"]),
    ({"zero_optimization": {"stage": 2}}, ["stage is 2"]),
    ({"zero_optimization": {"stage": 3}}, ["stage is 3"]),
    ({"zero_optimization": {"stage": "0"}}, ["stage is '0'"]),
    ({"zero_optimization": 3}, ["stage is 3"]),
    ({"zero_optimization": None}, ["stage is None"]),
    ({"zero_optimization": {"stage": 0, "x": 1}}, ["zero_optimization", "x", RESTS_ON_DEEPSPEED]),
    ({"zero_optimization": {"reduce_bucket_size": "x"}}, ["reduce_bucket_size", "'x'"]),
    ({"fp16": {"enabled": True}}, ["fp16 is {'enabled': True}", "precision"]),
    ({"bf16": {"enabled": True}}, ["bf16", "precision"]),
    ({"bf16": "x"}, ["bf16 is 'x'", "precision"]),
    ({"amp": {"enabled": True}}, ["amp", "precision"]),
    ({"train_batch_size": 64}, ["train_batch_size is 64", "total_batch_size"]),
    ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "clip_norm"]),
    ({"optimizer": {"type": "Adam"}}, ["optimizer is {'type': 'Adam'}"]),
    ({"scheduler": {"type": "WarmupLR"}}, ["scheduler is {'type': 'WarmupLR'}"]),
    ({"sequence_parallel_size": 2}, ["sequence_parallel_size is 2", "whole replica"]),
    ({"sequence_parallel_size": "1"}, ["sequence_parallel_size is '1'"]),
    ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel", "'autotp_size': 2"]),
    ({"pipeline": {"stages": 2}}, ["pipeline", "'stages': 2"]),
    ({"gradient_predivide_factor": 2.0}, ["gradient_predivide_factor is 2.0"]),
    ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op is 'sum'"]),
    ({"communication_data_type": "fp16"}, ["communication_data_type is 'fp16'"]),
    ({"datastates_ckpt": 4}, ["datastates_ckpt is 4", "itself"]),
    ({"nebula": {"enabled": True}}, ["nebula is {'enabled': True}", "itself"]),
    ({"steps_per_print": "x"}, ["steps_per_print is 'x'", "positive integer"]),
    ({"steps_per_print": 0}, ["steps_per_print is 0", "positive integer"]),
    ({"steps_per_print": 1.5}, ["steps_per_print is 1.5", "positive integer"]),
    ({"log_level": "x"}, ["log_level is 'x'", "debug"]),
    ({"log_level": 5}, ["log_level is 5", "debug"]),
    ({"wall_clock_breakdown": "no"}, ["wall_clock_breakdown is 'no'"]),
    ({"memory_breakdown": 7}, ["memory_breakdown is 7", "true or false"]),
    ({"dump_state": "x"}, ["dump_state is 'x'", "true or false"]),
    ({"checkpoint": 5}, ["checkpoint is 5"]),
    ({"checkpoint": {"tag_validation": "x"}}, ["tag_validation", "'x'"]),
    ({"timers": 3}, ["timers is 3"]),
    ({"timers": {"throughput": {"enabled": "q"}}}, ["timers", "'q'"]),
    ({"csv_monitor": {"enabled": "x"}}, ["csv_monitor", "'x'"]),
    ({"tensorboard": None}, ["tensorboard is None"]),
    ({"flops_profiler": [1]}, ["flops_profiler is [1]"]),
    ({"activation_checkpointing": {"profile": "x"}}, ["activation_checkpointing", "'x'"]),
    ({"aio": {"block_size": "x"}}, ["aio is {'block_size': 'x'}", "a number"]),
    ({"comms_logger": {"enabled": "x"}}, ["comms_logger", "'x'"]),
    ({"vocabulary_size": "x"}, ["vocabulary_size is 'x'"]),
    ({"eigenvalue": {"enabled": True}}, ["eigenvalue", RESTS_ON_DEEPSPEED]),
    ({"csv_monito": {}}, ["csv_monito is {}", "'csv_monitor'"]),
    ({"": 1}, ["'' is 1", "no such setting"]),
    ({"a\nb": 1}, ["'a\\nb' is 1", "no such setting"]),
]


@pytest.mark.parametrize(("content", "parts"), JSONS, ids=numbered(JSONS))
def test_a_deepspeed_json(tmp_path: Path, content: Any, parts: list[str]) -> None:
    path = tmp_path / "deepspeed.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = load(["--deepspeed_config", str(path)])
    with untouched(tmp_path):
        check([str(path), *parts], told(engine.deepspeed_settings, config, 1))


@pytest.mark.parametrize("path", ["/no/file.json", "/tmp", "/dev/zero"])
def test_no_deepspeed_json(path: str) -> None:
    check([path], told(engine.deepspeed_settings, load(["--deepspeed_config", path]), 1))


@pytest.mark.parametrize("optimizer", ["localadamw", "adamw"])
def test_what_a_template_says_and_means_nothing_is_taken(tmp_path: Path, optimizer: str) -> None:
    neutral = {
        "train_batch_size": None, "bf16": {"enabled": False}, "fp16": {"enabled": False},
        "gradient_clipping": 0, "zero_optimization": {"stage": 0}, "sequence_parallel_size": 1,
        "tensor_parallel": {"autotp_size": 1}, "gradient_predivide_factor": 1.0,
        "prescale_gradients": False, "communication_data_type": None, "steps_per_print": None,
        "gradient_allreduce_op": "mean", "elasticity": {"enabled": False}, "log_level": None,
    }  # fmt: skip
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(neutral | {"wall_clock_breakdown": True, "steps_per_print": 7}))
    config = load(["--deepspeed_config", str(path), "--optimizer", optimizer])
    settings = engine.deepspeed_settings(config, 1)
    assert settings["wall_clock_breakdown"] is True and settings["steps_per_print"] == 7
    assert settings["train_batch_size"] == config.total_batch_size


SCALARS = ("memory_breakdown", "disable_allgather", "zero_allow_untested_optimizer", "dump_state")


@pytest.mark.parametrize("key", SCALARS)
def test_generated_values_for_switches_of_deepspeed(tmp_path: Path, key: str) -> None:
    path = tmp_path / "deepspeed.json"
    config = load(["--deepspeed_config", str(path)])
    wrong = st.none() | st.integers() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)

    @FEW
    @given(wrong)
    def refused(value: Any) -> None:
        path.write_text(json.dumps({key: value}))
        line = told(engine.deepspeed_settings, config, 1)
        check([str(path), f"{key} is {shortened(value)}: "], line)

    refused()


def test_there_are_enough_of_them() -> None:
    counted = {
        "flags": len(FLAGS) + len(SETTINGS) + len(NUMBERS),
        "recipes": len(NO_YAML) + len(RECIPES) + len(SETTINGS) + 2,
        "host files": len(NO_YAML) + len(SETTINGS) - len(HOST_KEYS) + 1,
        "hostfiles": len(HOSTFILES),
        "plans": len(PLANS),
        "data": 2 * len(DAMAGES) + len(ENTRIES) + 6 + 8 + 4,
        "data.write": len(WRITES),
        "DeepSpeed's JSON": len(JSONS) + 3 + len(SCALARS),
    }
    assert sum(counted.values()) >= 200, counted
    by_hand = (FLAGS, NO_YAML, RECIPES, HOSTFILES, PLANS, ENTRIES, WRITES, JSONS)
    assert sum(map(len, by_hand)) >= 200
    assert min(counted.values()) >= 15, counted
