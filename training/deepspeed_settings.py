"""DeepSpeed's settings: those of the run, and what the user's JSON may add."""

from __future__ import annotations

import collections
import json
import logging
from typing import Any

import torch

from . import distributed
from .config import Config
from .engine import AUTOCAST
from .settings import text_of
from .values import ConfigError, about, absolute, did_you_mean, shortened

if not torch.accelerator.is_available():
    # With this DeepSpeed does not search for accelerators, and does not warn that there is none.
    distributed.set_default("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.config_utils import DeepSpeedConfigObject
from deepspeed.utils.logging import log_levels

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Compiling DeepSpeed's shared-memory collective takes a minute, and only inference uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# By setting of the recipe: what DeepSpeed has for it.
_OURS = {
    "total_batch_size": ("train_batch_size", "elasticity"),
    "physical_batch_size": (
        "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "managed_gradient_accumulation",
    ),
    "precision": ("bf16", "fp16", "bfloat16", "amp", "torch_autocast"),
    "clip_norm": ("gradient_clipping",),
    "optimizer": ("optimizer",), "scheduler": ("scheduler",), "compile": ("compile",),
}  # fmt: skip


def settings_of(config: Config, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, and what the user's JSON adds.

    Raises:
        ConfigError: if the JSON cannot be read, or sets what the run itself decides.
    """
    settings: dict[str, Any] = {
        "train_batch_size": config.total_batch_size,
        "train_micro_batch_size_per_gpu": config.physical_batch_size,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed's default of 1.0 would clip by an all-reduced norm at every step.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        # "bf16" would wrap the optimizer around copies of the weights that averaging misses.
        "torch_autocast": {
            "enabled": config.precision in AUTOCAST,
            "dtype": "float16" if config.precision == "fp16" else "bfloat16",
        },
        "steps_per_print": None,
        # It would synchronise the device twice in every micro-step.
        "timers": {"throughput": {"enabled": False}},
    }
    return _merged(settings, _user_json(config)) if config.deepspeed_config else settings


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """``theirs`` on top of ``ours``, section by section."""
    merged = ours | theirs
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], dict) and isinstance(theirs[key], dict):
            merged[key] = _merged(ours[key], theirs[key])
    return merged


def _user_json(config: Config) -> dict[str, Any]:
    path = absolute(config.deepspeed_config)
    with about(f"deepspeed_config {path}"):
        content = _from_json(text_of(path))
        for name, keys in _OURS.items():
            _take_out(content, dict.fromkeys(keys, f"it is the recipe's: set {name} there"))
        _check_stage(config, content.get("zero_optimization", {}))
        _take_out(content, _SPLITS | _SAVES | (_REDUCES if config.local else {}))
        _check_values(content)
    return content


def _from_json(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = collections.Counter(key for key, _ in pairs)
        if keys and keys.most_common(1)[0][1] > 1:
            raise ConfigError(f"key {shortened(keys.most_common(1)[0][0])} is given twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ConfigError(f"not valid JSON: {constant} is no number")

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"it must hold one JSON object, not {shortened(content)}")
    return content


def _take_out(content: dict[str, Any], reasons: dict[str, str]) -> None:
    """Remove sections that are switched off, as templates often have them; refuse the others."""
    for key, reason in reasons.items():
        section = content.pop(key, None)
        off = isinstance(section, dict) and section.get("enabled") is False
        if section and not off and section not in _NEUTRAL.get(key, ()):
            raise ConfigError(f"{key} is {shortened(section)}: {reason}")


def _check_stage(config: Config, zero: Any) -> None:
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage != 0:
        reason = (
            "a local optimizer needs all parameters and their optimizer state on every replica"
            if config.local
            else "this program saves and evaluates whole replicas"
        )
        raise ConfigError(f"zero_optimization.stage is {shortened(stage)}: {reason}; use stage 0")


class _Asked(dict[str, Any]):
    """A dictionary that remembers what it was asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.names: set[Any] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.names.add(key)
        return super().__contains__(key)


def _check_values(content: dict[str, Any]) -> None:
    """Show DeepSpeed each key now: it passes over unknown ones, and finds some wrong types late."""
    least = {"train_micro_batch_size_per_gpu": 1}
    standard = deepspeed.DeepSpeedConfig(_Asked(least))
    for key, value in content.items():
        name = key if key.isprintable() and key else repr(key)
        asked, wrong = _Asked({**least, key: value}), f"{name} is {shortened(value)}: "
        try:
            given = deepspeed.DeepSpeedConfig(asked)
        except Exception as error:  # what it makes of this value: without it there was none
            reason = " ".join(str(error).split())
            raise ConfigError(f"{wrong}DeepSpeed refuses it: {reason[:300]}") from None
        if key not in asked.names:
            hint = did_you_mean(key, asked.names)
            raise ConfigError(f"{wrong}DeepSpeed has no such setting{hint}")
        if misfit := _misfit(key, standard, given):
            raise ConfigError(f"{wrong}{misfit}")
        if key == "steps_per_print" and value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{wrong}it must be a positive integer, or null for none")
        if key == "log_level" and value not in (None, *log_levels):
            raise ConfigError(f"{wrong}it must be one of {', '.join(log_levels)}")


def _misfit(name: str, standard: Any, given: Any) -> str | None:
    """Where a value is of another kind than the one that DeepSpeed takes if none is given."""
    if isinstance(standard, bool):
        return None if isinstance(given, bool) else f"{name} must be true or false"
    if isinstance(standard, int | float):
        fits = isinstance(given, int | float) and not isinstance(given, bool)
        return None if fits else f"{name} must be a number"
    if isinstance(standard, deepspeed.DeepSpeedConfig | DeepSpeedConfigObject):
        standard, given = vars(standard), vars(given)
    if type(standard) is dict and isinstance(given, dict):
        found = (_misfit(key, standard[key], given[key]) for key in standard.keys() & given.keys())
        return next(filter(None, found), None)
    return None


# What is said of each where a template has it, and nothing changes.
_NEUTRAL = {
    "sequence_parallel_size": [1],
    "gradient_predivide_factor": [1],
    "gradient_allreduce_op": ["mean"],
    "tensor_parallel": [{"autotp_size": 0}, {"autotp_size": 1}],
}
_SPLITS = dict.fromkeys(
    ("tensor_parallel", "sequence_parallel_size", "pipeline", "hybrid_engine"),
    "every rank is a whole replica with images of its own; leave it out",
)
_SAVES = dict.fromkeys(
    ("nebula", "datastates_ckpt"),
    "this program saves its checkpoints itself; leave it out",
)
_REDUCES = dict.fromkeys(
    (
        "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
        "gradient_allreduce_op", "sparse_gradients", "fp32_allreduce",
    ),
    "it is about the all-reduce of gradients, and a local optimizer makes none; leave it out",
)  # fmt: skip
