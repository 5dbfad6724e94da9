"""Flags, recipe and host file -> one frozen, validated Config.

A flag overrides the recipe, which overrides the host's file, which overrides the defaults below.
Every setting is a field of `Config`: its flag, its key in a recipe and its line in ``--help`` come
from there.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import os
import reprlib
import socket
import typing
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = "recipe/digits-vit-localadamw-qsr.yml"


class ConfigError(ValueError):
    """A setting that cannot be: one line that names it, its value and what to do."""


def _setting(default: Any, group: str, text: str) -> Any:
    metadata = {"group": group, "help": text}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one run. Lengths in epochs or optimizer steps as named."""

    # fmt: off
    data: str = _setting("digits", "data", "data set: the folder below data_pth with train.beton, val.beton")
    data_pth: str = _setting(".localopt/data", "data", "folder of data sets (host file)")
    resolution: int = _setting(-1, "data", "training and validation images are this many pixels square; -1: as the data set stores them, if all are alike")
    val_crop_ratio: float = _setting(0.875, "data", "validation: side of the centre crop over the shorter side; 224/256 does what resize 256, centre crop 224 does")
    label_skew: float = _setting(0.0, "data", "concentration of the Dirichlet distribution that each replica's own class mix is drawn from, smaller: more skewed; 0: replicas share the data evenly")
    nw: int = _setting(1, "data", "loader workers (threads) per replica")
    seed: int = _setting(0, "data", "seed of order, augmentation and dropout")

    crop_scale: tuple[float, float] = _setting((0.08, 1.0), "augmentation", "share of an image's area that a random crop keeps")
    crop_padding: int = _setting(0, "augmentation", "pad training images with so many black pixels on each side and crop their own size at random, instead of crop_scale; 0: do not")
    flip: bool = _setting(True, "augmentation", "mirror half of the training images")
    randaugment_depth: int = _setting(0, "augmentation", "RandAugment: operations on each training image; 0: none")
    randaugment_severity: float = _setting(9.0, "augmentation", "RandAugment: strength, up to 10")
    randaugment_operations: Literal["all", "safe", "original"] = _setting("all", "augmentation", "RandAugment: composer's set of operations")
    mixup: float = _setting(0.0, "augmentation", "Mixup: parameter of the Beta distribution; 0: none")
    label_smoothing: float = _setting(0.0, "augmentation", "label smoothing of the training loss")
    resize_initial_scale: float = _setting(1.0, "augmentation", "progressive resizing: images start at this share of the resolution; 1: none")
    resize_finetune_fraction: float = _setting(0.2, "augmentation", "progressive resizing: share of the run that ends it at full resolution")

    model: str = _setting("simplevit-digits", "model", "name of a model in training/models.py")
    init_model_by_seed: int = _setting(0, "model", "seed of the initial weights; -1: take them from resume_pth")
    precision: Literal["fp32", "bf16", "fp16"] = _setting("fp32", "model", "bf16, fp16: autocast, weights stay fp32; fp16 with loss scaling")
    compile: bool | None = _setting(None, "model", "torch.compile the model; auto: on a GPU, where the model gains by it")
    channels_last: bool = _setting(False, "model", "keep convolutions' weights in memory format channels_last")
    blurpool: bool = _setting(False, "model", "BlurPool: blur before strided convolutions and max pooling")
    squeeze_excite: bool = _setting(False, "model", "squeeze-and-excitation after wide convolutions")

    epochs: int = _setting(60, "length", "epochs to train")
    epochs_for_sche: int = _setting(-1, "length", "epochs the learning-rate schedule spans; -1: epochs")
    steps_per_epoch: int = _setting(-1, "length", "steps in an epoch; -1: all that the data gives")
    total_batch_size: int = _setting(64, "length", "images per step over all replicas")
    physical_batch_size: int = _setting(32, "length", "images per forward pass, at most; gradient accumulation follows")

    optimizer: Literal["sgd", "adamw", "localsgd", "localadamw"] = _setting("localadamw", "optimizer", "sgd and adamw: data-parallel")
    max_lr: float = _setting(1e-3, "optimizer", "peak learning rate")
    min_lr: float = _setting(1e-6, "optimizer", "rate at the start of the warm-up, and where cosine, linear and cosine-step end")
    momentum: float = _setting(0.9, "optimizer", "SGD momentum")
    nesterov: bool = _setting(False, "optimizer", "Nesterov momentum for SGD")
    wd: float = _setting(0.05, "optimizer", "weight decay")
    beta1: float = _setting(0.9, "optimizer", "AdamW's decay of the first moment")
    beta2: float = _setting(0.999, "optimizer", "AdamW's decay of the second moment")
    eps: float = _setting(1e-8, "optimizer", "AdamW's epsilon")
    clip_norm: float = _setting(0.0, "optimizer", "clip the global norm of a replica's own gradient, data-parallel: of the averaged one; 0: do not")

    scheduler: Literal["cosine", "linear", "step", "cosine-step", "const"] = _setting("cosine", "schedule", "learning-rate decay after the warm-up")
    decay_points: tuple[float, ...] = _setting((), "schedule", "epochs at which 'step' multiplies the rate by gamma")
    gamma: float = _setting(0.1, "schedule", "factor of 'step'")
    warmup_epochs: float = _setting(0.0, "schedule", "linear warm-up, epochs")
    warmup_steps: int = _setting(-1, "schedule", "linear warm-up, steps; overrides warmup_epochs")

    period: str = _setting("qsr", "synchronisation", "when replicas synchronise: a period's name, or the import path of one of your own")
    alpha: float = _setting(0.0, "synchronisation", "qsr, power: growth coefficient, in units of the learning rate")
    power: float = _setting(2.0, "synchronisation", "power: exponent")
    h_base: int = _setting(4, "synchronisation", "least local steps per round; constant, post-local: H itself")
    h_max: int = _setting(-1, "synchronisation", "most local steps per round; -1: no cap")
    switch_step: int = _setting(-1, "synchronisation", "post-local, swap: step at which rounds lengthen")
    period_settings: dict[str, Any] = _setting({}, "synchronisation", "the period's further settings, such as warmup_h; a flag replaces all of the recipe's")  # noqa: RUF009 (a field)
    sync: str = _setting("average", "synchronisation", "how replicas synchronise: a rule's name, or the import path of one of your own")
    sync_settings: dict[str, Any] = _setting({}, "synchronisation", "the rule's own settings, as README lists them; a flag replaces all of the recipe's")  # noqa: RUF009 (a field)
    buffers: Literal["keep", "average", "broadcast"] = _setting("keep", "synchronisation", "what a synchronisation does to the model's buffers")
    track_replicas: bool = _setting(False, "synchronisation", "record at each synchronisation how far replicas have parted, and the loss and waiting time of each")

    eval_at: Literal["sync", "epoch"] = _setting("sync", "evaluation", "sync: at each epoch's last synchronisation; epoch: at each epoch's end, of the consensus")
    eval_on_start: bool = _setting(False, "evaluation", "evaluate before the first step")
    bn: bool = _setting(True, "evaluation", "re-estimate BatchNorm statistics before evaluation")
    bn_batches: int = _setting(128, "evaluation", "training micro-batches for that, over all replicas")
    ema: float = _setting(0.0, "evaluation", "evaluate an exponential moving average of the synchronised model too; its smoothing per step; 0: none")

    log_pth: str = _setting(".localopt/runs", "records", "folder of run folders (host file)")
    log_freq: int = _setting(20, "records", "steps between training records")
    save_freq: int = _setting(0, "records", "epochs between checkpoints; 0: only at the end")
    save_steps: int = _setting(0, "records", "steps between checkpoints, also in the middle of a round or epoch; 0: only as save_freq says")
    save_keep: int = _setting(2, "records", "newest checkpoints to keep, besides the one with the best top-1 accuracy; 0: all")
    save_opt: bool = _setting(True, "records", "save optimizer state, so that the run can be resumed")
    wandb: Literal["online", "offline", "offline-sync", "disabled"] = _setting("disabled", "records", "Weights & Biases; offline-sync: offline, and wandb-osh uploads from another host")
    wandb_project: str = _setting("localopt", "records", "its project (host file)")
    wandb_entity: str = _setting("", "records", "its account or team (host file)")
    wandb_tags: tuple[str, ...] = _setting((), "records", "its tags")

    resume: Literal["never", "auto"] = _setting("never", "resuming", "auto: continue the newest unfinished run in log_pth that has these settings, from its newest whole checkpoint; where there is none, start as without")
    resume_pth: str = _setting("", "resuming", "checkpoint folder to continue from, or a file of weights to start from")
    resume_from_epoch: int = _setting(-1, "resuming", "epoch to start at; -1: the checkpoint's, 0 with a file of weights")
    resume_from_step: int = _setting(-1, "resuming", "step to start at, counted over the whole run; overrides resume_from_epoch")
    optimizer_resume_pth: str = _setting("", "resuming", "with a file of weights: checkpoint folder to take the inner optimizers' state from")
    multiple_optimizers: bool = _setting(True, "resuming", "each rank takes its own optimizer state from there; else all take rank 0's")

    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "machine", "auto: GPUs where there are some")
    dead_after: float = _setting(60.0, "machine", "seconds without a sign of life after which a rank is dead, and the run ends on all hosts")
    stall_after: float = _setting(1800.0, "machine", "seconds without progress after which a rank hangs, and the run ends; more than the longest step")
    deterministic: bool = _setting(False, "machine", "only kernels whose results never change from run to run, so that a resumed run is bit for bit the same on a GPU too; slower")
    local_rank: int = _setting(0, "machine", "place on this host, from the launcher")
    deepspeed_config: str = _setting("", "machine", "DeepSpeed JSON merged into the engine's settings")
    # fmt: on

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}: it must be at least {least}")
        for name, least in _DERIVED.items():
            value = getattr(self, name)
            if value != -1 and value < least:
                raise ConfigError(f"{name} is {value}: at least {least}, or -1 to derive it")
        self._check_ranges()
        if self.scheduler == "step" and not self.decay_points:
            raise ConfigError("decay_points is empty: scheduler step needs epochs to decay at")
        if list(self.decay_points) != sorted(self.decay_points):
            raise ConfigError(f"decay_points is {list(self.decay_points)}: it must increase")
        if self.decay_points and not 0 <= self.decay_points[0] <= self.decay_points[-1] <= 1e6:
            raise ConfigError(
                f"decay_points is {list(self.decay_points)}: they must lie between 0 and 1e6"
            )
        if self.scheduler == "cosine-step" and self.min_lr == 0:
            raise ConfigError(
                "min_lr is 0: scheduler cosine-step needs a positive one, for 0 is no power of 2"
            )
        for name in ("data", "data_pth", "log_pth", "model"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: give one")
        for name in _PATHS:
            checked_path(getattr(self, name), name)
        checked_path(os.path.join(self.data_pth, self.data), "data")
        self._check_synchronisation()
        self._check_resuming()
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov is true: it needs a positive momentum, not 0")

    def _check_synchronisation(self) -> None:
        """Names that are there, and what the period asks for; what only local optimizers do."""
        from . import named  # it imports torch, for which a wrong flag should not wait

        for setting in named.KINDS:
            with self._complaining(setting):
                named.check(setting, getattr(self, setting))
        if self.local:
            self.maker("sync")
            self._check_asked_for(named.parameters(self.maker("period")))
        for name in () if self.local else ("buffers", "track_replicas"):
            if getattr(self, name) != DEFAULTS[name]:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}: optimizer {self.optimizer} averages "
                    "gradients, and has no such setting"
                )

    def _check_asked_for(self, parameters: Mapping[str, inspect.Parameter]) -> None:
        """Refuse what the period could not do with."""
        for name, (least, needed) in _ASKED_FOR.items():
            value = getattr(self, name)
            if name not in parameters or self.leaves_to_period(name, parameters[name]):
                continue
            if value <= least:
                needed = needed.format(max_lr=self.max_lr)
                raise ConfigError(f"{name} is {value}: period {self.period} needs {needed}")

    def leaves_to_period(self, name: str, parameter: inspect.Parameter) -> bool:
        """Whether a setting is not given, and the period has a value of its own for it."""
        least, _ = _ASKED_FOR.get(name, (None, ""))
        return getattr(self, name) == least and parameter.default is not parameter.empty

    @contextmanager
    def _complaining(self, setting: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            value = shortened(getattr(self, setting))
            raise ConfigError(f"{setting} is {value}: {error}") from None

    def maker(self, setting: Literal["period", "sync"]) -> Callable[..., Any]:
        """The class that a setting names, or the function that makes one. May import it."""
        from . import named

        with self._complaining(setting):
            return named.maker(setting, getattr(self, setting))

    def _check_resuming(self) -> None:
        if self.resume == "auto" and not self.save_opt:
            raise ConfigError("resume is 'auto': save_opt is false, so no run could be continued")
        if self.init_model_by_seed == -1 and not self.resume_pth:
            raise ConfigError("init_model_by_seed is -1: give the weights with --resume-pth")
        for name in ("resume_from_epoch", "resume_from_step", "optimizer_resume_pth"):
            if getattr(self, name) != DEFAULTS[name] and not self.resume_pth:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: give resume_pth too")

    def _check_ranges(self) -> None:
        for name, (low, high) in _RANGE.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}: it must lie between {low} and {high}")
        for name in ("momentum", "beta1", "beta2", "ema"):
            if getattr(self, name) == 1:
                raise ConfigError(f"{name} is 1: it must be less, or nothing new counts")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"crop_scale is {[low, high]}: it must be 0 < low <= high <= 1")
        if self.crop_padding and self.crop_scale != DEFAULTS["crop_scale"]:
            raise ConfigError(
                f"crop_scale is {[low, high]}: crop_padding {self.crop_padding} replaces the "
                "resized crops that it is about; give one of the two"
            )
        if 0 < self.label_skew < 1e-6:
            raise ConfigError(f"label_skew is {self.label_skew}: at least 1e-06, or 0 for none")
        if self.min_lr > self.max_lr:
            raise ConfigError(f"min_lr is {self.min_lr}: it exceeds max_lr, {self.max_lr}")
        for f in fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ConfigError(f"{f.name} is {number}: it must be finite")

    @property
    def local(self) -> bool:
        """Whether the optimizer is a local one; else gradients are averaged at every step."""
        return self.optimizer.startswith("local")

    def as_dict(self) -> dict[str, Any]:
        """The settings in types that YAML and JSON have."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


_LEAST = {
    "total_batch_size": 1, "physical_batch_size": 1, "max_lr": 0, "min_lr": 0, "wd": 0, "eps": 0,
    "clip_norm": 0, "h_base": 1, "bn_batches": 1, "log_freq": 1, "save_freq": 0, "save_steps": 0, "save_keep": 0,
    "local_rank": 0, "power": 0, "switch_step": -1,
}  # fmt: skip
_DERIVED = {
    "steps_per_epoch": 1, "epochs_for_sche": 1, "h_max": 1, "warmup_steps": 0, "resolution": 1,
    "resume_from_epoch": 0, "resume_from_step": 0,
}  # fmt: skip
_RANGE = {
    "gamma": (0, 1), "label_smoothing": (0, 1), "momentum": (0, 1), "beta1": (0, 1), "beta2": (0, 1), "val_crop_ratio": (1e-3, 1),
    "seed": (0, 2**32 - 1), "init_model_by_seed": (-1, 2**32 - 1), "warmup_epochs": (0, 1e6),
    "epochs": (0, 10**6), "nw": (1, 1024), "resolution": (-1, 65_535),
    "randaugment_depth": (0, 100), "randaugment_severity": (1, 10), "mixup": (0, 1e6), "resize_initial_scale": (0.05, 1),
    "resize_finetune_fraction": (0, 1), "ema": (0, 1),
    "crop_padding": (0, 65_535), "label_skew": (0, 1e6), "dead_after": (1, 86_400),
    "stall_after": (1, 86_400),
}  # fmt: skip
# What a period may take that is a setting of the program, by the name that the period has for it.
PERIOD_TAKES = {
    "alpha": "alpha", "h": "h_base", "base": "h_base", "power": "power",
    "switch_step": "switch_step",
}  # fmt: skip
# Where it takes one: what is too little, and what it needs.
_ASKED_FOR = {
    "alpha": (0, "a positive one, such as 2 to 3 times max_lr ({max_lr})"),
    "power": (0, "a positive one"),
    "switch_step": (-1, "one"),
}
_PATHS = ("data_pth", "log_pth", "resume_pth", "optimizer_resume_pth", "deepspeed_config")
HOST_KEYS = ("data_pth", "log_pth", "wandb_project", "wandb_entity", "nw")
# What may differ between ranks without making them train differently.
PER_HOST = (*HOST_KEYS, "local_rank", "resume_pth", "optimizer_resume_pth")

_FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(Config)}
DEFAULTS: dict[str, Any] = {
    name: f.default if f.default is not MISSING else f.default_factory()
    for name, f in _FIELDS.items()
}
_TYPES: dict[str, Any] = {**typing.get_type_hints(Config), "base": str}


def load(argv: Sequence[str]) -> Config:
    """Read the command line, its recipe and this host's file.

    Args:
        argv: the arguments after the program's name.

    Raises:
        ConfigError: for an unknown flag or key, a wrong type or an impossible value.
        SystemExit: for ``--help``.
    """
    flags = _parse(argv)
    recipe = _found(flags.pop("recipe_pth", DEFAULT_RECIPE), "--recipe-pth")
    default_host = ROOT / f".config_{socket.gethostname()}.yml"
    given_host = flags.pop("config_pth", None)
    settings: dict[str, Any] = {}
    if given_host is not None or default_host.exists():
        host = _found(str(default_host) if given_host is None else given_host, "--config-pth")
        settings |= _read(host, "host file", HOST_KEYS)
    settings |= _read_recipe(recipe)
    settings |= flags
    return Config(**settings)


def _found(path: str, flag: str) -> Path:
    """``path`` from the working directory, or from the repository if only there is such a file."""
    checked_path(path, flag)
    if not path:
        raise ConfigError(f"{flag} is empty: give a file")
    here = Path(path).expanduser()
    return here if here.exists() or not absolute(path).exists() else absolute(path)


def checked_path(path: str, name: str) -> None:
    """Raise ConfigError for a path that no file can have."""
    try:
        absolute(converted(path, str)).exists()
    except OSError as error:
        raise ConfigError(f"{name} is {shortened(path)}: {error.strerror}") from None
    except (ValueError, RuntimeError) as error:  # the latter for ~nobody
        raise ConfigError(f"{name} is {shortened(path)}: {error}") from None


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


def _from_yaml(text: str) -> Any:
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
        raise ConfigError(f"not valid YAML{line}: {reason[:200]}") from None


def _read_recipe(path: Path, above: tuple[Path, ...] = (), what: str = "recipe") -> dict[str, Any]:
    """The settings of a recipe, on top of those of its ``base``, a recipe in the same folder."""
    settings = _read(path, what, ("base", *_FIELDS))
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
    try:
        content = _from_yaml(text_of(path))
    except ConfigError as error:
        raise ConfigError(f"{what} {path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{what} {path}: it must hold `key: value` lines")
    settings = {}
    for key, value in content.items():
        if key not in allowed:
            raise ConfigError(
                f"{what} {path}: unknown key {shortened(key)}{_nearest(str(key), allowed)}"
            )
        try:
            settings[key] = converted(value, _TYPES[key])
        except ValueError as error:
            raise ConfigError(f"{what} {path}: {key} is {shortened(value)}: {error}") from None
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


def shortened(value: Any) -> str:
    """``repr(value)``, as far as it fits a message."""
    text = _REPR.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple, _REPR.maxset = 4, 20, 20, 20, 20
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 150


def _nearest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(allowed)}"


def converted(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``, or ValueError saying what it must be."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(
                f"it must be one of {', '.join(map(str, arguments))}{did_you_mean(value, arguments)}"
            )
        return value
    if origin is tuple:
        return _convert_tuple(value, arguments)
    if origin is dict:
        return _convert_settings(value)
    if bool in arguments:  # or None
        if value is None or value == "auto":
            return None
        try:
            return converted(value, bool)
        except ValueError:
            raise ValueError("it must be true, false or auto") from None
    if kind is bool and isinstance(value, str) and value.lower() in _BOOLS:
        return _BOOLS[value.lower()]
    if kind in (int, float) and isinstance(value, str):  # YAML reads 1e-3 as text
        value = _number(value, kind)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return _number(str(value) if abs(value) < 10**300 else "too large", float)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"it must be {_KINDS[kind]}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise ValueError("it must be an integer of at most 64 bits")
    if kind is str and not all(_is_plain(character) for character in value):
        raise ValueError("it must be text, without control characters")
    return value


def _is_plain(character: str) -> bool:
    """Neither a control character, which could break the line, nor half of a UTF-16 pair."""
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")


_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"it must be {_KINDS[kind]}") from None


def did_you_mean(value: Any, choices: Sequence[Any]) -> str:
    """The choice that may have been meant, for the end of a message; "" if none is near."""
    close = difflib.get_close_matches(str(value), list(map(str, choices)), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _convert_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError("it must be a list")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise ValueError(f"it must be a list of {len(arguments)}")
    return tuple(converted(v, arguments[0]) for v in value)


def _convert_settings(value: Any) -> dict[str, Any]:
    """A mapping, or the words NAME=VALUE of a flag, whose values are YAML."""
    if isinstance(value, list) and all(isinstance(w, str) and "=" in w for w in value):
        pairs = [word.partition("=") for word in value]
        names = [name for name, _, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        return {name: _from_yaml(text) for name, _, text in pairs}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("it must be a mapping, as a flag NAME=VALUE …")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)

    def format_help(self) -> str:
        from . import named  # both import this module
        from .plan.plan import help_text

        for action in self._actions:
            if action.dest in named.KINDS and action.help is not argparse.SUPPRESS:
                _, builtin = named.KINDS[action.dest]
                action.metavar = "{" + ",".join([*builtin, "module:Class"]) + "}"
        return f"{super().format_help()}\n{help_text()}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py",
        usage="deepspeed --hostfile hostfile main.py [flags]",
        description="Train with few synchronisations. Flags override the recipe.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    files = parser.add_argument_group("files")
    _add_text(files, "recipe_pth", "YAML", f"base settings (default {DEFAULT_RECIPE})")
    host = "this host's paths (default .config_{hostname}.yml, if there)"
    _add_text(files, "config_pth", "YAML", host)
    titles = dict.fromkeys(f.metadata["group"] for f in _FIELDS.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    for name, f in _FIELDS.items():
        _add_flag(groups[f.metadata["group"]], name, f)
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
    kind = _TYPES[name]
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


def _parse(argv: Sequence[str]) -> dict[str, Any]:
    parser = _parser()
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        names = sorted({o for action in parser._actions for o in action.option_strings})
        flag = unknown[0].split("=")[0]
        close = difflib.get_close_matches(flag, [n for n in names if "_" not in n], n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close and flag[2:] else "; see --help"
        # As it stands where it is plain: quotes would be part of what one types.
        told = flag if flag.isprintable() and len(flag) < 100 else shortened(flag)
        raise ConfigError(f"unknown flag {told}{hint}")
    flags = vars(known)
    for name in ("deepspeed", "deepscale"):
        flags.pop(name, None)
    for name, value in flags.items():
        if name in _TYPES:
            try:
                flags[name] = converted(value, _TYPES[name])
            except ValueError as error:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} is {shortened(value)}: {error}") from None
    return flags


def absolute(path: str) -> Path:
    """``path`` as it stands, or below the repository where it is relative."""
    return ROOT / Path(path).expanduser()
