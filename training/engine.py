"""What a training step is: forward, backward, clip, update; and what it asks of an optimizer."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from localopt import SyncReport, Traffic

from .config import Config

# Images (b, 3, R, R) and labels (b,); where labels are mixed, probabilities (b, classes).
Batch = tuple[Tensor, Tensor]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ReplicaOptimizer(Protocol):
    """What training, records and checkpoints ask of an optimizer, local or data-parallel.

    As of `localopt.LocalOptimizer`, which says more of each.
    """

    inner: Optimizer
    param_groups: list[dict[str, Any]]
    synced: bool
    h: int
    round: int
    traffic: Traffic
    report: SyncReport | None
    drift: float | None

    def period(self, step: int, lr: float) -> int: ...
    def consensus(self) -> contextlib.AbstractContextManager[None]: ...
    def start_at(self, step: int) -> None: ...
    def finish(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass
class Measures:
    """What one step measures, 0-dim on the device: reading it costs a host synchronisation."""

    loss: Tensor  # mean training loss of the step's images
    correct: Tensor  # images whose label was predicted; with Mixup, whose larger part
    grad_norm: Tensor | None  # global norm of the gradient before clipping, if measured
    param_norm: Tensor | None  # global norm of the parameters before the step, if measured


class Engine(ABC):
    """A training step around a model on its device.

    How it computes and updates, with an optimizer of `training.optimizers`, is its subclass's.
    """

    agreed: bool  # whether all replicas hold the same model now
    centre: bool  # whether the consensus is kept in the optimizer's state
    # Loss scaling is the replica's own, as its gradients are; part of what is saved.
    scaler: torch.amp.GradScaler | None = None

    def __init__(
        self, config: Config, model: nn.Module, optimizer: ReplicaOptimizer, world_size: int
    ) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.accumulation = config.total_batch_size // world_size // config.physical_batch_size
        dtype = AUTOCAST.get(config.precision, torch.bfloat16)
        device, enabled = next(model.parameters()).device.type, config.precision in AUTOCAST
        self.autocast = functools.partial(torch.autocast, device, dtype, enabled=enabled)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, classes)."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add up the gradient of a micro-batch."""

    @abstractmethod
    def unscale(self) -> None:
        """Undo loss scaling in the gradient."""

    def record_loss(self, loss: Tensor) -> None:  # noqa: B027 (not all need it)
        """The loss of the step whose gradient is whole."""

    @abstractmethod
    def update(self) -> None:
        """After each micro-batch; after the last of a step the optimizer makes its own."""

    def step(self, micro_batches: Iterable[Batch], *, norms: bool = False) -> Measures:
        """One optimizer step on the mean loss of ``micro_batches``; ``norms``: measure them too."""
        losses: list[Tensor] = []
        correct: list[Tensor] = []
        for images, targets in micro_batches:
            logits = self.forward(images).float()  # (B, classes)
            loss = functional.cross_entropy(
                logits, targets, label_smoothing=self.config.label_smoothing
            )
            self.backward(loss)
            losses.append(loss.detach())
            labels = targets if targets.dim() == 1 else targets.argmax(1)
            correct.append((logits.detach().argmax(1) == labels).sum())
            if len(losses) == self.accumulation:
                grad_norm, param_norm = self._before_update(norms)
                mean_loss = torch.stack(losses).mean()
                self.record_loss(mean_loss)
            self.update()
        return Measures(mean_loss, torch.stack(correct).sum(), grad_norm, param_norm)

    @torch.no_grad()
    def _before_update(self, norms: bool) -> tuple[Tensor | None, Tensor | None]:
        """Clip the step's gradient: the replica's own, or the average where that is reduced."""
        if not (norms or self.config.clip_norm):
            return None, None
        self.unscale()
        parameters = list(self.model.parameters())
        if self.config.clip_norm:
            grad_norm = clip_grad_norm_(parameters, self.config.clip_norm)
        else:
            grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        return grad_norm, get_total_norm(parameters) if norms else None

    def uncompiled(self) -> contextlib.AbstractContextManager[None]:
        """Within the context a compiled model runs as it is written.

        Evaluation has batches of other sizes, which would be compiled anew.
        """
        if self.config.compile:
            return torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()


class OutOfMemoryError(RuntimeError):
    """The GPU's memory does not hold a step."""


def out_of_memory(batch: int, error: torch.OutOfMemoryError) -> OutOfMemoryError:
    """Say what would fit, where ``batch`` images at a time do not."""
    smaller = f"give --physical-batch-size {batch // 2} or less, and gradients add up as before"
    reason = next(iter(str(error).strip().splitlines()), "")
    return OutOfMemoryError(
        f"the GPU has too little memory for {batch} images at a time"
        f"{': ' + smaller if batch > 1 else ''} ({reason})"
    )
