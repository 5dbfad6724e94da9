"""What carries out RandAugment on a GPU: Triton's kernels where they prove right, else torch's.

Triton's are two large kernels a step, torch's many small ones. What Triton makes of its kernels
depends on its version, the driver and the card, so they are compared with torch's once per device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import numpy as np
import torch

from data import randaugment_torch
from data.randaugment import Operation, Plan, RandAugment, matrices

Transform = Callable[[torch.Tensor, Plan], torch.Tensor]

_TRITON = "data.randaugment_triton"
_EACH = 4  # images of the sample for each operation
_SIZE = 90, 70  # more pixels than a kernel reads at once, and no multiple of that
# On noise these bring sums so close to integers that a fused product shows.
_TELLING = {
    Operation.CONTRAST: 1.6,
    Operation.COLOR: 1.6,
    Operation.SHARPNESS: 1.6,
    Operation.SHEAR_X: 0.2,
    Operation.SHEAR_Y: 0.2,
}


@cache
def transform_for(device: torch.device) -> Transform:
    """The faster one that is right; warns where that is torch's on a GPU, and waits for it once."""
    return _compared(device) if device.type == "cuda" else randaugment_torch.transform


def _compared(device: torch.device) -> Transform:
    try:
        transform = import_module(_TRITON).transform
        reason = _difference(transform, device)
    except Exception as error:  # no Triton, no C compiler, a driver too old: each its own
        lines = str(error).split("\n")
        reason = f"{type(error).__name__}: {next(filter(str.strip, reversed(lines)), '')[:200]}"
    if reason is None:
        return transform
    warnings.warn(f"RandAugment is slower on {device}, without Triton: {reason}", stacklevel=3)
    return randaugment_torch.transform


def _difference(transform: Transform, device: torch.device) -> str | None:
    """Operations of which some pixel differs from torch's; None if all are equal."""
    images, plan = _sample()
    there = torch.from_numpy(images).to(device)
    found, expected = transform(there, plan), randaugment_torch.transform(there, plan)
    wrong = (found != expected).flatten(1).any(1).cpu().numpy()
    names = [Operation(code).name for code in np.unique(plan.operations[wrong])]
    return f"its pixels differ in {', '.join(names)}" if names else None


def _sample() -> tuple[np.ndarray, Plan]:
    """Noise: one value, all, and various ranges; every operation with a few magnitudes."""
    random, count = np.random.default_rng(0), _EACH * len(Operation)
    low, high = np.sort(random.integers(0, 256, (2, count, 1, 1, 3)), axis=0)
    high[::_EACH] = low[::_EACH]
    low[1::_EACH], high[1::_EACH] = 0, 255
    images = random.integers(low, high + 1, (count, *_SIZE, 3)).astype(np.uint8)
    draws = random.random((count, 1, 3))
    draws[:, 0, 0] = (np.arange(count) // _EACH + 0.5) / len(Operation)
    operations, magnitudes, _ = RandAugment(1).planned(draws, *_SIZE)
    for operation, magnitude in _TELLING.items():
        magnitudes[np.flatnonzero(operations == operation)[1]] = magnitude
    return images, Plan(operations, magnitudes, matrices(operations, magnitudes, *_SIZE))
