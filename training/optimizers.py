"""The optimizer that a config asks for: local, or data-parallel with the same face."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from localopt import LayoutMismatchError, LocalOptimizer, Period, Rule, Traffic
from localopt.buffers import Buffers
from localopt.collective import Collective

from . import named
from .config import PERIOD_TAKES, Config
from .engine import ReplicaOptimizer
from .lr import Schedule
from .values import ConfigError, about, converted, shortened


def build(config: Config, model: nn.Module, schedule: Schedule) -> ReplicaOptimizer:
    """The optimizer of ``config`` over all of ``model``'s parameters. Collective if local."""
    inner = _inner(config, model)
    if not config.local:
        return DataParallel(inner, model)
    try:
        return LocalOptimizer(
            inner, period(config, schedule), rule(config),
            model=model, buffers=config.buffers, track_drift=config.track_replicas,
        )  # fmt: skip
    except LayoutMismatchError:
        raise
    except ValueError as error:  # what a rule can only know with the number of replicas
        raise ConfigError(f"sync {config.sync}: {error}") from None


def _inner(config: Config, model: nn.Module) -> Optimizer:
    named = list(model.named_parameters())
    # Fused: one kernel for all parameters; on a CPU two to six times as fast as torch's default.
    if config.optimizer.endswith("sgd"):
        return SGD(
            named, lr=config.max_lr, momentum=config.momentum, nesterov=config.nesterov,
            weight_decay=config.wd, fused=True,
        )  # fmt: skip
    return AdamW(
        named, lr=config.max_lr, betas=(config.beta1, config.beta2), eps=config.eps,
        weight_decay=config.wd, fused=True,
    )  # fmt: skip


def check(config: Config) -> None:
    """Refuse settings that the rule or the period does not take, before anything waits for them."""
    if config.local:
        rule(config)
        period(config)


def takes(config: Config, setting: str) -> bool:
    """Whether the period asks for that setting of the program."""
    return setting in _ours(named.parameters(config.maker("period"))).values()


def period(config: Config, schedule: Schedule | None = None) -> Period:
    """The period of ``config``, clamped to the end of the run; without ``schedule`` for a look.

    Raises:
        ConfigError: if it has no such setting, or does not take its value, or lacks what every
            period has.
    """
    make = config.maker("period")
    common = {
        "total_steps": 1 if schedule is None else max(1, schedule.total_steps),
        "h_max": None if config.h_max == -1 else config.h_max,
        "warmup_steps": 0 if schedule is None else schedule.warmup_steps,
    }
    known = named.parameters(make)
    further = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(make).parameters.values())
    if not_taken := [name for name in common if name not in known and not further]:
        raise ConfigError(
            f"period {config.period}: it does not take {' and '.join(not_taken)}, which every "
            "period is given"
        )
    ours = _ours(known)
    given = {
        name: getattr(config, setting)
        for name, setting in ours.items()
        if not config.leaves_to_period(setting, known[name])
    }
    made = _made(config, "period", ours | {name: name for name in common}, given | common)
    for name in ("rounds", "base_h"):
        if getattr(type(made), name) is getattr(Period, name):
            raise ConfigError(f"period {config.period}: it does not define {name}")
    return made


def _ours(parameters: Mapping[str, Parameter]) -> dict[str, str]:
    """Of what a period takes the settings of the program: their names there."""
    return {name: setting for name, setting in PERIOD_TAKES.items() if name in parameters}


def rule(config: Config) -> Rule:
    """The rule of ``config``.

    Raises:
        ConfigError: if it has no such setting, or does not take its value, or the run's other
            settings do not go with it.
    """
    made = _made(config, "sync")
    if config.ema and not made.agrees:
        raise ConfigError(
            f"ema is {config.ema}: with sync {config.sync} replicas never agree, so there is no "
            "synchronised model to average"
        )
    return made


