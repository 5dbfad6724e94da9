"""RandAugment in two Triton kernels a step, for images on a GPU: the pixels of `data.randaugment`.

The first fills the tables of operations that replace each channel's values by others, the second
makes the pixels, each from the image as it was before the step. Both look up on the device what an
image's operation is. Products and sums must round apart, as Pillow's do: launches forbid fusion.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from data.randaugment import Operation, Plan
from data.randaugment_torch import upload

_AUTOCONTRAST = tl.constexpr(int(Operation.AUTOCONTRAST))
_EQUALIZE = tl.constexpr(int(Operation.EQUALIZE))
_POSTERIZE = tl.constexpr(int(Operation.POSTERIZE))
_SOLARIZE = tl.constexpr(int(Operation.SOLARIZE))
_CONTRAST = tl.constexpr(int(Operation.CONTRAST))
_BRIGHTNESS = tl.constexpr(int(Operation.BRIGHTNESS))
_COLOR = tl.constexpr(int(Operation.COLOR))
_SHARPNESS = tl.constexpr(int(Operation.SHARPNESS))

_FIELDS = tl.constexpr(8)  # of an image's step: operation, magnitude and the matrix's six numbers

# Pixels that a program has at once, and its warps.
_READ = {"BLOCK": 4096, "num_warps": 8}
_WRITE = {"BLOCK": 512, "num_warps": 4}


def transform(images: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Carry out a plan; the host doesn't wait for the device.

    Args:
        images: (m, height, width, 3) uint8, on a GPU.
        plan: for m images of this size.

    Returns:
        (m, height, width, 3) uint8, in memory of its own.
    """
    count, height, width, _ = images.shape
    if not images.numel() or not plan.operations.size:
        return images.clone()
    images, steps = images.contiguous(), upload(images.device, _packed(plan))
    tables = torch.empty((count, 3, 256), dtype=torch.uint8, device=images.device)
    blocks = triton.cdiv(height * width, _WRITE["BLOCK"])
    with torch.cuda.device_of(images):
        for step in steps:
            result = torch.empty_like(images)
            _fill[(3 * count,)](
                images, step, tables, height, width, **_READ, enable_fp_fusion=False
            )
            _apply[(count * blocks,)](
                images, step, tables, result, height, width, **_WRITE, enable_fp_fusion=False
            )
            images = result
    return images


def _packed(plan: Plan) -> np.ndarray:
    """A plan in one array, for one copy: (depth, m, 8) float64."""
    numbers = np.stack([plan.operations, plan.magnitudes], axis=-1)
    return np.concatenate([numbers, plan.matrices], axis=-1).swapaxes(0, 1)


# Sizes are no part of what is compiled: one compilation serves them all.
_kernel = triton.jit(do_not_specialize=["height", "width"])


