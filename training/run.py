"""A training run put together from its config."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import sources
from data.dataset import DESCRIPTION, TRAIN, VAL, DataError, checked, sha256
from data.loaders import TrainData, ValData, stored_side
from data.randaugment import RandAugment
from localopt import (
    AbsentRankError,
    CollectiveError,
    LayoutMismatchError,
    SyncError,
    Watch,
)
from localopt.collective import Collective
from localopt.faults import control

from . import (
    checks,
    deepspeed_settings,
    distributed,
    launchers,
    loggers,
    models,
    optimizers,
    progress,
    record,
    run_folder,
)
from .checkpoint import files, resume, saver
from .checkpoint.saver import SaveError
from .config import PER_HOST, Config
from .deepspeed_engine import engine_of
from .distributed import Process
from .engine import Batch, Engine, OutOfMemoryError, ReplicaOptimizer, out_of_memory
from .lr import Schedule
from .methods import Ema, Mixup, ProgressiveResizing
from .plan import cost
from .values import ConfigError, absolute

# A change to a micro-batch on the device: (batch, step, micro_step) -> batch.
Method = Callable[[Batch, int, int], Batch]


@dataclass
class Run:
    """Everything that a training run is made of."""

    config: Config
    process: Process
    folder: Path
    schedule: Schedule
    engine: Engine
    train_data: TrainData
    val_data: ValData
    collective: Collective
    recorder: record.Recorder
    watch: Watch
    state: saver.State
    saver: saver.Saver
    methods: Sequence[Method]
    steps_per_epoch: int
    start: resume.Start
    preempted: bool = False  # whether it was asked to stop before its end

    def prepared(self, micro_batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """The micro-batches of one step, after Mixup and the like."""
        for micro_step, batch in enumerate(micro_batches):
            for method in self.methods:
                batch = method(batch, step, micro_step)
            yield batch

    @property
    def optimizer(self) -> ReplicaOptimizer:
        """The engine's."""
        return self.engine.optimizer

    @property
    def ema(self) -> Ema | None:
        """The moving average of the synchronised model, where the recipe wants one."""
        return self.state.ema

    def update_ema(self, step: int) -> bool:
        """Let the moving average follow, where the replicas agree; return whether it did."""
        return bool(self.ema and self.engine.agreed and self.ema.update(step))


class LostRankError(RuntimeError):
    """Another rank has died or hangs; ``first`` on the rank that is to say so."""

    def __init__(self, message: str, *, first: bool) -> None:
        super().__init__(message)
        self.first = first


@contextmanager
def assembled(config: Config, all_met: Callable[[], None] = lambda: None) -> Iterator[Run]:
    """Join the other replicas, build what ``config`` names, and close it all at the end.

    Meanwhile each rank is watched: one that is lost ends the run on all.

    Args:
        config: the run's settings.
        all_met: called as soon as all replicas have met.

    Raises:
        ConfigError: if settings do not fit together, the machine or the data.
        DataError: if the data are missing or damaged.
        LayoutMismatchError: if replicas have different settings.
        AbsentRankError: if one does not arrive.
        LostRankError: where a collective failed because another rank is lost.
    """
    deepspeed = deepspeed_settings.settings_of(config, accumulation=1)
    optimizers.check(config)  # a wrong setting should not wait for the other replicas
    if launchers.replicas() > 1:
        progress.say("meets the other replicas")
    try:
        process = distributed.join(config)
    except AbsentRankError as error:
        raise LostRankError(str(error), first=True) from None
    all_met()
    collective = Collective()
    watch = Watch(
        collective, dead_after=config.dead_after, stall_after=config.stall_after,
        advice="continue with --resume auto", watch_parent=launchers.processes(),
    )  # fmt: skip
    try:
        with watch, _assembled(config, deepspeed, process, collective, watch) as run:
            yield run
    except torch.OutOfMemoryError as error:
        batch = checks.with_fitting_batches(config, collective.world_size).physical_batch_size
        raise out_of_memory(batch, error) from error
    except Exception as error:
        others = CollectiveError, AbsentRankError  # which another rank may be the reason of
        own = isinstance(error, OWN_ERRORS) and not isinstance(error, others)
        if watch.verdict and not watch.failed and not own:
            raise LostRankError(watch.verdict, first=watch.first) from error
        raise
    distributed.leave()


