"""A training step by DeepSpeed's engine, for local and for data-parallel optimizers."""

from __future__ import annotations

import argparse
import collections
import functools
import time
from abc import abstractmethod
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from localopt import LocalOptimizer
from localopt.collective import waiting

from . import distributed
from .config import Config
from .deepspeed_settings import deepspeed, settings_of
from .engine import Engine, ReplicaOptimizer
from .optimizers import DataParallel
from .values import ConfigError, absolute

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # isort: skip
from deepspeed.runtime.config import DeepSpeedConfigError  # isort: skip

# How DeepSpeed complains of its settings.
_REFUSALS = (DeepSpeedConfigError, NotImplementedError, ValueError, TypeError, AssertionError)


def engine_of(
    config: Config, model: nn.Module, optimizer: ReplicaOptimizer, world_size: int
) -> Engine:
    """The engine for the optimizer of ``config``; arguments and errors as those of the engines."""
    kind = LocalEngine if config.local else DataParallelEngine
    return kind(config, model, optimizer, world_size)


class _DeepSpeedEngine(Engine):
    """DeepSpeed's engine around a model.

    Raises:
        ConfigError: if the user's DeepSpeed JSON cannot be read or contradicts the run.
    """

    def __init__(
        self, config: Config, model: nn.Module, optimizer: ReplicaOptimizer, world_size: int
    ) -> None:
        super().__init__(config, model, optimizer, world_size)
        self._engine = self._initialized(optimizer if config.local else optimizer.inner)
        if config.compile:
            self.model.compile()
        self.scaler = self._engine.torch_autocast_z0_gradscaler
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Say what becomes of gradients."""

    def _initialized(self, client: torch.optim.Optimizer) -> deepspeed.DeepSpeedEngine:
        device = next(self.model.parameters()).device
        if device.type != deepspeed.accelerator.get_accelerator().device_name():
            # It would move the model to a GPU that is there and was not asked for.
            deepspeed.accelerator.set_accelerator(CPU_Accelerator())
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), verbose=False, timeout=distributed.PATIENCE
        )
        # Left alone it takes the GPU numbered LOCAL_RANK, which shared GPUs do not have.
        gpu = argparse.Namespace(device_rank=device.index or 0)
        settings = settings_of(self.config, self.accumulation)
        # Both optimizers have made the replicas equal; DeepSpeed's way refuses channels_last.
        with patch.object(deepspeed.DeepSpeedEngine, "_broadcast_model", lambda _: None):
            try:
                engine, *_ = deepspeed.initialize(
                    model=self.model, optimizer=client, config=settings, args=gpu,
                    dist_init_required=False,
                )  # fmt: skip
            except _REFUSALS as error:
                if not self.config.deepspeed_config:
                    raise
                refusal = f"DeepSpeed refuses it: {' '.join(str(error).split())}"
                path = absolute(self.config.deepspeed_config)
                raise ConfigError(f"deepspeed_config {path}: {refusal}") from None
        return engine

    def forward(self, images: Tensor) -> Tensor:
        return self._engine(images)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def unscale(self) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self._engine.optimizer)

    def update(self) -> None:
        self._engine.step()


class LocalEngine(_DeepSpeedEngine):
    """Around a local optimizer, for which DeepSpeed's gradient all-reduce is off."""

    optimizer: LocalOptimizer

    def _set_up(self) -> None:
        self._engine.enable_backward_allreduce = False
        self.centre = self.optimizer.sync.centre
        self._records_loss = self.config.track_replicas or self.optimizer.sync.needs_loss

    @property
    def agreed(self) -> bool:
        return self.optimizer.synced and self.optimizer.sync.replicas_agree

    def record_loss(self, loss: Tensor) -> None:
        if self._records_loss:
            self.optimizer.record_loss(loss)


class DataParallelEngine(_DeepSpeedEngine):
    """Around an optimizer whose gradients DeepSpeed averages, which is timed."""

    optimizer: DataParallel
    agreed, centre = True, False

    def _set_up(self) -> None:
        reduce, timer = self._engine.allreduce_gradients, _Timer(self.model)

        @functools.wraps(reduce)
        def timed(*args: Any, **kwargs: Any) -> None:
            before = timer.seconds
            with timer, waiting:
                reduce(*args, **kwargs)
            dtype = self._engine.communication_data_type
            self.optimizer.count_round(dtype, timer.seconds - before)

        self._engine.allreduce_gradients = timed


class _Timer:
    """Adds up the seconds inside its context; on a GPU by events, without waiting for it."""

    def __init__(self, model: nn.Module) -> None:
        self._device = next(model.parameters()).device
        self._pending: collections.deque[tuple[torch.Event, torch.Event]] = collections.deque()
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()
        if self._device.type != "cpu":
            self._event = torch.Event(self._device, enable_timing=True)
            self._event.record()

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cpu":
            self.seconds += time.perf_counter() - self._started
            return
        end = torch.Event(self._device, enable_timing=True)
        end.record()
        self._pending.append((self._event, end))
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self.seconds += begin.elapsed_time(end) / 1000
