"""Checks that take more than the config: the number of replicas, the images, the model.

The run makes them, and so does its plan, which never imports DeepSpeed.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from .config import Config
from .evaluate import has_batch_norm
from .models import gains_by_compiling, takes_any_resolution
from .values import ConfigError, absolute


def with_fitting_batches(config: Config, replicas: int) -> Config:
    """``config`` with a physical batch no larger than a replica's share of the total.

    Raises:
        ConfigError: if replicas or micro-steps would not share the batch evenly, or Mixup leave an
            image alone.
    """
    total = config.total_batch_size
    if total % replicas:
        raise ConfigError(f"total_batch_size is {total}: not divisible by the {replicas} replicas")
    physical = min(config.physical_batch_size, total // replicas)
    if total // replicas % physical:
        raise ConfigError(
            f"physical_batch_size is {physical}: it does not divide a replica's batch of "
            f"{total // replicas} (total_batch_size {total} over {replicas} replicas)"
        )
    if config.mixup and physical % 2:
        raise ConfigError(
            f"physical_batch_size is {physical}: mixup pairs neighbours, so it must be even"
        )
    return dataclasses.replace(config, physical_batch_size=physical)


def with_resolution(config: Config, side: int | None) -> Config:
    """``config`` with the images' own resolution, where it leaves that to them.

    Their ``side`` is None where they differ.

    Raises:
        ConfigError: if it leaves it to images that differ.
    """
    if config.resolution != -1:
        return config
    if side is None:
        raise ConfigError(f"resolution is -1: images of {config.data} differ in size; give one")
    return dataclasses.replace(config, resolution=side)


def with_compile(config: Config, device: torch.device) -> Config:
    """``config`` saying whether to compile the model, where it leaves that to the ``device``."""
    if config.compile is not None:
        return config
    gains = device.type != "cpu" and gains_by_compiling(config.model)
    return dataclasses.replace(config, compile=gains)


def check_model(config: Config, model: nn.Module, replicas: int) -> None:
    """Refuse settings that the model cannot have.

    Raises:
        ConfigError: if images of changing size would not fit, or replicas would be evaluated with
            BatchNorm statistics of their own.
    """
    if config.resize_initial_scale < 1 and not takes_any_resolution(model):
        raise ConfigError(
            f"resize_initial_scale is {config.resize_initial_scale}: model {config.model} takes "
            "images of one size only"
        )
    if replicas == 1 or not has_batch_norm(model):
        return
    if config.bn and config.bn_batches < replicas:
        raise ConfigError(f"bn_batches is {config.bn_batches}: fewer than the {replicas} replicas")
    if not config.bn and (config.buffers == "keep" or not config.local):
        raise ConfigError(
            "bn is false: each replica would be evaluated with BatchNorm statistics of its own; "
            "set bn, or, with a local optimizer, buffers: average"
        )


def steps_per_epoch(config: Config, images: int) -> int:
    """Steps in an epoch, of the whole batches that ``images`` give.

    Raises:
        ConfigError: if there are too few, or ``config`` asks for more.
    """
    if images < config.total_batch_size:
        raise ConfigError(
            f"total_batch_size is {config.total_batch_size}: {config.data} has {images} images"
        )
    available = images // config.total_batch_size
    if config.steps_per_epoch > available:
        raise ConfigError(
            f"steps_per_epoch is {config.steps_per_epoch}: {images} images give "
            f"{available} steps of {config.total_batch_size}"
        )
    return available if config.steps_per_epoch == -1 else config.steps_per_epoch


def check_start(config: Config, step: int, total_steps: int) -> None:
    """Refuse to go on from a step that is past the run's end."""
    if step > total_steps:
        raise ConfigError(
            f"resume_pth {absolute(config.resume_pth)}: step {step}, to go on from, is past "
            f"this run's end at {total_steps}; raise epochs"
        )
