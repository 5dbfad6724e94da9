"""The optimizer that a config asks for: local, or data-parallel with the same face."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from localopt import (
    QSR,
    SWAP,
    Constant,
    LayoutMismatchError,
    LocalOptimizer,
    Period,
    PostLocal,
    PowerRule,
    Rule,
    Traffic,
)
from localopt.buffers import Buffers
from localopt.collective import Collective
from localopt.sync import RULES

from .config import Config, ConfigError, converted
from .lr import Schedule


def build(config: Config, model: nn.Module, schedule: Schedule) -> LocalOptimizer | DataParallel:
    """The optimizer of ``config`` over all of ``model``'s parameters. Collective if local."""
    inner = _inner(config, model)
    if not config.local:
        return DataParallel(inner, model)
    try:
        return LocalOptimizer(
            inner,
            period(config, schedule),
            rule(config),
            model=model,
            buffers=config.buffers,
            track_drift=config.track_replicas,
        )
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


def period(config: Config, schedule: Schedule) -> Period:
    """The period of ``config``, clamped to the end of the run."""
    common = {
        "total_steps": max(1, schedule.total_steps),
        "h_max": None if config.h_max == -1 else config.h_max,
        "warmup_steps": schedule.warmup_steps,
    }
    if config.period == "qsr":
        return QSR(config.alpha, config.h_base, **common)
    if config.period == "power":
        return PowerRule(config.alpha, config.h_base, config.power, **common)
    if config.period == "post-local":
        return PostLocal(config.switch_step, config.h_base, **common)
    if config.period == "swap":
        return SWAP(config.switch_step, **common)
    if config.period == "constant":
        return Constant(config.h_base, **common)
    raise ConfigError(f"period is {config.period!r}: no such period")


def rule(config: Config) -> Rule:
    """The rule of ``config``.

    Raises:
        ConfigError: if it has no such setting, or does not take its value, or the run's other
            settings do not go with it.
    """
    make = RULES[config.sync]
    known = inspect.signature(make).parameters
    kinds = get_type_hints(make.__init__ if isinstance(make, type) else make)
    settings = {}
    for name, value in config.sync_settings.items():
        if name not in known:
            raise ConfigError(
                f"sync_settings has {name!r}: sync {config.sync} has "
                f"{', '.join(known) or 'no settings'}"
            )
        try:
            settings[name] = _fitting(value, kinds[name])
        except ValueError as error:
            raise ConfigError(f"sync_settings: {name} is {value!r}: {error}") from None
    missing = [n for n, p in known.items() if p.default is p.empty and n not in settings]
    if missing:
        raise ConfigError(f"sync_settings: sync {config.sync} needs {' and '.join(missing)}")
    _check_state_fields(config, settings)
    try:
        made = make(**settings)
    except ValueError as error:
        raise ConfigError(f"sync_settings {config.sync_settings}: {error}") from None
    if config.ema and not made.agrees:
        raise ConfigError(
            f"ema is {config.ema}: with sync {config.sync} replicas never agree, so there is no "
            "synchronised model to average"
        )
    return made


def _fitting(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``: one of those that settings of rules have; ValueError if it is none."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:  # X | None
        return None if value is None else _fitting(value, arguments[0])
    return converted(value, tuple[arguments[0], ...] if origin is Sequence else kind)


def _check_state_fields(config: Config, settings: dict[str, Any]) -> None:
    """Refuse names that the inner optimizer's state will not have."""
    if config.optimizer == "localsgd":
        known = ("momentum_buffer",) if config.momentum else ()
    else:
        known = ("exp_avg", "exp_avg_sq")
    for key in ("state_fields", "reset_fields"):
        for name in settings.get(key, ()):
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
