"""What is trained, whatever the strategy: the digits, a small network, and a replica's share.

The order of the data and the first weights are functions of the seed alone. The number of processes
decides only who computes which part of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from data.order import epoch_order

MEAN, STD = 0.3044, 0.3754  # of the training images' pixels, from 0 to 1


def convnet() -> nn.Module:
    """76,522 weights; gets (b, 1, 8, 8). Without BatchNorm, which would couple a shard's images."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@dataclass(frozen=True)
class Task:
    """The same for every process. The tensors lie in memory that all processes share.

    Attributes:
        images, labels: (n, …) and (n,), to train on; weights get the images' dtype.
        test_images, test_labels: to evaluate on.
        batch_size: B, the joint batch: images per update, over all processes together.
        epochs, lr, seed: of the training.
        build: makes the network; a function at the top of a module.
    """

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    batch_size: int
    epochs: int
    lr: float
    seed: int
    build: Callable[[], nn.Module] = convnet

    @property
    def updates(self) -> int:
        """Per epoch. The last batch has what is left."""
        return -(-len(self.images) // self.batch_size)


def digits_task(*, train_size: int | None, split: str = "test", **settings: float) -> Task:
    """The embedded digits as they are, 8 × 8 pixels, grey.

    Args:
        train_size: how many images to train on; None for all. Of any two sizes with the same seed
            the smaller one's images are among the larger one's.
        split: see `data.digits.digits`.
        settings: batch_size, epochs, lr and seed.

    Raises:
        ValueError: more images wanted than there are, or the batch is larger than the data.
    """
    from data.digits import digits  # scikit-learn takes a second to import: once is enough

    train, test = digits(split, size=8)
    size = len(train.labels) if train_size is None else train_size
    if size > len(train.labels):
        raise ValueError(f"--train-size {size}: there are {len(train.labels)} training images")
    if settings["batch_size"] > size:
        raise ValueError(
            f"--batch-size {settings['batch_size']} exceeds the {size} training images"
        )
    chosen = epoch_order(len(train.labels), int(settings["seed"]), 0)[:size]
    images, test_images = (
        torch.from_numpy(part[:, None, :, :, 0]).float().div_(255).sub_(MEAN).div_(STD)
        for part in (train.images[chosen], test.images)
    )
    labels = torch.from_numpy(train.labels[chosen])
    return Task(images, labels, test_images, torch.from_numpy(test.labels), **settings)


class Batch(NamedTuple):
    """A replica's shard of one joint batch, and what its summed loss is to be multiplied by."""

    images: torch.Tensor
    labels: torch.Tensor
    weight: float


class Replica:
    """A copy of the model: its weights and its gradient as one vector each, and its shard.

    The model's parameters are views of the two vectors, so what is sent is one piece of memory and
    need not be gathered first.

    Args:
        task: see `Task`.
        device: where it computes.
        shard, shards: which share of each batch is this replica's, and of how many.

    Attributes:
        model: the network.
        weights, gradient: (P,) vectors.
        loss_sum: of all images this replica has computed; the caller sets it to zero.
    """

    def __init__(
        self, task: Task, device: torch.device | str = "cpu", shard: int = 0, shards: int = 1
    ) -> None:
        self.task, self.device = task, torch.device(device)
        self._shard, self._shards = shard, shards
        torch.manual_seed(task.seed)
        self.model = task.build().to(self.device, task.images.dtype)
        parameters = list(self.model.parameters())
        self.weights = parameters_to_vector(parameters).detach()
        vector_to_parameters(self.weights, parameters)  # makes them views of it
        self.gradient = torch.zeros_like(self.weights)
        parts = self.gradient.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self.loss_sum = torch.zeros((), device=self.device)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """This replica's shard of each joint batch of an epoch.

        Of a joint batch of b images, shard r gets b_r, which may differ by one between shards. If
        every shard's summed loss is multiplied by R / b, the plain mean of the R gradients

            1/R Σ_r (R / b) Σ_{i in shard r} ∇ℓ_i  =  1/b Σ_i ∇ℓ_i

        is the joint batch's, whatever the b_r are; a mean of the shards' means would not be.
        """
        task = self.task
        order = epoch_order(len(task.images), task.seed, epoch + 1)
        for start in range(0, len(order), task.batch_size):
            joint = order[start : start + task.batch_size]
            mine = torch.from_numpy(np.array_split(joint, self._shards)[self._shard])
            yield Batch(
                task.images[mine].to(self.device),
                task.labels[mine].to(self.device),
                self._shards / len(joint),
            )

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The weighted loss of a shard, by this replica's model or what is wrapped around it."""
        total = cross_entropy(model(batch.images), batch.labels, reduction="sum")
        self.loss_sum += total.detach()
        return batch.weight * total

    def differentiate(self, batch: Batch) -> None:
        """Compute `gradient` on a shard."""
        self.gradient.zero_()
        self.loss(self.model, batch).backward()

    def step(self) -> None:
        """w ← w − γ g: plain SGD."""
        self.weights.sub_(self.gradient, alpha=self.task.lr)

    @torch.no_grad()
    def accuracy(self) -> float:
        """On the test images."""
        guesses = self.model(self.task.test_images.to(self.device)).argmax(1).cpu()
        return (guesses == self.task.test_labels).float().mean().item()
