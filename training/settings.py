"""Flags, recipe and host file -> one `Config`.

A flag overrides the recipe, which overrides the host's file, which overrides the defaults.
"""

from __future__ import annotations

import argparse
import difflib
import os
import socket
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, Literal

import yaml

from .config import DEFAULTS, FIELDS, HOST_KEYS, PERIOD_TAKES, TYPES, Config
from .loggers import LOGGERS
from .values import (
    ROOT,
    ConfigError,
    about,
    absolute,
    checked_path,
    converted,
    did_you_mean,
    shortened,
)  # fmt: skip

DEFAULT_RECIPE = "recipe/digits-vit-localadamw-qsr.yml"


def load(argv: Sequence[str], more_help: Callable[[], str] | None = None) -> Config:
    """Read the command line, its recipe and this host's file; ``--help`` ends with ``more_help``.

    Raises:
        ConfigError: for an unknown flag or key, a wrong type or an impossible value.
        SystemExit: for ``--help``.
    """
    flags = _parse(argv, more_help)
    recipe = _found(flags.pop("recipe_pth", DEFAULT_RECIPE), "--recipe-pth")
    default_host = ROOT / f".config_{socket.gethostname()}.yml"
    given_host = flags.pop("config_pth", None)
    settings: dict[str, Any] = {}
    if given_host is not None or default_host.exists():
        host = _found(str(default_host) if given_host is None else given_host, "--config-pth")
        settings |= _read(host, "host file", HOST_KEYS)
    settings |= _read_recipe(recipe)
    settings |= flags
    config = Config(**settings)
    if config.local:
        return config
    for name in ("period", "period_settings", "sync", "sync_settings"):
        if name in flags:  # a recipe may have them, for its data-parallel twin to be a flag away
            raise ConfigError(
                f"--{name.replace('_', '-')} is {shortened(flags[name])}: it is for local "
                f"optimizers, and {config.optimizer} averages gradients at every step; give "
                f"--optimizer local{config.optimizer} too"
            )
    return config


def recipe_of(argv: Sequence[str]) -> Path:
    """The recipe that the command line names, or the default one."""
    return _found(_parse(argv, None).get("recipe_pth", DEFAULT_RECIPE), "--recipe-pth")


def _found(path: str, flag: str) -> Path:
    """``path`` from the working directory, or from the repository if only there is such a file."""
    checked_path(path, flag)
    if not path:
        raise ConfigError(f"{flag} is empty: give a file")
    here = Path(path).expanduser()
    return here if here.exists() or not absolute(path).exists() else absolute(path)


