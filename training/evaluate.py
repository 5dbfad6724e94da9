"""Evaluation: every validation image once, BatchNorm statistics re-estimated first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from localopt.collective import Collective

Batches = Iterable[tuple[Tensor, Tensor]]
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1] and mean cross-entropy over ``images`` validation images."""

    top1: float
    top5: float
    loss: float
    images: int


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer keeps running statistics."""
    return bool(_batch_norms(model))


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, collective: Collective, autocast: Autocast
) -> Evaluation:
    """Top-1, top-5 and loss over this rank's ``batches`` and those of all others. Collective.

    Images (B, 3, R, R), labels (B,). Each image counts once, however ranks share them.
    """
    was_training = model.training
    model.eval()
    # Counts in float64 are exact up to 2^53 images.
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, loss, images
    for images, labels in batches:
        with autocast():
            logits = model(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack(
            [best[:, 0].sum(), best.sum(), loss.double(), torch.tensor(len(labels), device=device)]
        )
    model.train(was_training)
    collective.sum_([totals])
    top1, top5, loss_sum, count = totals.tolist()
    return Evaluation(top1 / count, top5 / count, loss_sum / count, int(count))


@torch.no_grad()
def estimate_batch_norm(
    model: nn.Module, batches: Batches, collective: Collective, autocast: Autocast
) -> None:
    """Replace BatchNorm's running statistics by their means over training batches. Collective.

    Each rank averages over its own ``batches``; the ranks' averages are then weighted by their
    number of batches. The model's buffers change: call it inside `consensus`.

    Raises:
        ValueError: if no rank has a batch.
    """
    norms = _batch_norms(model)
    was_training = model.training
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    count = 0
    for images, _ in batches:
        with autocast():
            model(images)
        count += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)
    _weigh_together(norms, count, collective)


class Statistics:
    """BatchNorm statistics of the models that were evaluated last, for a checkpoint of that step.

    They are the consensus's, or its moving average's: no replica has them.
    """

    def __init__(self) -> None:
        self._step, self._kept = -1, dict[str, dict[str, Tensor]]()

    def keep(self, step: int, what: str, model: nn.Module) -> None:
        """``model`` is evaluated after ``step`` steps as ``what``, with the statistics it has."""
        if step != self._step:
            self._step, self._kept = step, {}
        norms = set(_batch_norms(model))
        self._kept[what] = {
            f"{prefix}.{name}".lstrip("."): statistic.clone()
            for prefix, norm in model.named_modules()
            if norm in norms
            for name, statistic in norm.named_buffers(recurse=False)
            if name in ("running_mean", "running_var")
        }

    def after(self, step: int) -> dict[str, dict[str, Tensor]]:
        """By what was evaluated after ``step`` steps, its statistics by their names."""
        return self._kept if step == self._step else {}


def _weigh_together(norms: list[_BatchNorm], count: int, collective: Collective) -> None:
    statistics = [s for n in norms for s in (n.running_mean, n.running_var) if s is not None]
    packed = torch.cat([s.double() for s in statistics]) * count
    packed = torch.cat([packed, packed.new_tensor([count])])
    collective.sum_([packed])
    total = float(packed[-1])
    if total == 0:
        raise ValueError("BatchNorm statistics cannot be estimated from zero batches")
    means = (packed[:-1] / total).split([len(s) for s in statistics])
    for statistic, mean in zip(statistics, means, strict=True):
        statistic.copy_(mean)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
