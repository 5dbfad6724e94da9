"""A small network, and steps of training it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def backward(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))  # (B, 4)
    loss = model(x).square().sum()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *also: Any) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        for scheduler in also:
            scheduler.step()


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
