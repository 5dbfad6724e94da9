"""RandAugment with the operations, magnitudes and pixels of MosaicML composer's, compiled.

Cubuk, Zoph, Shlens, Le 2019 (arXiv 1909.13719), as composer does it with Pillow: each image goes
through a few operations drawn from a set, each with a magnitude of its own. First `plan` draws, in
NumPy, from one random word per image; what it returns are the arguments that composer would give
to Pillow. Then compiled code changes the pixels, to what Pillow would have made of them: on x86-64
bit by bit. `data.randaugment_gpu` has the same for a GPU, from the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from data import order
from data.compiled import compiled

_MOST_DEGREES = 30
_DRAWS = 3  # per operation: which one, how much, and a coin


class Operation(IntEnum):
    """What happens to the pixels. The first six replace values by a table, the last five move."""

    AUTOCONTRAST = 0
    EQUALIZE = 1
    POSTERIZE = 2
    SOLARIZE = 3
    CONTRAST = 4
    BRIGHTNESS = 5
    COLOR = 6
    SHARPNESS = 7
    ROTATE = 8
    SHEAR_X = 9
    SHEAR_Y = 10
    TRANSLATE_X = 11
    TRANSLATE_Y = 12


class _Draw(NamedTuple):
    """Random numbers for some images, and what composer makes of them: (m,) float64 each."""

    uniform: np.ndarray  # (m,) float64 in [0, 1)
    heads: np.ndarray  # (m,) bool
    severity: float
    height: int
    width: int

    def between(self, low: float, high: float) -> np.ndarray:
        return low + (high - low) * self.uniform

    def level(self, most: float) -> np.ndarray:
        return self.between(0.1, self.severity) * most / 10

    def whole(self, most: float) -> np.ndarray:
        return np.trunc(self.level(most))

    def signed(self, magnitude: np.ndarray) -> np.ndarray:
        return np.where(self.heads, -magnitude, magnitude)

    def factor(self) -> np.ndarray:
        """At severity 10 between 0.1 and 10, half of the time above 1."""
        more = self.between(1, self.severity)
        return np.where(self.heads, more, self.between(1 - 0.09 * self.severity, 1))

    def brightness(self) -> np.ndarray:
        factor = self.factor()
        return np.where(factor > 1, factor * 0.75, factor)

    def original_factor(self) -> np.ndarray:
        return self.level(1.8) + 0.1


Rule = Callable[[_Draw], np.ndarray | float]

_SAFE: list[tuple[Operation, Rule]] = [
    (Operation.AUTOCONTRAST, lambda draw: 0.0),
    (Operation.EQUALIZE, lambda draw: 0.0),
    (Operation.POSTERIZE, lambda draw: 4 - draw.whole(4)),
    (Operation.ROTATE, lambda draw: draw.signed(draw.whole(_MOST_DEGREES))),
    (Operation.SOLARIZE, lambda draw: 256 - draw.whole(256)),
    (Operation.SHEAR_X, lambda draw: draw.signed(draw.level(0.3))),
    (Operation.SHEAR_Y, lambda draw: draw.signed(draw.level(0.3))),
    (Operation.TRANSLATE_X, lambda draw: draw.signed(draw.whole(draw.width / 3))),
    (Operation.TRANSLATE_Y, lambda draw: draw.signed(draw.whole(draw.height / 3))),
]
# In composer's order: an operation's place decides which draws choose it.
SETS: dict[str, list[tuple[Operation, Rule]]] = {
    "all": [
        *_SAFE,
        (Operation.COLOR, _Draw.factor),
        (Operation.CONTRAST, _Draw.factor),
        (Operation.BRIGHTNESS, _Draw.brightness),
        (Operation.SHARPNESS, _Draw.factor),
    ],
    "safe": _SAFE,
    "original": [
        *_SAFE,
        (Operation.COLOR, _Draw.original_factor),
        (Operation.CONTRAST, _Draw.original_factor),
        (Operation.BRIGHTNESS, _Draw.original_factor),
        (Operation.SHARPNESS, _Draw.original_factor),
    ],
}


class Plan(NamedTuple):
    """What happens to m images, in how many steps.

    Attributes:
        operations: (m, depth) uint8, see `Operation`.
        magnitudes: (m, depth) float64, the argument that Pillow's counterpart takes: bits to keep,
            threshold, degrees, share, pixels or factor; 0 where it takes none.
        matrices: (m, depth, 6) float64, for operations that move pixels: output pixel (x, y) comes
            from (a x + b y + c, d x + e y + f), as in Pillow's `Image.transform`.
    """

    operations: np.ndarray
    magnitudes: np.ndarray
    matrices: np.ndarray


@dataclass(frozen=True)
class RandAugment:
    """How strongly to augment.

    Args:
        depth: operations in sequence, at least 0.
        severity: of the strongest operation, in [0, 10].
        operations: composer's name of the set to draw from: "all"; "safe", without colour,
            contrast, brightness and sharpness, which are among ImageNet-C's corruptions; or
            "original", in which these four have the magnitudes of AugMix's code.

    Raises:
        ValueError: a value is out of range.
    """

    depth: int = 2
    severity: float = 10
    operations: str = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.depth, int) or self.depth < 0:
            raise ValueError(f"RandAugment's depth must be an integer from 0, got {self.depth}")
        if not 0 <= self.severity <= 10:
            raise ValueError(f"RandAugment's severity must lie in [0, 10], got {self.severity}")
        if self.operations not in SETS:
            raise ValueError(
                f"RandAugment's operations must be one of {', '.join(SETS)}, got {self.operations}"
            )

    def plan(self, seeds: np.ndarray, height: int, width: int) -> Plan:
        """Choose operations and magnitudes; those of an image depend on its own word only.

        Args:
            seeds: (m,) uint64, a random word per image.
            height, width: of the images, in pixels.
        """
        words = order.words(seeds, _DRAWS * self.depth)
        draws = order.uniform(words).reshape(len(seeds), self.depth, _DRAWS)
        return self.planned(draws, height, width)

    def planned(self, draws: np.ndarray, height: int, width: int) -> Plan:
        """The same from draws (m, depth, 3) float64 in [0, 1): which, how much, and a coin."""
        which, uniform, coin = np.moveaxis(draws, 2, 0)
        rules = SETS[self.operations]
        # The product can round up to the number of operations, which is one too many.
        choices = np.minimum((which * len(rules)).astype(np.int64), len(rules) - 1)
        operations = np.zeros(choices.shape, np.uint8)
        magnitudes = np.zeros(choices.shape)
        for number, (operation, rule) in enumerate(rules):
            here = choices == number
            draw = _Draw(uniform[here], coin[here] > 0.5, self.severity, height, width)
            operations[here] = operation
            magnitudes[here] = rule(draw)
        return Plan(operations, magnitudes, matrices(operations, magnitudes, height, width))

    def apply(self, images: np.ndarray, seeds: np.ndarray) -> None:
        """Augment images in place; other threads run meanwhile.

        Args:
            images: (m, height, width, 3) uint8.
            seeds: (m,) uint64, a random word per image.
        """
        transform(images, *self.plan(seeds, *images.shape[1:3]))


def matrices(operations: np.ndarray, magnitudes: np.ndarray, height: int, width: int) -> np.ndarray:
    """The affine maps of operations, see `Plan`; the identity for those that don't move pixels.

    Args:
        operations, magnitudes: of one shape.
        height, width: of the images, in pixels.

    Returns:
        (…, 6) float64.
    """
    result = np.zeros((*operations.shape, 6))
    result[...] = (1, 0, 0, 0, 1, 0)
    for operation, place in (
        (Operation.SHEAR_X, 1),
        (Operation.TRANSLATE_X, 2),
        (Operation.SHEAR_Y, 3),
        (Operation.TRANSLATE_Y, 5),
    ):
        here = operations == operation
        result[here, place] = magnitudes[here]
    here = operations == Operation.ROTATE
    result[here] = _rotations(height, width)[magnitudes[here].astype(np.int64) + _MOST_DEGREES]
    return result


@cache
def _rotations(height: int, width: int) -> np.ndarray:
    """Maps for -30 to 30 whole degrees about the centre, (61, 6), rounded as `Image.rotate` does.

    In Python's arithmetic: NumPy's sines may differ from it in the last bit.
    """
    maps = []
    for degrees in range(-_MOST_DEGREES, _MOST_DEGREES + 1):
        angle = -math.radians(degrees % 360)
        a, b, d = (round(x, 15) for x in (math.cos(angle), math.sin(angle), -math.sin(angle)))
        x, y = width / 2, height / 2
        maps.append((a, b, a * -x + b * -y + x, d, a, d * -x + a * -y + y))
    return np.array(maps)


# A kernel is only called by compiled code, and compiles faster without an entrance from Python.
_kernel = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@compiled
def transform(
    images: np.ndarray, operations: np.ndarray, magnitudes: np.ndarray, matrices: np.ndarray
) -> None:
    """Carry out a plan, in place. Compiled; runs without the interpreter lock.

    Args:
        images: (m, height, width, 3) uint8, contiguous.
        operations, magnitudes, matrices: see `Plan`.
    """
    _, height, width, _ = images.shape
    before = np.empty((height, width, 3), np.uint8)
    table = np.empty((3, 256), np.uint8)
    corners, shares = np.empty((4, width), np.int32), np.empty((2, width))
    for i in range(len(images)):
        image = images[i]
        for step in range(operations.shape[1]):
            operation, magnitude = operations[i, step], magnitudes[i, step]
            if operation <= Operation.BRIGHTNESS:
                _fill(table, operation, magnitude, image)
                _look_up(table, image)
            elif operation == Operation.COLOR:
                _color(image, np.float32(magnitude))
            elif operation == Operation.SHARPNESS:
                _copy(image, before)
                _sharpness(before, np.float32(magnitude), image)
            else:
                _copy(image, before)
                _move(before, matrices[i, step], corners, shares, image)


@_kernel
def _copy(image: np.ndarray, to: np.ndarray) -> None:
    """A loop: the slice assignment would compile for seconds, for the sake of its error message."""
    source, target = image.reshape(-1), to.reshape(-1)
    for place in range(source.size):
        target[place] = source[place]


@_kernel
def _fill(table: np.ndarray, operation: int, magnitude: float, image: np.ndarray) -> None:
    """Fill the table (3, 256) of an operation that replaces each channel's values by others."""
    grey = _mean_luma(image) if operation == Operation.CONTRAST else 0
    for channel in range(3):
        if operation == Operation.AUTOCONTRAST:
            _autocontrast(_histogram(image, channel), table[channel])
        elif operation == Operation.EQUALIZE:
            _equalize(_histogram(image, channel), table[channel])
        elif operation == Operation.POSTERIZE:
            _posterize(np.int64(magnitude), table[channel])
        elif operation == Operation.SOLARIZE:
            _solarize(np.int64(magnitude), table[channel])
        else:
            _enhance(grey, np.float32(magnitude), table[channel])