# Errors that say by themselves what is wrong, mostly on all ranks alike.
OWN_ERRORS = (
    ConfigError, DataError, LayoutMismatchError, SyncError, OutOfMemoryError,
    record.DivergedError, SaveError,
)  # fmt: skip


@contextmanager
def _assembled(
    config: Config, deepspeed: dict[str, Any], process: Process, collective: Collective,
    watch: Watch,
) -> Iterator[Run]:  # fmt: skip
    if process.rank == 0:
        loggers.require_login(config.as_dict())
    _compare(config, deepspeed, collective)
    config = checks.with_fitting_batches(config, collective.world_size)
    config = checks.with_compile(config, process.device)
    if process.rank == 0 and (slow := checks.slow_precision(config, process.device)):
        print(f"main.py: {slow}", file=sys.stderr, flush=True)
    progress.say("opens the data")
    config, steps_per_epoch = _agreed_on_data(config, process, collective)
    train_data, val_data = _open_data(config, process)
    schedule = Schedule.of(config, steps_per_epoch)
    engine = _replica(config, process, schedule, train_data)
    state = saver.State(
        engine.model, engine.optimizer, engine.centre, engine.scaler, _ema(config, engine.model)
    )
    start = resume.restore(config, state, collective, steps_per_epoch)
    checks.check_start(config, start.step, schedule.total_steps)
    folder = start.folder or run_folder.make_folder(config, collective)
    recorder = record.Recorder(
        config, folder, process, engine.optimizer, schedule.total_steps, steps_per_epoch, start,
        counted_from=start.step if resume.weights_file(config) else 0,
    )  # fmt: skip
    if start.folder and process.local_rank == 0:
        files.set_aside(folder / "checkpoints", after=start.step)
    control.gather(collective, "cleared")
    compiled = "the model, and " if config.compile else ""
    progress.say(f"compiles {compiled}what loads the images, for the first batch")
    try:
        yield Run(
            config=config, process=process, folder=folder, schedule=schedule, engine=engine,
            train_data=train_data, val_data=val_data, collective=collective, recorder=recorder,
            watch=watch, state=state, steps_per_epoch=steps_per_epoch, start=start,
            saver=saver.Saver(
                folder / "checkpoints", config, collective,
                publishes=process.local_rank == 0, versions=run_folder.versions(),
                saved_at=start.step if start.folder else None,
            ),
            methods=_methods(config, process, train_data.num_classes, schedule.total_steps),
        )  # fmt: skip
    except BaseException:
        recorder.close(failed=True)
        raise
    recorder.close()


def described(
    config: Config,
    process: Process,
    schedule: Schedule,
    optimizer: ReplicaOptimizer,
    images: int,
) -> str:
    """What will be trained, in one line."""
    numel = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    steps, planned = schedule.total_steps, "gradients averaged at every step"
    if process.world_size == 1 or steps == 0:
        planned = "nothing will be synchronised"
    elif config.local and steps <= _COUNTED:
        syncs = len(cost.rounds_of(optimizer.period, schedule))
        planned = f"{syncs:,} synchronisations planned ({syncs / steps:.1%} of the steps)"
    elif config.local:
        planned = f"synchronised as {optimizer.period} says"
    if 0 < steps <= schedule.warmup_steps:
        planned += f"; the run ends within its warm-up of {schedule.warmup_steps:,} steps"
    return (
        f"{config.model} with {numel:,} parameters on {process.device}; {config.data} with "
        f"{images:,} images; {steps:,} steps of {config.total_batch_size:,} images; {planned}"
    )


_COUNTED = 10**6  # steps: more would take seconds to go through


