"""Hugging Face's Trainer with replicas that train apart."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from ..optimizer import LocalOptimizer
from ..sync import Rule


class LocalTrainer(Trainer):
    """`transformers.Trainer` whose optimizer synchronises the replicas, instead of their gradients.

    The optimizer is what the Trainer's arguments say (or ``optimizers=``), in a `LocalOptimizer`.
    The model is not wrapped in `DistributedDataParallel`, so gradients, and their clipping, stay
    each replica's own. Tokens are counted on each replica (``average_tokens_across_devices`` is
    turned off): to add them up over all would be a collective at every step.

    What is evaluated, and what `save_model` writes, is the consensus; at the end of training the
    replicas agree (`LocalOptimizer.finish`). Call both on all ranks. In the folder of a checkpoint
    each rank has a file of its own, ``replica_<rank>.pt``, so that
    ``train(resume_from_checkpoint=...)`` goes on in the middle of a round.

    Args:
        arguments: those of `transformers.Trainer`.
        period: when to synchronise, as for `LocalOptimizer`.
        sync: how; `Average` by default.
        settings: further keyword arguments of `LocalOptimizer`, such as ``{"track_drift": True}``.

    Attributes:
        local_optimizer: the `LocalOptimizer` (``optimizer`` is what Accelerate wraps it in); None
            before `train`.

    Raises:
        ValueError: with DeepSpeed or FSDP, which share out the optimizer in their own way.
        RuntimeError: if the Trainer does not know of the other ranks.
    """

    def __init__(
        self,
        *arguments: Any,
        period: Callable[[int, float], int],
        sync: Rule | None = None,
        settings: dict[str, Any] | None = None,
        **named: Any,
    ) -> None:
        self._how = {"period": period, "sync": sync, **(settings or {})}
        self._loss: Tensor | float = 0.0
        self.local_optimizer: LocalOptimizer | None = None
        super().__init__(*arguments, **named)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("LocalTrainer works with neither DeepSpeed nor FSDP")
        if dist.is_initialized() and dist.get_world_size() != self.args.world_size:
            raise RuntimeError(
                f"there are {dist.get_world_size()} ranks, and the Trainer knows of "
                f"{self.args.world_size}: all would train on the same data. On CPUs it needs "
                "TrainingArguments(use_cpu=True)"
            )
        self.args.average_tokens_across_devices = False

    def create_accelerator_and_postprocess(self) -> None:
        """Make the Accelerator; it prepares models without DistributedDataParallel."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_model(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
            # It is on its device already: to move it again would take the optimizer's memory away.
            return prepare(model, device_placement=False, evaluation_mode=True)

        self.accelerator.prepare_model = prepare_model

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Make the Trainer's optimizer, and put it in a `LocalOptimizer`. Collective.

        Args:
            model: as for the Trainer's own.
        """
        if self.local_optimizer is None:
            inner = super().create_optimizer(model)
            self.local_optimizer = LocalOptimizer(inner, model=self.model, **self._how)
            self.optimizer = self.local_optimizer
        return self.optimizer

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """Go forward and backward, and take note of the loss.

        Args:
            arguments, named: as for the Trainer's own.
        """
        loss = super().training_step(*arguments, **named)
        self._loss = self._loss + loss
        if self.accelerator.sync_gradients:  # a step's last batch, where it accumulates gradients
            self._made().record_loss(self._loss)
            self._loss = 0.0
        return loss

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """Evaluate the consensus. Collective.

        Args:
            arguments, named: as for the Trainer's own.
        """
        with self._consensus():
            return super().evaluation_loop(*arguments, **named)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the consensus. Collective.

        Args:
            output_dir: the folder; the Trainer's ``output_dir`` by default.
        """
        with self._consensus():
            super().save_model(output_dir, _internal_call)

    def _made(self) -> LocalOptimizer:
        assert self.local_optimizer is not None, "train() makes it first"
        return self.local_optimizer

    def _consensus(self) -> AbstractContextManager[None]:
        return nullcontext() if self.local_optimizer is None else self.local_optimizer.consensus()

    def _finalize_training(self, *arguments: Any, **named: Any) -> Any:
        self._made().finish()  # before the best model is loaded: some rules would undo it
        return super()._finalize_training(*arguments, **named)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)  # rank 0 may be late
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._made().state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
        }
        torch.save(state, self._own(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(self._own(checkpoint), map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])  # what the Trainer has loaded is the consensus
        self._made().load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["scheduler"])

    def _own(self, folder: str) -> str:
        return os.path.join(folder, f"replica_{self.args.process_index}.pt")
