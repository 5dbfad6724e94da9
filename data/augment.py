"""Crop boxes and flips from draws, and the FFCV decoder that applies them.

A box is (top, left, height, width) in pixels of the stored image. Random and centre crops are both
only boxes, so training and validation run the same compiled code. Where padding is asked for, a box
may leave its image: what lies outside is black.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.compiled import compiled
from data.dataset import damaged
from data.ffcv_parts import (
    JPEG,
    AllocationQuery,
    SimpleRGBImageDecoder,
    State,
    imdecode,
    resize,
)
from data.randaugment import RandAugment, transform

ATTEMPTS = 10
CROP_DRAWS = 4 * ATTEMPTS  # area, aspect ratio, top and left of every attempt

# What the decoder knows of a sample: where FFCV stored it, and what this epoch does with it.
SAMPLE = np.dtype(
    [
        ("data_ptr", "<u8"),
        ("size", "<u8"),
        ("seed", "<u8"),
        ("top", "<i4"),
        ("left", "<i4"),
        ("crop_height", "<u4"),
        ("crop_width", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("mode", "<u1"),
        ("flip", "<u1"),
    ],
    align=True,
)


def random_resized_crop(
    draws: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """torchvision's RandomResizedCrop boxes, for all samples at once.

    Each attempt asks for a share of the area, uniform in `scale`, and an aspect ratio, log-uniform
    in `ratio`; the first that fits in the image is placed uniformly. Where none of ten fits, the
    box is the largest central one with an admissible aspect ratio.

    Args:
        draws: (m, CROP_DRAWS) float64 in [0, 1).
        heights, widths: (m,) image sizes in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.

    Returns:
        (m, 4) int64 boxes inside the images.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    share, aspect, top, left = np.moveaxis(draws.reshape(-1, ATTEMPTS, 4), 2, 0)  # (m, ATTEMPTS)
    low, high = np.log(ratio)
    area = (heights * widths)[:, None] * (scale[0] + share * (scale[1] - scale[0]))
    aspect = np.exp(low + aspect * (high - low))
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])

    rows, first = np.arange(len(fits)), fits.argmax(axis=1)
    top, left, h, w = (x[rows, first] for x in (top, left, h, w))
    # The product can round up to the number of places, which is one too many.
    top = np.minimum((top * (heights - h + 1)).astype(np.int64), heights - h)
    left = np.minimum((left * (widths - w + 1)).astype(np.int64), widths - w)
    boxes = np.stack([top, left, h, w], axis=1)
    return np.where(fits.any(axis=1)[:, None], boxes, _largest_centre(heights, widths, ratio))


def padded_crop(
    draws: np.ndarray, heights: np.ndarray, widths: np.ndarray, padding: int
) -> np.ndarray:
    """Boxes of the images' own sizes, shifted uniformly: torchvision's RandomCrop with a padding.

    The same as padding each image with `padding` black pixels on every side and then cropping a
    window of the original size.

    Args:
        draws: (m, 2) float64 in [0, 1), for top and left.
        heights, widths: (m,) image sizes in pixels.
        padding: the largest shift, in pixels of the stored image.

    Returns:
        (m, 4) int64 boxes, which leave the images by at most `padding`.
    """
    places = 2 * padding + 1
    # The product can round up to the number of places, which is one too many.
    shift = np.minimum((draws * places).astype(np.int64), places - 1) - padding
    return np.stack([shift[:, 0], shift[:, 1], heights, widths], axis=1).astype(np.int64)