def _replica(config: Config, process: Process, schedule: Schedule, data: TrainData) -> Engine:
    """The model, with the weights to start from, on its device and in its engine."""
    progress.say("builds the model")
    model = models.of(config.as_dict(), data.num_classes)
    if weights := resume.weights_file(config):
        resume.load_weights(weights, model)  # before the optimizer: rules anchor to what they find
    model.to(process.device)
    checks.check_model(config, model, process.world_size)
    torch.manual_seed(config.seed * 1_000_003 + process.rank)  # dropout: each replica its own
    optimizer = optimizers.build(config, model, schedule)
    progress.say(described(config, process, schedule, optimizer, data.images))
    return engine_of(config, model, optimizer, process.world_size)


def _compare(config: Config, deepspeed: dict[str, Any], collective: Collective) -> None:
    """Raise on every rank if one has other settings, software, or another checkpoint to resume."""
    settings = {k: v for k, v in config.as_dict().items() if k not in PER_HOST}
    settings |= {f"version of {package}": found for package, found in run_folder.versions().items()}
    settings["version of this code"] = run_folder.code_digest()
    for module, digest in run_folder.own_code(config).items():
        settings[f"version of {module}"] = digest
    settings["deepspeed"] = json.dumps(deepspeed, sort_keys=True)
    for key in ("resume_pth", "optimizer_resume_pth"):
        given = getattr(config, key)
        settings[key] = resume.identity(absolute(given), key) if given else "none"
    lines = [f"{key}: {value}" for key, value in settings.items()]
    control.agree(collective, lines, control.TIMEOUT)


def _methods(
    config: Config, process: Process, classes: int, total_steps: int
) -> tuple[Method, ...]:
    """What the recipe switches on of the methods that change micro-batches."""
    chosen: list[Method] = []
    if config.resize_initial_scale < 1:
        shares = config.resize_initial_scale, config.resize_finetune_fraction
        chosen.append(ProgressiveResizing(*shares, config.resolution, total_steps))
    if config.mixup:
        first = config.total_batch_size // process.world_size * process.rank
        chosen.append(Mixup(
            config.mixup, seed=config.seed, classes=classes, first=first,
            physical_batch=config.physical_batch_size,
        ))  # fmt: skip
    return tuple(chosen)


def _ema(config: Config, model: nn.Module) -> Ema | None:
    return Ema(model, config.ema) if config.ema else None


def _agreed_on_data(
    config: Config, process: Process, collective: Collective
) -> tuple[Config, int]:
    """Settings that the data set fits, which all hosts have alike, and the steps in an epoch.

    Data that need nothing else are written where they are missing, once per host.
    """
    folder = _data_folder(config)
    description, train = folder / DESCRIPTION, folder / TRAIN
    if process.local_rank == 0 and config.data in sources.NAMES and not description.exists():
        from data import write

        if (source := sources.source(config.data)).embedded:
            write.write(config.data, source.defaults(), folder)
    control.gather(collective, "data are there")
    found = sha256(description) if description.exists() else "none"
    control.agree(collective, [f"data {config.data}: {found}"], control.TIMEOUT)
    if config.resolution == -1:
        config = checks.with_resolution(config, stored_side(train))
    return config, checks.steps_per_epoch(config, checked(train).files[train.name].images)


def _data_folder(config: Config) -> Path:
    return absolute(config.data_pth) / config.data


def _open_data(config: Config, process: Process) -> tuple[TrainData, ValData]:
    folder = _data_folder(config)
    common = {
        "rank": process.rank, "world_size": process.world_size, "device": process.device,
        "resolution": config.resolution, "workers": config.nw,
    }  # fmt: skip
    depth, severity = config.randaugment_depth, config.randaugment_severity
    randaugment = depth, severity, config.randaugment_operations
    train_data = TrainData(
        folder / TRAIN, total_batch=config.total_batch_size,
        physical_batch=config.physical_batch_size, seed=config.seed, scale=config.crop_scale,
        flip=config.flip, padding=config.crop_padding, label_skew=config.label_skew,
        randaugment=RandAugment(*randaugment) if depth else None, **common,
    )  # fmt: skip
    batch, crop_ratio = config.physical_batch_size, config.val_crop_ratio
    return train_data, ValData(folder / VAL, batch=batch, crop_ratio=crop_ratio, **common)
