"""LocalAdamW with QSR in Lightning.

    pip install -e '.[examples]'
    torchrun --nproc-per-node 2 examples/lightning_module.py --folder teacher

`teacher` gets `consensus.pt`, the weights to use, and one checkpoint per rank. With `--stop 3` it
stops after three epochs; the first command goes on from there, bit for bit as if it had not been
stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from localopt import QSR, LocalAdamW
from localopt.integrations.lightning import ConsensusEvaluation, LocalStrategy

EPOCHS, BATCH, IMAGES = 8, 32, 4096


class Classifier(pl.LightningModule):
    """A small network, its loss, and how it is optimised."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.network(inputs), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        inputs, labels = batch
        right = (self.network(inputs).argmax(1) == labels).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def configure_optimizers(self) -> dict:
        steps = int(self.trainer.estimated_stepping_batches)
        # Lightning hands out a wrapper of it: this is where finish(), traffic and the rest are.
        self.optimizer = LocalAdamW(
            self.parameters(),
            lr=3e-3,
            weight_decay=0.05,
            period=QSR(alpha=6e-3, base=4, total_steps=steps),
            model=self,
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class StopAfter(pl.Callback):
    """Stops after some epochs, as at the end of a job's time; the schedule is of all of them."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="saves here, goes on from here")
    parser.add_argument("--stop", type=int, default=EPOCHS, help="stop after so many epochs")
    options = parser.parse_args()

    torch.manual_seed(0)
    inputs = torch.randn(IMAGES + 1024, 32)
    labels = nn.Linear(32, 10)(inputs).argmax(1)  # a teacher stands for your labels
    model = Classifier()
    # Lightning gives each replica its own share of both.
    training = DataLoader(TensorDataset(inputs[:IMAGES], labels[:IMAGES]), BATCH, shuffle=True)
    validation = DataLoader(TensorDataset(inputs[IMAGES:], labels[IMAGES:]), 256)

    checkpoint = options.folder / "checkpoint.ckpt"
    trainer = pl.Trainer(
        strategy=LocalStrategy(),
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,  # of each replica's own gradients
        callbacks=[
            ConsensusEvaluation(),
            StopAfter(options.stop),
            ModelCheckpoint(options.folder, checkpoint.stem, enable_version_counter=False),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, training, validation, ckpt_path=checkpoint if checkpoint.exists() else None)

    if trainer.is_global_zero:
        # All agree now: fit() has ended.
        torch.save(model.state_dict(), options.folder / "consensus.pt")
        accuracy, traffic = trainer.callback_metrics["accuracy"], model.optimizer.traffic
        print(
            f"step {trainer.global_step}: accuracy {accuracy:.1%}, {traffic.syncs} "
            f"synchronisations, {traffic.bytes / 1e6:.2f} MB sent per replica"
        )


if __name__ == "__main__":
    main()
