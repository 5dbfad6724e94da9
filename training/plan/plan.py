"""``main.py --plan``: what a run would synchronise, send and wait for, before it is started.

It reads the flags and the recipe as the run does, asks the run's own schedule and period for all
rounds, and starts no process group, opens no images and needs no GPU. `cost` does the reckoning,
`report` makes a text of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.dataset import DESCRIPTION, TRAIN, DataError, Dataset

from ..config import (
    DEFAULT_RECIPE,
    Config,
    ConfigError,
    absolute,
    checked_path,
    converted,
    load,
    shortened,
    text_of,
)
from ..lr import Schedule

# What imports torch is imported where it is needed: a wrong flag should not wait for it.
if TYPE_CHECKING:
    from torch import nn

    from .cost import Scenario


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


@dataclass(frozen=True)
class Known:
    """A data set whose size is known without its files.

    Attributes:
        images: for training.
        classes: their number.
        resolution: pixels of a side, as stored; None where images differ.
    """

    images: int
    classes: int
    resolution: int | None


KNOWN = {
    "imagenet": Known(1_281_167, 1000, None),
    "cifar10": Known(50_000, 10, 32),
    "digits": Known(1_438, 10, 32),
}


@dataclass(frozen=True)
class Plan:
    """A run that has been thought through.

    Attributes:
        recipe: its file, as given.
        config: its settings.
        options: the plan's own.
        images, source: number of training images, and where that is from.
        nodes: the node of each rank.
        steps_per_epoch: optimizer steps in an epoch.
        schedule: its learning rate.
        parameters: their number.
        scenarios: by name, the ways to synchronise that are compared.
        chosen: the name of the run's own.
    """

    recipe: str
    config: Config
    options: Options
    images: int
    source: str
    nodes: list[int]
    steps_per_epoch: int
    schedule: Schedule
    parameters: int
    scenarios: dict[str, Scenario]
    chosen: str

    @property
    def bandwidth(self) -> float:
        """Bytes per second through a node's link."""
        return self.options.link_gbits * 1e9 / 8 * self.options.link_efficiency

    def exposed(self, scenario: Scenario) -> float | None:
        """Seconds of waiting over the run; None inside one node, whose links are not modelled."""
        if self.nodes[-1] == 0 and len(self.nodes) > 1:
            return None
        return scenario.exposed(self.bandwidth, self.options.step_seconds)

    def seconds(self, scenario: Scenario) -> float | None:
        """Seconds of the run, without evaluation; None where a part is unknown."""
        exposed, step_seconds = self.exposed(scenario), self.options.step_seconds
        if exposed is None or step_seconds is None:
            return None
        return self.schedule.total_steps * step_seconds + exposed


def help_text() -> str:
    """The plan's own flags, for the end of ``main.py --help``."""
    return _parser().format_help()


