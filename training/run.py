"""A training run put together from its config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.dataset import checked
from data.loaders import TrainData, ValData
from localopt import LocalOptimizer, control
from localopt.collective import Collective

from . import checkpoint, engine, models, optimizers, record
from .config import PER_HOST, Config, ConfigError, absolute
from .evaluate import has_batch_norm
from .lr import Schedule


@dataclass
class Run:
    """Everything that a training run is made of."""

    config: Config
    place: engine.Place
    folder: Path
    schedule: Schedule
    engine: engine.Engine
    optimizer: LocalOptimizer | optimizers.DataParallel
    train_data: TrainData
    val_data: ValData
    collective: Collective
    recorder: record.Recorder
    steps_per_epoch: int
    start_step: int = 0


@contextmanager
def assembled(config: Config) -> Iterator[Run]:
    """Join the other replicas, build what ``config`` names, and close it all at the end.

    Raises:
        ConfigError: if settings do not fit together, the machine or the data.
        DataError: if the data are missing or damaged.
        LayoutMismatchError: if replicas have different settings.
        AbsentRankError: if one does not arrive.
    """
    deepspeed = engine.deepspeed_settings(config, accumulation=1)
    if config.local:
        optimizers.rule(config)  # a wrong setting should not wait for the other replicas
    place = engine.start(config)
    collective = Collective()
    _compare(config, deepspeed, collective)
    config = _with_fitting_batches(config, collective)
    train_data, val_data = _open_data(config, place, collective)
    steps_per_epoch = _steps_per_epoch(config, train_data)
    schedule = Schedule.of(config, steps_per_epoch)

    model = models.build(
        config.model,
        classes=train_data.num_classes,
        resolution=config.resolution,
        seed=config.init_model_by_seed,
    ).to(place.device)
    _check_batch_norm(config, model, collective)
    torch.manual_seed(config.seed * 1_000_003 + place.rank)  # dropout: each replica its own
    optimizer = optimizers.build(config, model, schedule)
    trainer = engine.Engine(config, model, optimizer, place.world_size)
    start_step = 0
    if config.resume_pth:
        path = absolute(config.resume_pth)
        start_step = checkpoint.load(path, config, model, optimizer, collective)
        if start_step > schedule.total_steps:
            raise ConfigError(
                f"resume_pth {path}: at step {start_step}, past this run's end at "
                f"{schedule.total_steps}; raise epochs"
            )
    folder = record.make_folder(config, collective)
    recorder = record.Recorder(
        config, folder, place, optimizer, schedule.total_steps, steps_per_epoch, start_step
    )
    try:
        yield Run(
            config=config,
            place=place,
            folder=folder,
            schedule=schedule,
            engine=trainer,
            optimizer=optimizer,
            train_data=train_data,
            val_data=val_data,
            collective=collective,
            recorder=recorder,
            steps_per_epoch=steps_per_epoch,
            start_step=start_step,
        )
    except BaseException:
        recorder.close(failed=True)
        raise
    recorder.close()
    trainer.close()


def _compare(config: Config, deepspeed: dict[str, Any], collective: Collective) -> None:
    """Raise on every rank if one has other settings, or resumes from another checkpoint."""
    settings = {k: v for k, v in config.as_dict().items() if k not in PER_HOST}
    settings["deepspeed"] = json.dumps(deepspeed, sort_keys=True)
    settings["resume_pth"] = "none"
    if config.resume_pth:
        settings["resume_pth"] = checkpoint.identity(absolute(config.resume_pth))
    lines = [f"{key}: {value}" for key, value in settings.items()]
    control.agree(collective, lines, control.TIMEOUT)


def _with_fitting_batches(config: Config, collective: Collective) -> Config:
    """``config`` with a physical batch no larger than a replica's share of the total."""
    total, m = config.total_batch_size, collective.world_size
    if total % m:
        raise ConfigError(f"total_batch_size is {total}: not divisible by the {m} replicas")
    physical = min(config.physical_batch_size, total // m)
    if total // m % physical:
        raise ConfigError(
            f"physical_batch_size is {physical}: it does not divide a replica's batch of "
            f"{total // m} (total_batch_size {total} over {m} replicas)"
        )
    return dataclasses.replace(config, physical_batch_size=physical)


def _check_batch_norm(config: Config, model: nn.Module, collective: Collective) -> None:
    m = collective.world_size
    if m == 1 or not has_batch_norm(model):
        return
    if config.bn and config.bn_batches < m:
        raise ConfigError(f"bn_batches is {config.bn_batches}: fewer than the {m} replicas")
    if not config.bn and (config.buffers == "keep" or not config.local):
        raise ConfigError(
            "bn is false: each replica would be evaluated with BatchNorm statistics of its own; "
            "set bn, or, with a local optimizer, buffers: average"
        )


def _steps_per_epoch(config: Config, train_data: TrainData) -> int:
    available = train_data.steps_per_epoch
    if config.steps_per_epoch > available:
        raise ConfigError(
            f"steps_per_epoch is {config.steps_per_epoch}: {train_data.images} images give "
            f"{available} steps of {config.total_batch_size}"
        )
    return available if config.steps_per_epoch == -1 else config.steps_per_epoch


def _open_data(
    config: Config, place: engine.Place, collective: Collective
) -> tuple[TrainData, ValData]:
    folder = absolute(config.data_pth) / config.data
    # The embedded data set is written where it is missing, once per host.
    if config.data == "digits" and place.local_rank == 0 and not (folder / "dataset.json").exists():
        from data import write  # imports scikit-learn, which takes a second

        write.write("digits", {"size": 32, "split": "test"}, folder)
    control.gather(collective, "data are there")
    common = {
        "rank": place.rank,
        "world_size": place.world_size,
        "resolution": config.resolution,
        "workers": config.nw,
        "device": place.device,
    }
    train = folder / "train.beton"
    images = checked(train).files[train.name].images
    if images < config.total_batch_size:
        raise ConfigError(
            f"total_batch_size is {config.total_batch_size}: {train} has {images} images"
        )
    train_data = TrainData(
        train,
        total_batch=config.total_batch_size,
        physical_batch=config.physical_batch_size,
        seed=config.seed,
        scale=config.crop_scale,
        flip=config.flip,
        padding=config.crop_padding,
        label_skew=config.label_skew,
        **common,
    )
    val_data = ValData(
        folder / "val.beton",
        batch=config.physical_batch_size,
        crop_ratio=config.val_crop_ratio,
        **common,
    )
    return train_data, val_data