class _Loader(yaml.SafeLoader):
    """YAML without what would surprise: a key given twice, and aliases, which can be bombs."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(f"alias *{self.peek_event().anchor}: write its value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConfigError(f"key {shortened(key.value)} is given twice")
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def from_yaml(text: str) -> Any:
    """What a text in YAML says, or ConfigError saying why it is none; safe for any text."""
    try:
        return yaml.load(text, _Loader)
    except ConfigError:
        raise
    # PyYAML has its own errors, and those of what it calls: a date or a number that cannot be, a
    # `!!bool x` that it does not find in a table, a depth that it cannot follow.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        raise ConfigError(f"not valid YAML{line}: {reason[:200]}") from None


def _read_recipe(path: Path, above: tuple[Path, ...] = (), what: str = "recipe") -> dict[str, Any]:
    """The settings of a recipe, on top of those of its ``base``, a recipe in the same folder."""
    settings = _read(path, what, ("base", *FIELDS))
    base = settings.pop("base", None)
    if base is None:
        return settings
    above = *above, Path(os.path.realpath(path))
    where = path.parent / base
    checked_path(str(where), f"recipe {path}: base")
    if Path(os.path.realpath(where)) in above:
        raise ConfigError(f"recipe {path}: base {base!r} leads back to it")
    return _read_recipe(where, above, f"recipe {path}: base") | settings


def _read(path: Path, what: str, allowed: Sequence[str]) -> dict[str, Any]:
    with about(f"{what} {path}"):
        content = from_yaml(text_of(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{what} {path}: it must hold `key: value` lines")
    settings = {}
    for key, value in content.items():
        if key not in allowed:
            hint = did_you_mean(key, allowed, cutoff=0.5) or f"; known are {', '.join(allowed)}"
            raise ConfigError(f"{what} {path}: unknown key {shortened(key)}{hint}")
        with about(f"{what} {path}: {key} is {shortened(value)}"):
            settings[key] = converted(value, str if key == "base" else TYPES[key])
    return settings


_LARGEST = 2**20  # bytes of a settings file: /dev/zero has no end


def text_of(path: Path) -> str:
    """The content of a settings file, or ConfigError saying why there is none."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ConfigError(f"more than {_LARGEST} bytes")
        return content.decode()
    except OSError as error:
        raise ConfigError(error.strerror) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not valid UTF-8 text: byte {error.start}") from None


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaints are a `ConfigError`; every command of the program uses it."""

    def __init__(self, *, more_help: Callable[[], str] | None = None, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._more_help = more_help

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; see --help")

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self._more_help()}" if self._more_help else "")

    def parse(
        self, argv: Sequence[str], kinds: Mapping[str, Any], prefix: str = "--"
    ) -> tuple[dict[str, Any], list[str]]:
        """The flags given, each of its kind, and the words left, none of which begins so."""
        known, rest = self.parse_known_args(list(argv))
        for word in rest:
            if word.startswith(prefix.rstrip("-")):
                raise ConfigError(self._unknown(word.split("=")[0]))
        flags = vars(known)
        for name in [name for name in flags if name in kinds]:
            with about(f"{prefix}{name.replace('_', '-')} is {shortened(flags[name])}"):
                flags[name] = converted(_mapped(flags[name], kinds[name]), kinds[name])
        return flags, rest

    def _unknown(self, flag: str) -> str:
        names = sorted({o for action in self._actions for o in action.option_strings})
        close = difflib.get_close_matches(flag, [n for n in names if "_" not in n], n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close and flag[2:] else "; see --help"
        # As it stands where it is plain: quotes would be part of what one types.
        shown = flag if flag.isprintable() and len(flag) < 100 else shortened(flag)
        return f"unknown flag {shown}{hint}"


def _mapped(value: Any, kind: Any) -> Any:
    """The words NAME=VALUE of a flag, whose values are YAML, as a mapping."""
    words = value if typing.get_origin(kind) is dict and isinstance(value, list) else [None]
    if not all(isinstance(word, str) and "=" in word for word in words):
        return value
    pairs = [word.partition("=") for word in words]
    names = [name for name, _, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    return {name: from_yaml(text) for name, _, text in pairs}


def _parser(more_help: Callable[[], str] | None) -> Parser:
    parser = Parser(
        more_help=lambda: _help_end(more_help),
        prog="main.py",
        usage="deepspeed --hostfile hostfile main.py [flags]",
        description="Train with few synchronisations. Flags override the recipe; a default below "
        "is what holds where neither says anything.",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    files = parser.add_argument_group("files")
    _add_text(files, "recipe_pth", "YAML", f"base settings (default {DEFAULT_RECIPE})")
    host = "this host's paths (default .config_{hostname}.yml, if there)"
    _add_text(files, "config_pth", "YAML", host)
    titles = dict.fromkeys(f.metadata["group"] for f in FIELDS.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    for name, f in FIELDS.items():
        _add_flag(groups[f.metadata["group"]], name, f)
    for name in LOGGERS:
        groups["records"].add_argument(
            f"--{name}", dest="loggers", action="append_const", const=name,
            help=f"the same as --loggers {name}; such flags add up",
        )  # fmt: skip
    # What deepspeed.add_config_arguments adds; the engine is always DeepSpeed's.
    groups["machine"].add_argument("--deepspeed", action="store_true", help="accepted, always on")
    for flag, options in (
        ("--deepscale", {"action": "store_true"}),
        ("--deepscale_config", {"dest": "deepspeed_config"}),
    ):
        groups["machine"].add_argument(flag, help=argparse.SUPPRESS, **options)
    return parser


def _add_text(group: Any, name: str, metavar: str, text: str) -> None:
    group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=text)
    group.add_argument(f"--{name}", help=argparse.SUPPRESS)


def _add_flag(group: Any, name: str, f: Field[Any]) -> None:
    kind = TYPES[name]
    origin = typing.get_origin(kind)
    switch = kind is bool or bool in typing.get_args(kind)
    options: dict[str, Any] = {"dest": name, "help": f"{f.metadata['help']} ({_default_text(f)})"}
    if origin is tuple:
        options["nargs"] = "*"  # `converted` knows how many, and names those it has got
    if origin is dict:
        options |= {"nargs": "*", "metavar": "NAME=VALUE"}
    elif switch:
        options |= {"nargs": "?", "const": True, "metavar": "BOOL"}
    elif origin is Literal:
        options["metavar"] = "{" + ",".join(typing.get_args(kind)) + "}"
    else:
        metavar = {int: "N", float: "X"}.get(typing.get_args(kind)[0] if origin is tuple else kind)
        options["metavar"] = metavar or "TEXT"
    dashed = name.replace("_", "-")
    group.add_argument(f"--{dashed}", **options)
    if dashed != name:
        group.add_argument(f"--{name}", **options | {"help": argparse.SUPPRESS})
    if switch:
        group.add_argument(
            f"--no-{dashed}", dest=name, action="store_false", help=argparse.SUPPRESS
        )


def _default_text(f: Field[Any]) -> str:
    default = DEFAULTS[f.name]
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    if default is None:
        default = "auto"
    return f"default {default}" if default not in ("", {}) else "default none"


def _parse(argv: Sequence[str], more_help: Callable[[], str] | None) -> dict[str, Any]:
    parser = _parser(more_help)
    if not {"-h", "--help"}.isdisjoint(argv):
        _name_choices(parser)
    flags, _ = parser.parse(argv, TYPES)
    for name in ("deepspeed", "deepscale"):
        flags.pop(name, None)
    return flags


def _help_end(more_help: Callable[[], str] | None) -> str:
    from . import named

    return "\n".join([named.settings_text(PERIOD_TAKES), *([more_help()] if more_help else [])])


def _name_choices(parser: Parser) -> None:
    """Let the help show the names of built-in rules and periods."""
    from . import named

    for action in parser._actions:
        if action.dest in named.KINDS and action.help is not argparse.SUPPRESS:
            names = [*named.names(action.dest), "module:Class"]
            action.metavar = "{" + ",".join(names) + "}"
