"""The table of settings: `Config`, frozen and checked.

Every setting is a field: its flag, its key in a recipe and its line in ``--help`` come from there.
"""

from __future__ import annotations

import inspect
import math
import os
import typing
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, Literal

from . import loggers
from .values import ConfigError, about, checked_path, shortened


def _setting(default: Any, group: str, text: str, **bounds: float) -> Any:
    """A row: ``low`` and ``high`` bound a number; ``derived`` is its least, where -1 derives it."""
    metadata = {"group": group, "help": text, "bounds": bounds}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _problem(
    value: Any, low: float | None = None, high: float | None = None, derived: float | None = None
) -> str | None:
    """Why a number is out of bounds; None if it is not."""
    if derived is not None and value != -1 and value < derived:
        return f"at least {derived}, or -1 to derive it"
    if low is not None and high is None and value < low:
        return f"it must be at least {low}"
    if low is not None and high is not None and not low <= value <= high:
        return f"it must lie between {low} and {high}"
    return None


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of one run. Lengths in epochs or optimizer steps as named."""

    # fmt: off
    data: str = _setting("digits", "data", "data set: the folder below data_pth with train.beton, val.beton")
    data_pth: str = _setting(".localopt/data", "data", "folder of data sets (host file)")
    resolution: int = _setting(-1, "data", "training and validation images are this many pixels square; -1: as the data set stores them, if all are alike", low=-1, high=65_535, derived=1)
    val_crop_ratio: float = _setting(0.875, "data", "validation: side of the centre crop over the shorter side; 224/256 does what resize 256, centre crop 224 does", low=1e-3, high=1)
    label_skew: float = _setting(0.0, "data", "concentration of the Dirichlet distribution that each replica's own class mix is drawn from, smaller: more skewed; 0: replicas share the data evenly", low=0, high=1e6)
    nw: int = _setting(1, "data", "loader workers (threads) per replica", low=1, high=1024)
    seed: int = _setting(0, "data", "seed of order, augmentation and dropout", low=0, high=2**32 - 1)

    crop_scale: tuple[float, float] = _setting((0.08, 1.0), "augmentation", "share of an image's area that a random crop keeps")
    crop_padding: int = _setting(0, "augmentation", "pad training images with so many black pixels on each side and crop their own size at random, instead of crop_scale; 0: do not", low=0, high=65_535)
    flip: bool = _setting(True, "augmentation", "mirror half of the training images")
    randaugment_depth: int = _setting(0, "augmentation", "RandAugment: operations on each training image; 0: none", low=0, high=100)
    randaugment_severity: float = _setting(9.0, "augmentation", "RandAugment: strength, up to 10", low=1, high=10)
    randaugment_operations: Literal["all", "safe", "original"] = _setting("all", "augmentation", "RandAugment: composer's set of operations")
    mixup: float = _setting(0.0, "augmentation", "Mixup: parameter of the Beta distribution; 0: none", low=0, high=1e6)
    label_smoothing: float = _setting(0.0, "augmentation", "label smoothing of the training loss", low=0, high=1)
    resize_initial_scale: float = _setting(1.0, "augmentation", "progressive resizing: images start at this share of the resolution; 1: none", low=0.05, high=1)
    resize_finetune_fraction: float = _setting(0.2, "augmentation", "progressive resizing: share of the run that ends it at full resolution", low=0, high=1)

    model: str = _setting("simplevit-digits", "model", "name of a model in training/models.py")
    init_model_by_seed: int = _setting(0, "model", "seed of the initial weights; -1: take them from resume_pth", low=-1, high=2**32 - 1)
    precision: Literal["fp32", "bf16", "fp16"] = _setting("fp32", "model", "bf16, fp16: autocast, weights stay fp32; fp16 with loss scaling")
    compile: bool | None = _setting(None, "model", "torch.compile the model; auto: on a GPU, where the model gains by it")
    channels_last: bool = _setting(False, "model", "keep convolutions' weights in memory format channels_last")
    blurpool: bool = _setting(False, "model", "BlurPool: blur before strided convolutions and max pooling")
    squeeze_excite: bool = _setting(False, "model", "squeeze-and-excitation after wide convolutions")

    epochs: int = _setting(60, "length", "epochs to train", low=0, high=10**6)
    epochs_for_sche: int = _setting(-1, "length", "epochs the learning-rate schedule spans; -1: epochs", derived=1)
    steps_per_epoch: int = _setting(-1, "length", "steps in an epoch; -1: all that the data gives", derived=1)
    total_batch_size: int = _setting(64, "length", "images per step over all replicas", low=1)
    physical_batch_size: int = _setting(32, "length", "images per forward pass, at most; gradient accumulation follows", low=1)

    optimizer: Literal["sgd", "adamw", "localsgd", "localadamw"] = _setting("localadamw", "optimizer", "sgd and adamw: data-parallel")
    max_lr: float = _setting(1e-3, "optimizer", "peak learning rate", low=0)
    min_lr: float = _setting(1e-6, "optimizer", "rate at the start of the warm-up, and where cosine, linear and cosine-step end", low=0)
    momentum: float = _setting(0.9, "optimizer", "SGD momentum", low=0, high=1)
    nesterov: bool = _setting(False, "optimizer", "Nesterov momentum for SGD")
    wd: float = _setting(0.05, "optimizer", "weight decay", low=0)
    beta1: float = _setting(0.9, "optimizer", "AdamW's decay of the first moment", low=0, high=1)
    beta2: float = _setting(0.999, "optimizer", "AdamW's decay of the second moment", low=0, high=1)
    eps: float = _setting(1e-8, "optimizer", "AdamW's epsilon", low=0)
    clip_norm: float = _setting(0.0, "optimizer", "clip the global norm of a replica's own gradient, data-parallel: of the averaged one; 0: do not", low=0)

    scheduler: Literal["cosine", "linear", "step", "cosine-step", "const"] = _setting("cosine", "schedule", "learning-rate decay after the warm-up")
    decay_points: tuple[float, ...] = _setting((), "schedule", "epochs at which 'step' multiplies the rate by gamma")
    gamma: float = _setting(0.1, "schedule", "factor of 'step'", low=0, high=1)
    warmup_epochs: float = _setting(0.0, "schedule", "linear warm-up, epochs", low=0, high=1e6)
    warmup_steps: int = _setting(-1, "schedule", "linear warm-up, steps; overrides warmup_epochs", derived=0)

    period: str = _setting("qsr", "synchronisation", "when replicas synchronise: a period's name, or the import path of one of your own")
    alpha: float = _setting(0.0, "synchronisation", "qsr, power: growth coefficient, in units of the learning rate")
    power: float = _setting(2.0, "synchronisation", "power: exponent", low=0)
    h_base: int = _setting(4, "synchronisation", "least local steps per round; constant, post-local: H itself", low=1)
    h_max: int = _setting(-1, "synchronisation", "most local steps per round; -1: no cap", derived=1)
    switch_step: int = _setting(-1, "synchronisation", "post-local, swap: step at which rounds lengthen", low=-1)
    period_settings: dict[str, Any] = _setting({}, "synchronisation", "the period's further settings, such as warmup_h; a flag replaces all of the recipe's")  # noqa: RUF009 (a field)
    sync: str = _setting("average", "synchronisation", "how replicas synchronise: a rule's name, or the import path of one of your own")
    sync_settings: dict[str, Any] = _setting({}, "synchronisation", "the rule's own settings, as README lists them; a flag replaces all of the recipe's")  # noqa: RUF009 (a field)
    buffers: Literal["keep", "average", "broadcast"] = _setting("keep", "synchronisation", "what a synchronisation does to the model's buffers")
    track_replicas: bool = _setting(False, "synchronisation", "record at each synchronisation how far replicas have parted, and the loss and waiting time of each")

    eval_at: Literal["sync", "epoch"] = _setting("sync", "evaluation", "sync: at each epoch's last synchronisation; epoch: at each epoch's end, of the consensus")
    eval_on_start: bool = _setting(False, "evaluation", "evaluate before the first step")
    bn: bool = _setting(True, "evaluation", "re-estimate BatchNorm statistics before evaluation")
    bn_batches: int = _setting(128, "evaluation", "training micro-batches for that, over all replicas", low=1)
    ema: float = _setting(0.0, "evaluation", "evaluate an exponential moving average of the synchronised model too; its smoothing per step; 0: none", low=0, high=1)

    log_pth: str = _setting(".localopt/runs", "records", "folder of run folders (host file)")
    log_freq: int = _setting(20, "records", "steps between training records", low=1)
    save_freq: int = _setting(0, "records", "epochs between checkpoints; 0: only at the end", low=0)
    save_steps: int = _setting(0, "records", "steps between checkpoints, also in the middle of a round or epoch; 0: only as save_freq says", low=0)
    save_keep: int = _setting(2, "records", "newest checkpoints to keep, besides the one with the best top-1 accuracy; 0: all", low=0)
    save_opt: bool = _setting(True, "records", "save optimizer state, so that the run can be resumed")
    loggers: tuple[str, ...] = _setting((), "records", "where records go besides metrics.jsonl, by name: tensorboard, mlflow")
    wandb: Literal["online", "offline", "offline-sync", "disabled"] = _setting("disabled", "records", "Weights & Biases; offline-sync: offline, and wandb-osh uploads from another host")
    wandb_project: str = _setting("localopt", "records", "its project (host file)")
    wandb_entity: str = _setting("", "records", "its account or team (host file)")
    wandb_tags: tuple[str, ...] = _setting((), "records", "its tags")

    resume: Literal["never", "auto"] = _setting("never", "resuming", "auto: continue the newest unfinished run in log_pth that has these settings, from its newest whole checkpoint; where there is none, start as without")
    resume_pth: str = _setting("", "resuming", "checkpoint folder to continue from, or a file of weights to start from")
    resume_from_epoch: int = _setting(-1, "resuming", "epoch to start at; -1: the checkpoint's, 0 with a file of weights", derived=0)
    resume_from_step: int = _setting(-1, "resuming", "step to start at, counted over the whole run; overrides resume_from_epoch", derived=0)
    optimizer_resume_pth: str = _setting("", "resuming", "with a file of weights: checkpoint folder to take the inner optimizers' state from")
    multiple_optimizers: bool = _setting(True, "resuming", "each rank takes its own optimizer state from there; else all take rank 0's")

    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "machine", "auto: GPUs where there are some")
    dead_after: float = _setting(60.0, "machine", "seconds without a sign of life after which a rank is dead, and the run ends on all hosts", low=1, high=86_400)
    stall_after: float = _setting(1800.0, "machine", "seconds without progress after which a rank hangs, and the run ends; more than the longest step", low=1, high=86_400)
    deterministic: bool = _setting(False, "machine", "only kernels whose results never change from run to run, so that a resumed run is bit for bit the same on a GPU too; slower")
    local_rank: int = _setting(0, "machine", "rank on this host, from the launcher", low=0)
    deepspeed_config: str = _setting("", "machine", "DeepSpeed JSON merged into the engine's settings")
    # fmt: on

    def __post_init__(self) -> None:
        for name, f in FIELDS.items():
            if problem := _problem(getattr(self, name), **f.metadata["bounds"]):
                raise ConfigError(f"{name} is {getattr(self, name)}: {problem}")
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
        with self._about("loggers"):
            loggers.check(self.loggers)
        self._check_synchronisation()
        self._check_resuming()
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov is true: it needs a positive momentum, not 0")

    def _check_synchronisation(self) -> None:
        """Names that are there, and what the period asks for; what only local optimizers do."""
        from . import named  # which looks for the library's own names only when it is asked

        for setting in named.KINDS:
            with self._about(setting):
                named.check(setting, getattr(self, setting))
        if self.local:
            if named.is_own(self.sync):
                self.maker("sync")
            with self._about("period"):
                parameters = named.period_parameters(self.period)
            self._check_asked_for(parameters)
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

    def _about(self, setting: str) -> AbstractContextManager[None]:
        return about(f"{setting} is {shortened(getattr(self, setting))}")

    def maker(self, setting: Literal["period", "sync"]) -> Callable[..., Any]:
        """The class that a setting names, or the function that makes one. May import it."""
        from . import named

        with self._about(setting):
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
        for name in FIELDS:
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ConfigError(f"{name} is {number}: it must be finite")

    @property
    def local(self) -> bool:
        """Whether the optimizer is a local one; else gradients are averaged at every step."""
        return self.optimizer.startswith("local")

    def as_dict(self) -> dict[str, Any]:
        """The settings in types that YAML and JSON have."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


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

FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(Config)}
DEFAULTS: dict[str, Any] = {
    name: f.default if f.default is not MISSING else f.default_factory()
    for name, f in FIELDS.items()
}
TYPES: dict[str, Any] = typing.get_type_hints(Config)