def plan(argv: Sequence[str]) -> Plan:
    """Think a run through.

    Args:
        argv: the arguments after the program's name, ``--plan`` among them.

    Raises:
        ConfigError: for whatever the run itself would refuse before it needs data, other replicas
            or DeepSpeed, and for a wrong flag of the plan's own.
        SystemExit: for ``--help``.
    """
    options, rest, recipe = _parse(argv)
    config = load(rest)
    from .. import checks, optimizers
    from . import cost

    nodes = _nodes(options)
    config = checks.with_fitting_batches(config, len(nodes))
    data, source = _data_set(config, options)
    if data.images < config.total_batch_size:
        raise ConfigError(
            f"total_batch_size is {config.total_batch_size}: {config.data} has {data.images} images"
        )
    steps_per_epoch = checks.steps_per_epoch(config, data.images)
    schedule = Schedule.of(config, steps_per_epoch)
    if schedule.total_steps > _MOST_STEPS:
        raise ConfigError(
            f"epochs is {config.epochs}: of {steps_per_epoch} steps each, more than the "
            f"{_MOST_STEPS} steps in all that a plan goes through"
        )
    optimizers.check(config)  # a wrong setting should be named before a model is built
    config = checks.with_resolution(config, data.resolution)
    model = _model(config, data.classes)
    checks.check_model(config, model, len(nodes))
    return Plan(
        recipe=recipe,
        config=config,
        options=options,
        images=data.images,
        source=source,
        nodes=nodes,
        steps_per_epoch=steps_per_epoch,
        schedule=schedule,
        parameters=sum(p.numel() for p in model.parameters()),
        scenarios={
            name: cost.scenario(variant, schedule, model, nodes)
            for name, variant in _variants(config, options.alphas).items()
        },
        chosen=_name(config),
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        usage=argparse.SUPPRESS,
        add_help=False,
        allow_abbrev=False,
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


def _parse(argv: Sequence[str]) -> tuple[Options, list[str], str]:
    """The plan's own flags, those of the run, and the recipe."""
    known, rest = _parser().parse_known_args(list(argv))
    given = vars(known)
    ours = [_dashed(f.name) for f in fields(Options)]
    for word in rest:
        if word.startswith("--plan"):
            flag = word.split("=")[0]
            close = difflib.get_close_matches(flag, ours, n=1)
            raise ConfigError(
                f"unknown flag {flag if flag.isprintable() else repr(flag)}"
                + (f"; did you mean {close[0]}?" if close else "; see --help")
            )
    recipe = given.pop("recipe", None)
    if not given.pop("plan", False):
        raise ConfigError(f"{_dashed(next(iter(given)))}: it goes with --plan")
    kinds = {f.name: f.metadata["kind"] for f in fields(Options)}
    for name, value in given.items():
        try:
            given[name] = converted(value, kinds[name])
        except ValueError as error:
            raise ConfigError(f"{_dashed(name)} is {shortened(value)}: {error}") from None
    if recipe is not None:
        rest = ["--recipe-pth", recipe, *rest]
    return Options(**given), rest, recipe or DEFAULT_RECIPE


def _nodes(options: Options) -> list[int]:
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


_MOST, _MOST_STEPS = 100_000, 10_000_000  # replicas, and steps: a plan goes through all of them


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


def _data_set(config: Config, options: Options) -> tuple[Known, str]:
    """The data set's size, and where that is known from: the flags, its files, or `KNOWN`."""
    path = absolute(config.data_pth) / config.data / DESCRIPTION
    found, source = KNOWN.get(config.data), "as published"
    if path.exists():
        found, source = _described(path, found), DESCRIPTION
    images = options.images or (found and found.images)
    classes = options.classes or (found and found.classes)
    if images is None or classes is None:
        raise ConfigError(
            f"data is {config.data!r}: {path} is missing and the name is not known; give "
            "--plan-images and --plan-classes"
        )
    source = "--plan-images" if options.images else source
    return Known(images, classes, found and found.resolution), source


def _described(path: Path, known: Known | None) -> Known:
    """What a data set's files say of it."""
    try:
        dataset = Dataset.load(path)
    except DataError as error:
        raise ConfigError(f"data: {error}") from None
    if TRAIN not in dataset.files:
        raise ConfigError(f"data: {path} does not describe {TRAIN}")
    images = dataset.files[TRAIN].images
    size = dataset.settings.get("size")
    resolution = size if isinstance(size, int) else known and known.resolution
    return Known(images, len(dataset.classes), resolution)


def _model(config: Config, classes: int) -> nn.Module:
    """The run's model, with shapes and no numbers where it can be built so."""
    import torch

    from .. import models

    def made() -> nn.Module:
        return models.build(
            config.model,
            classes=classes,
            resolution=config.resolution,
            seed=config.init_model_by_seed,
            blurpool=config.blurpool,
            squeeze_excite=config.squeeze_excite,
        )

    try:
        with torch.device("meta"):
            return made()
    except (NotImplementedError, RuntimeError):  # its initialisation reads what it has written
        return made()


def _variants(config: Config, alphas: Sequence[float]) -> dict[str, Config]:
    """The ways to synchronise that are compared, by name; the run's own among them."""
    from .. import optimizers

    kind = config.optimizer.removeprefix("local")
    local: dict[str, Any] = {"optimizer": f"local{kind}"}
    parallel = dataclasses.replace(config, optimizer=kind, buffers="keep", track_replicas=False)
    constant = dataclasses.replace(config, **local, period="constant", period_settings={})
    own, grows = [config], optimizers.takes(config, "alpha")
    if config.local and grows:
        own, alphas = [], [*alphas, config.alpha]
    local |= {} if grows else {"period": "qsr", "period_settings": {}}
    growing = [dataclasses.replace(config, **local, alpha=alpha) for alpha in sorted(alphas)]
    return {_name(variant): variant for variant in (parallel, constant, *own, *growing)}


def _name(config: Config) -> str:
    from .. import optimizers

    return str(optimizers.period(config)) if config.local else "data-parallel"
