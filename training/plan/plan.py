"""``main.py --plan``: what a run would synchronise, send and wait for, before it is started.

It reads the flags and the recipe as the run does, asks the run's own schedule and period for all
rounds, and starts no process group, opens no images and needs no GPU. `cost` does the reckoning,
`report` makes a text of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.dataset import DESCRIPTION, TRAIN, DataError, Dataset
from data.source import Known

from ..config import Config
from ..lr import Schedule
from ..settings import load
from ..values import ConfigError, absolute
from .options import Options, help_text, nodes_of, parse

# What imports torch is imported where it is needed: a wrong flag should not wait for it.
if TYPE_CHECKING:
    from torch import nn

    from .cost import Scenario

_MOST_STEPS = 10_000_000  # a plan goes through all of them


@dataclass(frozen=True)
class Plan:
    """A run that has been thought through."""

    recipe: str  # its file, as given
    config: Config
    options: Options
    images: int
    source: str  # where their number is from
    nodes: list[int]  # the node of each rank
    steps_per_epoch: int
    schedule: Schedule
    parameters: int  # their number
    scenarios: dict[str, Scenario]  # by name, the ways to synchronise that are compared
    chosen: str  # the name of the run's own

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


def plan(argv: Sequence[str]) -> Plan:
    """Think a run through, whose arguments have ``--plan`` among them.

    Raises:
        ConfigError: for whatever the run itself would refuse before it needs data, other replicas
            or DeepSpeed, and for a wrong flag of the plan's own.
        SystemExit: for ``--help``.
    """
    options, rest, recipe = parse(argv)
    config = load(rest, help_text)
    from .. import checks, optimizers
    from . import cost

    nodes = nodes_of(options)
    config = checks.with_fitting_batches(config, len(nodes))
    data, source = _data_set(config, options)
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
        recipe=recipe, config=config, options=options, images=data.images, source=source,
        nodes=nodes, steps_per_epoch=steps_per_epoch, schedule=schedule,
        parameters=sum(p.numel() for p in model.parameters()),
        scenarios={
            name: cost.scenario(variant, schedule, model, nodes)
            for name, variant in _variants(config, options.alphas).items()
        },
        chosen=_name(config),
    )  # fmt: skip


def _data_set(config: Config, options: Options) -> tuple[Known, str]:
    """The data set's size, and where that is known from: the flags, its files, or its kind."""
    from data import sources

    path = absolute(config.data_pth) / config.data / DESCRIPTION
    found, source = sources.known(config.data), "as published"
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
    return Known(config.data, images, classes, found and found.resolution), source


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
    return Known(dataset.name, images, len(dataset.classes), resolution)


def _model(config: Config, classes: int) -> nn.Module:
    """The run's model, with shapes and no numbers where it can be built so."""
    import torch

    from .. import models

    try:
        with torch.device("meta"):
            return models.of(config.as_dict(), classes)
    except (NotImplementedError, RuntimeError):  # its initialisation reads what it has written
        return models.of(config.as_dict(), classes)


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