def center_crop(heights: np.ndarray, widths: np.ndarray, crop_ratio: float) -> np.ndarray:
    """Central squares with `crop_ratio` times the shorter side, as FFCV's centre crop.

    Resized to 224 pixels, 224/256 shows what "resize 256, centre crop 224" does.

    Args:
        heights, widths: (m,) image sizes in pixels.
        crop_ratio: in (0, 1].

    Returns:
        (m, 4) int64 boxes.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    side = np.maximum((crop_ratio * np.minimum(heights, widths)).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def flip(draws: np.ndarray) -> np.ndarray:
    """Mirror left to right, with probability one half.

    Args:
        draws: (m,) float64 in [0, 1).

    Returns:
        (m,) bool.
    """
    return draws < 0.5


def _largest_centre(
    heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]
) -> np.ndarray:
    """(m, 4) central boxes, as large as images (m,) and admissible width / height allow."""
    shape = widths / heights
    h = np.where(shape < ratio[0], np.rint(widths / ratio[0]).astype(np.int64), heights)
    w = np.where(shape > ratio[1], np.rint(heights * ratio[1]).astype(np.int64), widths)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


class BoxDecoder(SimpleRGBImageDecoder):
    """FFCV's image decoder, with box and flip read per sample instead of drawn inside.

    It expects the loader's image metadata to be of type `SAMPLE`. The compiled code is one function
    of this module, so every loader of a process shares it; the batch is cut among the threads of
    `pool`, and the result doesn't depend on how many there are.

    Args:
        resolution: R, the side of the square output, (b, R, R, 3) uint8.
        pool: threads that decode.
        workers: how many of them to use.
        padded: see `decode_samples`.
        randaugment: what else happens to the decoded images, in the same threads.
    """

    def __init__(
        self,
        resolution: int,
        pool: ThreadPoolExecutor,
        workers: int,
        padded: bool | None = None,
        randaugment: RandAugment | None = None,
    ) -> None:
        super().__init__()
        self.shape = (resolution, resolution, 3)
        self.pool = pool
        self.workers = workers
        self.padded = padded
        self.randaugment = randaugment

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        # FFCV's cropping decoders also keep a whole image per sample and slot, pinned: for ImageNet
        # half a gigabyte. Here each thread takes the memory for one image.
        dtype = np.dtype("<u1")
        state = replace(previous_state, jit_mode=True, shape=self.shape, dtype=dtype)
        return state, AllocationQuery(self.shape, dtype)

    def generate_code(self) -> Callable:
        pool, workers = self.pool, self.workers
        padded, randaugment = self.padded, self.randaugment

        def decode_part(indices, samples, file, out, plan):
            broken = decode_samples(indices, samples, file, out, padded)
            if plan and broken < 0:
                transform(out, *plan)
            return broken

        def decode(batch_indices, destination, metadata, storage_state):
            file = storage_state[0]
            plan = ()
            if randaugment is not None:
                # Not in the threads, which would wait for each other's turn in the interpreter.
                plan = randaugment.plan(metadata["seed"][batch_indices], *self.shape[:2])
            cuts = [len(batch_indices) * i // workers for i in range(workers + 1)]
            jobs = []
            for a, b in pairwise(cuts):
                if a < b:
                    indices, out = batch_indices[a:b], destination[a:b]
                    part = [numbers[a:b] for numbers in plan]
                    jobs.append(pool.submit(decode_part, indices, metadata, file, out, part))
            broken = max([job.result() for job in jobs], default=-1)
            if broken >= 0:
                raise damaged(Path(file.filename), f"holds an unreadable JPEG, image {broken}")
            return destination[: len(batch_indices)]

        return decode


@compiled
def decode_samples(
    indices: np.ndarray,
    samples: np.ndarray,
    file: np.ndarray,
    out: np.ndarray,
    padded: bool | None = None,
) -> int:
    """Decode, crop, resize and flip some samples. Compiled; runs without the interpreter lock.

    Args:
        indices: (b,) int64.
        samples: (n,) SAMPLE.
        file: (bytes,) uint8, the mapped .beton.
        out: (b, R, R, 3) uint8, filled.
        padded: True where boxes may leave their images; else None, not False, for then numba leaves
            out what this takes: half a second of compilation, and a copy per image.

    Returns:
        The index of an image that could not be decoded, or -1.
    """
    room, window_room = 0, 0
    for index in indices:
        sample = samples[index]
        if sample.mode == JPEG:
            room = max(room, 3 * np.int64(sample.height) * np.int64(sample.width))
        if padded is not None:
            size = 3 * np.int64(sample.crop_height) * np.int64(sample.crop_width)
            window_room = max(window_room, size)
    scratch = np.empty(room, np.uint8)
    window = np.empty(window_room, np.uint8)
    for i in range(len(indices)):
        sample = samples[indices[i]]
        height, width = np.int64(sample.height), np.int64(sample.width)
        stored = file[sample.data_ptr : sample.data_ptr + sample.size]
        source = stored.ctypes.data
        if sample.mode == JPEG:
            source = scratch.ctypes.data
            status = imdecode(
                stored.ctypes.data, stored.size, height, width, source, height, width,
                0, 0, 1, 1, 0, 0,
            )  # fmt: skip
            if status != 0:
                return np.int64(indices[i])
        top, left = np.int64(sample.top), np.int64(sample.left)
        bottom, right = top + sample.crop_height, left + sample.crop_width
        if padded is not None:
            if sample.mode == JPEG:
                _cut(scratch, height, width, top, bottom, left, right, window)
            else:
                _cut(stored, height, width, top, bottom, left, right, window)
            source, height, width = window.ctypes.data, bottom - top, right - left
            top, bottom, left, right = 0, height, 0, width
        image = out[i]
        resize(
            0, source, height, width, top, bottom, left, right,
            image.ctypes.data, image.shape[0], image.shape[1],
        )  # fmt: skip
        if sample.flip:
            _mirror(image)
    return np.int64(-1)


@compiled
def _cut(
    pixels: np.ndarray, height: int, width: int,
    top: int, bottom: int, left: int, right: int, window: np.ndarray,
) -> None:
    """Copy a box that may leave the image; black outside.

    Args:
        pixels: (height * width * 3,) uint8, row after row.
        top, bottom, left, right: the box.
        window: uint8, its first (bottom - top) * (right - left) * 3 elements are filled.
    """
    for place in range(3 * (bottom - top) * (right - left)):
        window[place] = 0
    first, last = 3 * max(left, 0), 3 * min(right, width)
    for row in range(max(top, 0), min(bottom, height)):
        source = 3 * row * width
        target = 3 * ((row - top) * (right - left) - left)
        for place in range(first, last):
            window[target + place] = pixels[source + place]


@compiled
def _mirror(image: np.ndarray) -> None:
    """Mirror (R, R, 3) left to right in place."""
    last = image.shape[1] - 1
    for row in range(image.shape[0]):
        for column in range(image.shape[1] // 2):
            for channel in range(3):
                pixel = image[row, column, channel]
                image[row, column, channel] = image[row, last - column, channel]
                image[row, last - column, channel] = pixel