@_kernel
def _fill(images, step, tables, height, width, BLOCK: tl.constexpr):
    """Fill the tables (m, 3, 256) uint8, a program for each channel of an image.

    Tables of operations that have none stay as they are.

    Args:
        images: (m, height, width, 3) uint8.
        step: (m, 8) float64, see `_FIELDS`.
    """
    program = tl.program_id(0)
    image, channel = (program // 3).to(tl.int64), program % 3
    pixels = height * width
    operation = tl.load(step + image * _FIELDS).to(tl.int32)
    if operation <= _BRIGHTNESS:
        magnitude = tl.load(step + image * _FIELDS + 1)
        source = images + image * pixels * 3
        values = tl.arange(0, 256)
        if operation == _AUTOCONTRAST:
            table = _autocontrast(source + channel, pixels, values, BLOCK)
        elif operation == _EQUALIZE:
            table = _equalize(source + channel, pixels, values, BLOCK)
        elif operation == _POSTERIZE:
            unused = 8 - magnitude.to(tl.int32)
            table = values >> unused << unused
        elif operation == _SOLARIZE:
            table = tl.where(values < magnitude.to(tl.int32), values, 255 - values)
        elif operation == _CONTRAST:
            grey = _mean_luma(source, pixels, BLOCK)
            table = _blend(grey, values, magnitude.to(tl.float32))
        else:
            table = _blend(tl.zeros_like(values), values, magnitude.to(tl.float32))
        tl.store(tables + program.to(tl.int64) * 256 + values, table.to(tl.uint8))


@triton.jit
def _autocontrast(source, pixels, values, BLOCK: tl.constexpr):
    """Pillow's `ImageOps.autocontrast`, in float64."""
    low, high = tl.full((BLOCK,), 255, tl.int32), tl.full((BLOCK,), 0, tl.int32)
    first = 0
    # `while`, for with `range` Triton's interpreter up to 3.6 fails with NumPy from 2.4 on.
    while first < pixels:
        place = first + tl.arange(0, BLOCK)
        here = place < pixels
        value = tl.load(source + 3 * place, here, other=0).to(tl.int32)
        low = tl.minimum(low, tl.where(here, value, 255))
        high = tl.maximum(high, value)
        first += BLOCK
    lowest, highest = tl.min(low, 0), tl.max(high, 0)
    scale = 255.0 / tl.maximum(highest - lowest, 1).to(tl.float64)
    stretched = values.to(tl.float64) * scale + (-lowest).to(tl.float64) * scale
    stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
    return tl.where(highest > lowest, stretched, values)


@triton.jit
def _equalize(source, pixels, values, BLOCK: tl.constexpr):
    """Pillow's `ImageOps.equalize`."""
    counts = tl.zeros((256,), tl.int32)
    first = 0
    while first < pixels:
        place = first + tl.arange(0, BLOCK)
        value = tl.load(source + 3 * place, place < pixels, other=0).to(tl.int32)
        counts += tl.histogram(value, 256)
        first += BLOCK
    # Not every Triton's histogram has a mask: what lies behind the image was counted as zeros.
    counts -= tl.where(values == 0, tl.cdiv(pixels, BLOCK) * BLOCK - pixels, 0)
    last = tl.max(tl.where(counts > 0, values, 0), 0)
    step = (pixels - tl.sum(tl.where(values == last, counts, 0), 0)) // 255
    below = step // 2 + tl.cumsum(counts, 0) - counts
    return tl.where(step > 0, tl.minimum(below // tl.maximum(step, 1), 255), values)


@triton.jit
def _mean_luma(source, pixels, BLOCK: tl.constexpr):
    """The grey that `ImageEnhance.Contrast` blends with, rounded to the nearest integer."""
    sums = tl.zeros((BLOCK,), tl.int32)  # 255 a turn: enough for 8 million turns
    first = 0
    while first < pixels:
        place = first + tl.arange(0, BLOCK)
        sums += _luma(source, place, place < pixels)
        first += BLOCK
    total = tl.sum(sums.to(tl.int64), 0)
    return ((2 * total + pixels) // (2 * pixels)).to(tl.int32)


@triton.jit
def _luma(source, place, here):
    """Pillow's conversion to mode "L", with 16 fractional bits; int32, 0 where nothing is."""
    red = tl.load(source + 3 * place, here, other=0).to(tl.int32)
    green = tl.load(source + 3 * place + 1, here, other=0).to(tl.int32)
    blue = tl.load(source + 3 * place + 2, here, other=0).to(tl.int32)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@triton.jit
def _blend(degenerate, value, factor):
    """Pillow's `Image.blend` of integers, in float32 throughout; int32, rounded towards zero."""
    start = degenerate.to(tl.float32)
    mixed = start + factor * (value.to(tl.float32) - start)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@_kernel
def _apply(images, step, tables, result, height, width, BLOCK: tl.constexpr):
    """Make pixels, a program for each `BLOCK` of an image.

    Args:
        images, result: (m, height, width, 3) uint8.
        step: (m, 8) float64, see `_FIELDS`.
        tables: (m, 3, 256) uint8.
    """
    program, pixels = tl.program_id(0), height * width
    blocks = tl.cdiv(pixels, BLOCK)
    image = (program // blocks).to(tl.int64)
    place = program % blocks * BLOCK + tl.arange(0, BLOCK)
    here = place < pixels
    source, target = images + image * pixels * 3, result + image * pixels * 3
    step += image * _FIELDS
    operation = tl.load(step).to(tl.int32)
    if operation <= _BRIGHTNESS:
        _look_up(source, target, tables + image * 768, place, here)
    elif operation == _COLOR:
        _color(source, target, tl.load(step + 1).to(tl.float32), place, here)
    elif operation == _SHARPNESS:
        _sharpness(source, target, tl.load(step + 1).to(tl.float32), height, width, place, here)
    else:
        _move(source, target, step + 2, height, width, place, here)


@triton.jit
def _look_up(source, target, tables, place, here):
    """Pillow's `Image.point`."""
    for channel in tl.static_range(3):
        value = tl.load(source + 3 * place + channel, here, other=0).to(tl.int32)
        tl.store(target + 3 * place + channel, tl.load(tables + 256 * channel + value, here), here)


@triton.jit
def _color(source, target, factor, place, here):
    """Pillow's `ImageEnhance.Color`: blend with the grey image."""
    grey = _luma(source, place, here)
    for channel in tl.static_range(3):
        value = tl.load(source + 3 * place + channel, here, other=0).to(tl.int32)
        mixed = _blend(grey, value, factor)
        tl.store(target + 3 * place + channel, mixed.to(tl.uint8), here)


@triton.jit
def _sharpness(source, target, factor, height, width, place, here):
    """Pillow's `ImageEnhance.Sharpness`; the border stays."""
    row, column = place // width, place % width
    inner = here & (row > 0) & (row < height - 1) & (column > 0) & (column < width - 1)
    for channel in tl.static_range(3):
        value = tl.load(source + 3 * place + channel, here, other=0).to(tl.int32)
        total = 4 * value + 6
        for near in tl.static_range(-1, 2):
            for beside in tl.static_range(-1, 2):
                other = 3 * (place + near * width + beside) + channel
                total += tl.load(source + other, inner, other=0).to(tl.int32)
        mixed = tl.where(inner, _blend(total // 13, value, factor), value)
        tl.store(target + 3 * place + channel, mixed.to(tl.uint8), here)


@triton.jit
def _move(source, target, matrix, height, width, place, here):
    """Pillow's `Image.transform` with an affine map, bilinear in float64, black outside."""
    across = (place % width).to(tl.float64) + 0.5
    down = (place // width).to(tl.float64) + 0.5
    x = tl.load(matrix) * across + tl.load(matrix + 1) * down + tl.load(matrix + 2)
    y = tl.load(matrix + 3) * across + tl.load(matrix + 4) * down + tl.load(matrix + 5)
    inside = here & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = tl.floor(x - 0.5), tl.floor(y - 0.5)
    dx, dy = x - 0.5 - left, y - 0.5 - top
    near, far = _clamped(left, width), _clamped(left + 1, width)
    above, below = _clamped(top, height) * width, _clamped(top + 1, height) * width
    for channel in tl.static_range(3):
        a = _between(source + channel, above + near, above + far, dx, inside)
        b = _between(source + channel, below + near, below + far, dx, inside)
        value = tl.where(inside, a + (b - a) * dy, 0.0).to(tl.int32)
        tl.store(target + 3 * place + channel, value.to(tl.uint8), here)


@triton.jit
def _clamped(number, size):
    """A row or column as int32, the nearest where there is no such."""
    most = (size - 1).to(tl.float64)  # before the cast, which has no result for large numbers
    return tl.minimum(tl.maximum(number, 0.0), most).to(tl.int32)


@triton.jit
def _between(source, one, other, share, inside):
    """From one pixel's value to the other's, in float64."""
    a = tl.load(source + 3 * one, inside, other=0).to(tl.float64)
    b = tl.load(source + 3 * other, inside, other=0).to(tl.float64)
    return a + (b - a) * share