def _made(
    config: Config,
    setting: Literal["period", "sync"],
    elsewhere: Mapping[str, str] = MappingProxyType({}),
    values: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """What a setting names, made with the settings that the recipe has for it.

    ``elsewhere`` names what it takes that the program has settings for, whose ``values`` it gets.
    """
    make, key, name = config.maker(setting), f"{setting}_settings", getattr(config, setting)
    parameters = named.parameters(make)
    own = [parameter for parameter in parameters if parameter not in elsewhere]
    settings = {}
    with about(f"{setting} {name}"):
        types = named.types(make)
    for given, value in getattr(config, key).items():
        if given in elsewhere:
            raise ConfigError(f"{key} has {given!r}: set {elsewhere[given]} instead")
        if given not in own:
            raise ConfigError(
                f"{key} has {given!r}: {setting} {name} has {', '.join(own) or 'no settings'}"
            )
        with about(f"{key}: {given} is {value!r}"):
            settings[given] = _fitting(value, types.get(given, Any))
    missing = [n for n in own if parameters[n].default is Parameter.empty and n not in settings]
    if missing:
        raise ConfigError(f"{key}: {setting} {name} needs {' and '.join(missing)}")
    if setting == "sync":
        _check_state_fields(config, settings)
    where = f"{key} {getattr(config, key)}" if settings else f"{setting} {name}"
    try:
        made = make(**values, **settings)
    except (ValueError, TypeError) as error:  # the latter of a class that lacks a method
        raise ConfigError(f"{where}: {named.one_line(error)}") from None
    base = named.base_of(setting)
    if not isinstance(made, base):
        raise ConfigError(f"{setting} {name}: it made {shortened(made)}, no {base.__name__}")
    return made


def _fitting(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, where it is one of the types that YAML has; ValueError if it is none.

    What is of another type the rule or the period gets as it is, to judge for itself.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if value is None and NoneType in arguments:
        return None
    if origin in (UnionType, Union):
        return _fitting_one_of(value, [kind for kind in arguments if kind is not NoneType])
    if origin in (Sequence, list):
        kind, origin, arguments = tuple[arguments[0], ...], tuple, (arguments[0], Ellipsis)
    scalars = (bool, int, float, str, Ellipsis)
    known = kind in scalars or origin is Literal
    known = known or (origin is tuple and all(argument in scalars for argument in arguments))
    return converted(value, kind) if known else value


def _fitting_one_of(value: Any, kinds: Sequence[Any]) -> Any:
    """``value`` as the first of ``kinds`` that it can be; ValueError as the first of them says."""
    errors = []
    for kind in kinds:
        try:
            return _fitting(value, kind)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _check_state_fields(config: Config, settings: dict[str, Any]) -> None:
    """Refuse names that the inner optimizer's state will not have."""
    if config.optimizer == "localsgd":
        known = ("momentum_buffer",) if config.momentum else ()
    else:
        known = ("exp_avg", "exp_avg_sq")
    for key in ("state_fields", "reset_fields"):
        for name in settings.get(key) or ():
            if name not in known:
                raise ConfigError(
                    f"sync_settings: {key} names {name!r}: the state of {config.optimizer} has "
                    f"{', '.join(known) or 'nothing to average'}"
                )


class DataParallel:
    """Data-parallel training with a local optimizer's face: every step is a round of H = 1.

    The engine averages the gradients; this counts what that costs.

    Attributes:
        inner: the torch optimizer.
        synced, h, round, traffic, drift, report: as for `LocalOptimizer`.
    """

    synced = True
    h = 1
    drift = None
    report = None

    def __init__(self, inner: Optimizer, model: nn.Module) -> None:
        self.inner = inner
        self.traffic = Traffic()
        self.round = 0
        self._collective = Collective()
        # It equalises the parameters that are no local optimizer's: all of them.
        self._buffers = Buffers(model, "keep", [])
        self._buffers.equalise(self._collective)
        self._numel = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def count_round(self, dtype: torch.dtype, seconds: float) -> None:
        """The gradients have been averaged as numbers of ``dtype``, which took ``seconds``."""
        m = self._collective.world_size
        self.round += 1
        self.traffic.syncs += 1
        self.traffic.bytes += 2 * (m - 1) * self._numel * dtype.itemsize // m
        self.traffic.exposed += seconds

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self.inner.param_groups

    def period(self, step: int, lr: float) -> int:
        """Gradients are averaged at every step."""
        return 1

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """The replicas are equal; buffers are restored on exit."""
        saved = self._buffers.snapshot()
        try:
            yield
        finally:
            with torch.no_grad():
                self._buffers.restore(saved)

    def start_at(self, step: int) -> None:
        """No round depends on it."""

    def finish(self) -> None:
        """Nothing is open."""

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and what was counted."""
        counted = {"round": self.round, "traffic": vars(self.traffic).copy()}
        return {**self.inner.state_dict(), "data_parallel": counted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.inner.load_state_dict(state_dict)
        counted = state_dict["data_parallel"]
        self.round, self.traffic = counted["round"], Traffic(**counted["traffic"])
