"""Flags that cannot be are refused in one line that names them."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.refusals import FEW, SETTINGS, check, converts, numbered, told, untouched
from training.settings import load
from training.values import _BOOLS, shortened

NUMBERS = {name: kind for name, kind in SETTINGS.items() if kind in (int, float)}
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
    (
        ["--alpha", "0", "--optimizer", "localsgd", "--max-lr", "0.8"],
        ["alpha is 0.0", "such as 0.248, 0.31 times max_lr (0.8)"],
    ),
    (
        ["--alpha", "0", "--optimizer", "localadamw", "--max-lr", "0.008"],
        ["alpha is 0.0", "such as 0.0176, 2.2 times max_lr (0.008)"],
    ),
    (["--period", "swap"], ["switch_step is -1", "swap"]),
    (["--period", "power", "--power", "0"], ["power is 0.0"]),
    (["--switch-step", "-5"], ["switch_step is -5"]),
    (["--nesterov", "--momentum", "0"], ["nesterov is true", "momentum, not 0"]),
    (["--momentum", "1"], ["momentum is 1"]),
    (["--gamma", "1e308"], ["gamma is 1e+308"]),
    (["--randaugment-depth", "1000000000"], ["randaugment_depth is 1000000000"]),
    (["--label-skew", "1e-9"], ["label_skew is 1e-09"]),
    (["--crop-padding", "4", "--crop-scale", "0.5", "1"], ["crop_scale", "crop_padding 4"]),
    (["--optimizer", "adamw", "--sync", "diloco"], ["--sync is 'diloco'", "localadamw"]),
    (["--optimizer", "sgd", "--period", "constant"], ["--period is 'constant'", "localsgd"]),
    (["--sync-settings", "lr"], ["--sync-settings is ['lr']", "NAME=VALUE, such as lr=0.7"]),
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


@pytest.mark.parametrize(("argv", "parts"), FLAGS, ids=numbered(FLAGS))
def test_a_flag(tmp_path: Path, argv: list[str], parts: list[str]) -> None:
    places = ["--data-pth", str(tmp_path / "data"), "--log-pth", str(tmp_path / "runs")]
    with untouched(tmp_path):
        check(parts, told(load, [*places, *argv]))


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
    if kind is bool or bool in arguments:
        return st.tuples(text.filter(lambda w: w.lower() not in (*_BOOLS, "auto"))).map(list)
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
