"""RandAugment in batches, for images that are on a GPU already: the pixels of `data.randaugment`.

The plan is known on the host, so nothing here waits for the device. For each step images are sorted
by operation: what an operation works on is a slice. Every function returns new images for images
(g, height, width, 3) uint8, magnitudes (g, 1, 1, 1) float64 and matrices (g, 6) float64. Products
and sums are kernels of their own, so that no device fuses and rounds them otherwise than Pillow.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch

from data.randaugment import Operation, Plan

_PIXELS = 2**20  # at once: some 200 bytes each, 0.2 GB


def transform(images: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Carry out a plan.

    Args:
        images: (m, height, width, 3) uint8, on any device.
        plan: for m images of this size.

    Returns:
        (m, height, width, 3) uint8, in memory of its own.
    """
    device, (_, height, width, _) = images.device, images.shape
    operations, places = _sorted(plan.operations)
    magnitudes = upload(device, np.take_along_axis(plan.magnitudes, places, 0).T)  # (depth, m)
    matrices = np.take_along_axis(plan.matrices, places[..., None], 0)
    matrices = upload(device, matrices.swapaxes(0, 1))
    moves = upload(device, _rearrangements(places))
    most = max(_PIXELS // (height * width), 1)
    for step in range(operations.shape[1]):
        images = images[moves[step]]
        for function, kind in groupby(Operation, _FUNCTIONS.__getitem__):
            codes = list(kind)
            start = np.searchsorted(operations[:, step], codes[0])
            stop = np.searchsorted(operations[:, step], codes[-1], side="right")
            for first in range(start, stop, most):
                some = slice(first, min(first + most, stop))
                numbers = magnitudes[step, some].view(-1, 1, 1, 1)
                images[some] = function(images[some], numbers, matrices[step, some])
    return images[moves[-1]]


def _sorted(operations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each step's operations in ascending order, and whose they are: (m, depth) both."""
    places = np.argsort(operations, axis=0, kind="stable")
    return np.take_along_axis(operations, places, 0), places


def _rearrangements(places: np.ndarray) -> np.ndarray:
    """From the given order to the first step's, from each step's to the next one's, and back.

    Args:
        places: (m, depth) int64, which image is where during each step.

    Returns:
        (depth + 1, m) int64 indices.
    """
    given = np.arange(len(places))[:, None]
    orders = np.concatenate([given, places, given], axis=1)  # (m, depth + 2)
    now, then = np.argsort(orders[:, :-1], axis=0), orders[:, 1:]
    return np.take_along_axis(now, then, 0).T


def upload(device: torch.device, array: np.ndarray) -> torch.Tensor:
    """A copy on the device, which the host doesn't wait for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _autocontrast(images: torch.Tensor, _: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
    low = images.amin(dim=(1, 2), keepdim=True).double()
    high = images.amax(dim=(1, 2), keepdim=True).double()
    scale = torch.full_like(low, 255) / (high - low)  # 255 / … would multiply by the reciprocal
    stretched = (images * scale + -low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def _equalize(images: torch.Tensor, _: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
    pixels = images.flatten(1, 2).long()  # (g, height * width, 3)
    counts = pixels.new_zeros(len(images), 256, 3).scatter_add_(1, pixels, torch.ones_like(pixels))
    last = counts.gather(1, pixels.amax(dim=1, keepdim=True))
    step = (pixels.shape[1] - last) // 255  # (g, 1, 3)
    below = step // 2 + counts.cumsum(1) - counts
    table = (below // step.clamp(min=1)).clamp_(max=255).to(torch.uint8)
    equalized = table.gather(1, pixels).view_as(images)
    return torch.where(step[:, None] > 0, equalized, images)


def _posterize(images: torch.Tensor, bits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    unused = (8 - bits).to(torch.uint8)
    return images >> unused << unused


def _solarize(images: torch.Tensor, threshold: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return torch.where(images < threshold, images, 255 - images)


def _contrast(images: torch.Tensor, factor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    luma = _luma(images)
    pixels, total = luma[0].numel(), luma.sum(dim=(1, 2, 3), keepdim=True)
    return _blend((2 * total + pixels) // (2 * pixels), images, factor)


def _brightness(images: torch.Tensor, factor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return _blend(torch.zeros_like(factor), images, factor)


def _color(images: torch.Tensor, factor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return _blend(_luma(images), images, factor)


def _sharpness(images: torch.Tensor, factor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """All but the border, which stays."""
    values = images.short()
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = values[:, 1:-1, 1:-1]
    result = images.clone()
    result[:, 1:-1, 1:-1] = _blend((sums + 4 * inner + 6) // 13, inner, factor)
    return result


def _luma(images: torch.Tensor) -> torch.Tensor:
    """(g, height, width, 1) int32."""
    red, green, blue = images.int().split(1, dim=3)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(degenerate: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    start = degenerate.float()
    mixed = start + factor.float() * (images.float() - start)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _move(images: torch.Tensor, _: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    count, height, width, _ = images.shape
    a, b, c, d, e, f = matrices.view(count, 6, 1, 1).unbind(1)
    columns = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5
    rows = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5
    x, y = a * columns + b * rows + c, d * columns + e * rows + f  # (g, height, width)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = (x - 0.5).floor_(), (y - 0.5).floor_()
    dx, dy = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]

    def corner(down: int, right: int) -> torch.Tensor:
        row, column = (top + down).clamp_(0, height - 1), (left + right).clamp_(0, width - 1)
        index = (row * width + column).long().view(count, -1, 1).expand(-1, -1, 3)
        return images.flatten(1, 2).gather(1, index).view_as(images).double()

    above = _between(corner(0, 0), corner(0, 1), dx)
    below = _between(corner(1, 0), corner(1, 1), dx)
    return _between(above, below, dy).to(torch.uint8) * inside[..., None]


def _between(a: torch.Tensor, b: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return a + (b - a) * share


_Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_FUNCTIONS: dict[Operation, _Function] = {
    Operation.AUTOCONTRAST: _autocontrast,
    Operation.EQUALIZE: _equalize,
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: _solarize,
    Operation.CONTRAST: _contrast,
    Operation.BRIGHTNESS: _brightness,
    Operation.COLOR: _color,
    Operation.SHARPNESS: _sharpness,
    Operation.ROTATE: _move,
    Operation.SHEAR_X: _move,
    Operation.SHEAR_Y: _move,
    Operation.TRANSLATE_X: _move,
    Operation.TRANSLATE_Y: _move,
}
