"""The plan's own flags, and the replicas that they ask for."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..settings import DEFAULT_RECIPE, Parser, text_of
from ..values import ConfigError, absolute, checked_path, shortened


def _flag(kind: Any, default: Any, text: str) -> Any:
    return field(default=default, metadata={"kind": kind, "help": text})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The plan's own flags, each ``--plan-`` and its name here."""

    nodes: int | None = _flag(int, None, "hosts (default: as many as the host file lists)")
    gpus: int | None = _flag(int, None, "replicas on each (default: the host file's slots)")
    hostfile: str = _flag(str, "hostfile", "DeepSpeed's host file (default hostfile)")
    images: int | None = _flag(int, None, "training images (default: the data set's)")
    classes: int | None = _flag(int, None, "classes (default: the data set's)")
    step_seconds: float | None = _flag(
        float, None, "seconds of a step without communication (default: unknown)"
    )
    link_gbits: float = _flag(float, 25.0, "a node's network in Gbit/s, each way (default 25)")
    link_efficiency: float = _flag(
        float, 0.75, "share of it that a synchronisation reaches (default 0.75)"
    )
    alphas: tuple[float, ...] = _flag(tuple[float, ...], (), "values of alpha to compare")

    def __post_init__(self) -> None:
        checked_path(self.hostfile, "--plan-hostfile")
        for f in fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not 0 < number < math.inf:
                    raise ConfigError(f"{_dashed(f.name)} is {number}: it must be positive")
        if self.link_efficiency > 1:
            raise ConfigError(
                f"--plan-link-efficiency is {self.link_efficiency}: it must be at most 1"
            )


def help_text() -> str:
    """The plan's own flags, for the end of ``main.py --help``."""
    return _parser().format_help()


def _parser() -> Parser:
    parser = Parser(
        usage=argparse.SUPPRESS,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--plan",
        action="store_true",
        help="say what the run would synchronise, send and wait for, and do not start it",
    )
    for f in fields(Options):
        many = "+" if f.default == () else None
        metavar = {int: "N", str: "FILE"}.get(f.metadata["kind"], "X")
        options = {"dest": f.name, "nargs": many, "metavar": metavar, "help": f.metadata["help"]}
        group.add_argument(_dashed(f.name), **options)
        group.add_argument(f"--plan_{f.name}", **options | {"help": argparse.SUPPRESS})
    for flag in ("--recipe-pth", "--recipe_pth"):  # to be named; the run's settings come from load
        group.add_argument(flag, dest="recipe", help=argparse.SUPPRESS)
    return parser


def _dashed(name: str) -> str:
    return f"--plan-{name.replace('_', '-')}"


def parse(argv: Sequence[str]) -> tuple[Options, list[str], str]:
    """The plan's own flags, those of the run, and the recipe."""
    kinds = {f.name: f.metadata["kind"] for f in fields(Options)}
    given, rest = _parser().parse(argv, kinds, "--plan-")
    recipe = given.pop("recipe", None)
    if not given.pop("plan", False):
        raise ConfigError(f"{_dashed(next(iter(given)))}: it goes with --plan")
    if recipe is not None:
        rest = ["--recipe-pth", recipe, *rest]
    return Options(**given), rest, recipe or DEFAULT_RECIPE


def nodes_of(options: Options) -> list[int]:
    """The node of each rank, as a launcher that goes host by host numbers them."""
    slots: list[int] = []
    if options.nodes is None or options.gpus is None:
        slots = slots_of(options.hostfile)
    if options.gpus is None and options.nodes is not None and len(set(slots)) > 1:
        raise ConfigError(
            f"--plan-nodes is {options.nodes}, but the hosts of {options.hostfile} differ in their "
            "slots: give --plan-gpus too"
        )
    if options.gpus is not None or options.nodes is not None:
        gpus, nodes = options.gpus or slots[0], options.nodes or len(slots)
        if gpus * nodes > _MOST:
            raise ConfigError(
                f"--plan-nodes is {nodes} and --plan-gpus {gpus}: more than {_MOST} replicas"
            )
        slots = [gpus] * nodes
    return [node for node, count in enumerate(slots) for _ in range(count)]


_MOST = 100_000  # replicas: a plan goes through all of them


def slots_of(hostfile: str) -> list[int]:
    """The slots of each host in DeepSpeed's host file; ConfigError where it is none."""
    path = absolute(hostfile)
    try:
        lines = text_of(path).splitlines()
    except ConfigError as error:
        raise ConfigError(f"hostfile {path}: {error}; give --plan-nodes and --plan-gpus") from None
    slots: dict[str, int] = {}
    for line in lines:
        line = line.partition("#")[0].strip()
        found = re.fullmatch(r"(\S+)\s+slots=0*([1-9]\d{0,5})", line, re.ASCII)
        if line and found is None:
            raise ConfigError(f"hostfile {path}: {shortened(line)} is not like `node1 slots=8`")
        if found and found[1] in slots:
            raise ConfigError(f"hostfile {path}: {shortened(line)} names {found[1]} a second time")
        if found:
            slots[found[1]] = int(found[2])
    if not slots:
        raise ConfigError(f"hostfile {path}: it lists no host; give --plan-nodes and --plan-gpus")
    if sum(slots.values()) > _MOST:
        raise ConfigError(f"hostfile {path}: {sum(slots.values())} slots, more than {_MOST}")
    return list(slots.values())