@_kernel
def _look_up(table: np.ndarray, image: np.ndarray) -> None:
    """Pillow's `Image.point`, in place."""
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            for channel in range(3):
                image[row, column, channel] = table[channel, image[row, column, channel]]


@_kernel
def _histogram(image: np.ndarray, channel: int) -> np.ndarray:
    """A channel's part of Pillow's `Image.histogram`, (256,)."""
    counts = np.zeros(256, np.int64)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            counts[image[row, column, channel]] += 1
    return counts


@_kernel
def _autocontrast(histogram: np.ndarray, table: np.ndarray) -> None:
    """Pillow's `ImageOps.autocontrast`: stretch the values that occur to 0 … 255."""
    low, high = 0, 255
    while low < 255 and histogram[low] == 0:
        low += 1
    while high > 0 and histogram[high] == 0:
        high -= 1
    scale, offset = 1.0, 0.0
    if high > low:
        scale = 255.0 / (high - low)
        offset = -low * scale
    for value in range(256):
        table[value] = min(max(int(value * scale + offset), 0), 255)


@_kernel
def _equalize(histogram: np.ndarray, table: np.ndarray) -> None:
    """Pillow's `ImageOps.equalize`: make the values that occur equally frequent."""
    last, total = 0, 0
    for value in range(256):
        if histogram[value] > 0:
            last = value
            total += histogram[value]
    step = (total - histogram[last]) // 255
    below = step // 2
    for value in range(256):
        table[value] = min(below // step, 255) if step > 0 else value
        below += histogram[value]


@_kernel
def _posterize(bits: int, table: np.ndarray) -> None:
    """Pillow's `ImageOps.posterize`: keep the upper bits."""
    for value in range(256):
        table[value] = value >> (8 - bits) << (8 - bits)


@_kernel
def _solarize(threshold: int, table: np.ndarray) -> None:
    """Pillow's `ImageOps.solarize`: invert values from the threshold on."""
    for value in range(256):
        table[value] = value if value < threshold else 255 - value


@_kernel
def _enhance(grey: int, factor: float, table: np.ndarray) -> None:
    """Pillow's `ImageEnhance.Contrast` and `Brightness`: blend with grey, or with black."""
    for value in range(256):
        table[value] = _blend(grey, value, factor)


@_kernel
def _blend(degenerate: int, value: int, factor: float) -> int:
    """Pillow's `Image.blend`, in float32 throughout, rounded towards zero."""
    start = np.float32(degenerate)
    mixed = start + factor * (np.float32(value) - start)
    return np.uint8(min(max(mixed, np.float32(0)), np.float32(255)))


@_kernel
def _luma(image: np.ndarray, row: int, column: int) -> int:
    """Pillow's conversion to mode "L" (ITU-R 601-2), with 16 fractional bits."""
    red, green = np.int32(image[row, column, 0]), np.int32(image[row, column, 1])
    blue = np.int32(image[row, column, 2])
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@_kernel
def _mean_luma(image: np.ndarray) -> int:
    """The grey that `ImageEnhance.Contrast` blends with, rounded to the nearest integer."""
    total, pixels = 0, image.shape[0] * image.shape[1]
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            total += _luma(image, row, column)
    return (2 * total + pixels) // (2 * pixels)


@_kernel
def _color(image: np.ndarray, factor: float) -> None:
    """Pillow's `ImageEnhance.Color`, in place: blend with the grey image."""
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            grey = _luma(image, row, column)
            for channel in range(3):
                value = image[row, column, channel]
                image[row, column, channel] = _blend(grey, value, factor)


@_kernel
def _sharpness(before: np.ndarray, factor: float, image: np.ndarray) -> None:
    """Pillow's `ImageEnhance.Sharpness`: blend with `ImageFilter.SMOOTH`, but for the border.

    The filter's weights are 5 in the middle and 1 around it, over 13. Pillow rounds float32 sums;
    as no sum lies half way between two integers, integers give the same.
    """
    height, width, _ = image.shape
    source, target = before.reshape(height, 3 * width), image.reshape(height, 3 * width)
    for row in range(1, height - 1):
        for place in range(3, 3 * width - 3):
            value = np.int32(source[row, place])
            total = 4 * value + 6
            for near in range(row - 1, row + 2):
                for beside in range(place - 3, place + 4, 3):
                    total += source[near, beside]
            target[row, place] = _blend(total // 13, value, factor)


@_kernel
def _move(
    before: np.ndarray,
    matrix: np.ndarray,
    corners: np.ndarray,
    shares: np.ndarray,
    image: np.ndarray,
) -> None:
    """Pillow's `Image.transform` with an affine map, bilinear in float64, black outside.

    Args:
        before: (height, width, 3) uint8.
        matrix: (6,).
        corners, shares: (4, width) int32 and (2, width) float64, memory for `_sources`.
        image: (height, width, 3) uint8, filled.
    """
    height, width, _ = image.shape
    for row in range(height):
        _sources(row, height, width, matrix, corners, shares)
        for column in range(width):
            left, right = corners[0, column], corners[1, column]
            top, bottom = corners[2, column], corners[3, column]
            dx, dy = shares[0, column], shares[1, column]
            for channel in range(3):
                if left < 0:
                    image[row, column, channel] = 0
                elif dx == 0 and dy == 0:
                    image[row, column, channel] = before[top, left, channel]
                else:
                    a = _between(before[top, left, channel], before[top, right, channel], dx)
                    b = _between(before[bottom, left, channel], before[bottom, right, channel], dx)
                    image[row, column, channel] = np.uint8(_between(a, b, dy))


@_kernel
def _sources(
    row: int, height: int, width: int, matrix: np.ndarray, corners: np.ndarray, shares: np.ndarray
) -> None:
    """Where a row's pixels come from: left, right, top and bottom, and the second ones' shares.

    A loop of its own, for the compiler makes vector instructions of it. Pixels that come from
    outside have -1 on their left.
    """
    for column in range(width):
        x = matrix[0] * (column + 0.5) + matrix[1] * (row + 0.5) + matrix[2]
        y = matrix[3] * (column + 0.5) + matrix[4] * (row + 0.5) + matrix[5]
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        left, top = np.floor(x - 0.5), np.floor(y - 0.5)
        shares[0, column] = x - 0.5 - left
        shares[1, column] = y - 0.5 - top
        corners[0, column] = max(left, 0) if inside else -1
        corners[1, column] = min(left + 1, width - 1)
        corners[2, column] = max(top, 0)
        corners[3, column] = min(top + 1, height - 1)


@_kernel
def _between(a: float, b: float, share: float) -> float:
    return a + (np.float64(b) - np.float64(a)) * share
