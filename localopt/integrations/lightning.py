"""Lightning with replicas that train apart: a strategy, and evaluation of their consensus."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from ..optimizer import LocalOptimizer


class LocalStrategy(DDPStrategy):
    """Lightning's ``ddp`` without `DistributedDataParallel`: gradients stay each replica's own.

    ``configure_optimizers`` of the module must return a `LocalOptimizer`. Everything else is as
    with ``ddp``: processes, devices, shares of the data. At the end of training the replicas agree
    (`LocalOptimizer.finish`).

    Every rank saves its own checkpoint: rank 0 the file that Lightning names, rank r the same with
    ``.rank<r>`` at its end. All are loaded again by ``fit(ckpt_path=...)``, also in the middle of
    a round. Do not use ``ModelCheckpoint(save_last="link")``: rank 0's file alone would be linked.

    Lightning asks all ranks at every batch whether one has had SIGTERM; here it does not, for that
    would be a collective at every step. So a signal to stop must reach all ranks, as launchers see
    to. Each then stops after its batch, or with an error where it waits for one that has.

    Args:
        arguments: those of `DDPStrategy` that are about processes, such as ``timeout`` or
            ``process_group_backend``.

    Raises:
        TypeError: from ``fit``, if an optimizer is not a `LocalOptimizer`.
        FileNotFoundError: where a checkpoint that is loaded has no file of this rank, as one of
            fewer replicas.

    Example:
        >>> trainer = Trainer(strategy=LocalStrategy(), callbacks=[ConsensusEvaluation()])
    """

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as ``ddp`` does.

        Args:
            trainer: the trainer.

        Raises:
            TypeError: if an optimizer is not a `LocalOptimizer`.
        """
        super().setup(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, LocalOptimizer):
                raise TypeError(
                    f"configure_optimizers() returned {type(optimizer).__name__}, which never "
                    "synchronises: LocalStrategy needs a LocalOptimizer, such as LocalAdamW"
                )
        # Lightning 2.6 asks all ranks at every batch whether one has had SIGTERM, and at SIGTERM
        # answers with a collective that would meet one of localopt's.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _ask_nobody
        trainer._signal_connector._sigterm_notifier_fn = partial(_stop, trainer)

    def configure_ddp(self) -> None:
        """Leave the model as it is."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: who builds a `LocalOptimizer` starts from rank 0's weights."""
        return True

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | PathLike[str], storage_options: Any = None
    ) -> None:
        """Write this rank's checkpoint.

        Args:
            checkpoint, storage_options: as for Lightning's own.
            filepath: rank 0's file.
        """
        own = self._own(filepath)
        self.checkpoint_io.save_checkpoint(checkpoint, own, storage_options=storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this rank's checkpoint.

        Args:
            checkpoint_path: rank 0's file.
            weights_only: as for Lightning's own.

        Raises:
            FileNotFoundError: if there is none of this rank.
        """
        return super().load_checkpoint(self._own(checkpoint_path), weights_only=weights_only)

    def remove_checkpoint(self, filepath: str | PathLike[str]) -> None:
        """Remove this rank's checkpoint.

        Args:
            filepath: rank 0's file.
        """
        self.checkpoint_io.remove_checkpoint(self._own(filepath))

    def on_train_end(self) -> None:
        """Let the replicas agree."""
        for optimizer in self.optimizers:
            optimizer.finish()

    def _own(self, filepath: str | PathLike[str]) -> str:
        return f"{filepath}.rank{self.global_rank}" if self.global_rank else str(filepath)


class ConsensusEvaluation(pl.Callback):
    """Validates the consensus (`LocalOptimizer.consensus`) instead of each rank's own replica.

    The replicas have their own weights again before the module's ``on_validation_epoch_end``, and
    before a checkpoint is saved. Where validation always comes when no round is open it is
    not needed.
    """

    def __init__(self) -> None:
        self._inside = ExitStack()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the consensus. Collective.

        Args:
            trainer, pl_module: Lightning's.
        """
        for optimizer in trainer.optimizers:  # none where nothing is trained
            self._inside.enter_context(optimizer.consensus())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the replica.

        Args:
            trainer, pl_module: Lightning's.
        """
        self._inside.close()


def _ask_nobody() -> None:
    pass


def _stop(trainer: pl.Trainer, signal: int, frame: object) -> None:
    """Lightning's answer to SIGTERM without its collective."""
    if trainer.strategy.launcher is not None and not trainer.received_sigterm:
        trainer.strategy.launcher.kill(signal)
    trainer._signal_connector.received_sigterm = True
