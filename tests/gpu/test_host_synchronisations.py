"""The training step never waits for the GPU: the host runs ahead, and launches are hidden."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.gpu.links import GLOO, device_of
from tests.support.ranks import run
from training import distributed, models, optimizers
from training.deepspeed_engine import engine_of
from training.lr import Schedule
from training.methods import Mixup
from training.settings import load

pytestmark = pytest.mark.slow


def losses(rank: int, m: int, recipe: str, device: str) -> list[float]:
    """Of two steps in mid-round, each of which raises where it waits for the GPU."""
    model_name = {"v": "simplevit-ti16", "r": "resnet18"}[recipe[0]]
    config = load(["--recipe-pth", f"recipe/{recipe}.yml", "--model", model_name])
    config = replace(config, total_batch_size=8, physical_batch_size=4, h_base=3, device=device)
    process = distributed.join(config)
    model = models.build(model_name, classes=10, resolution=224, seed=0).to(process.device)
    optimizer = optimizers.build(config, model, Schedule.of(config, 100))
    trainer = engine_of(config, model, optimizer, world_size=1)
    mixup = Mixup(0.2, seed=0, classes=10, first=0, physical_batch=4)
    batch = torch.randn(4, 3, 224, 224, device=device), torch.arange(4, device=device)

    def step(number: int) -> torch.Tensor:
        micro_batches = (mixup(batch, number, micro_step) for micro_step in (0, 1))
        return trainer.step(micro_batches, norms=True).loss

    for number in range(3):  # allocations and cuDNN's choices
        step(number)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    told = [step(number) for number in (3, 4)]  # the round's end, at 6, reads its header
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return torch.stack(told).tolist()


@pytest.mark.parametrize("link", ["cpu", GLOO])
@pytest.mark.parametrize("recipe", ["vit-b-localadamw-cosine", "resnet50-localsgd-cosine"])
def test_a_step_between_records_makes_no_host_synchronisation(recipe: str, link: str) -> None:
    """On the CPU this shows that the steps are made."""
    (told,) = run(losses, 1, recipe, device_of(link), on=link)
    assert len(told) == 2 and np.isfinite(told).all()
