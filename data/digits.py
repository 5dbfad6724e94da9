"""The embedded data set: scikit-learn's 1,797 handwritten digits, enlarged to RGB images.

Real data which need no download (UCI "Optical Recognition of Handwritten Digits", test part). The
splits are fixed: they depend on nothing but the labels and constants in this file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data.order import epoch_order

CLASSES = [str(digit) for digit in range(10)]
HELD_OUT = 0.2  # of every class
LARGEST = 512  # pixels of a side: all images are in memory at once, as floating-point numbers
_SPLIT_SEED = 0


class Part(NamedTuple):
    """Images (n, S, S, 3) uint8 and labels (n,) int64."""

    images: np.ndarray
    labels: np.ndarray


def digits(split: str = "test", size: int = 32) -> tuple[Part, Part]:
    """The part to train on and the part to evaluate on.

    Args:
        split: "test" for training part against test part; "tune" for a further split of the
            training part alone, on which to choose settings without looking at the test part.
        size: S, the images' side in pixels.

    Raises:
        ValueError: no such split, or a size out of range.
    """
    if split not in ("test", "tune"):
        raise ValueError(f"no split {split!r}: choose test or tune")
    if not 1 <= size <= LARGEST:
        raise ValueError(f"the image size must lie in [1, {LARGEST}], got {size}")
    from sklearn.datasets import load_digits  # takes seconds to import

    data = load_digits()
    images, labels = data.images, data.target.astype(np.int64)
    train, held_out = stratified(labels, HELD_OUT, seed=_SPLIT_SEED)
    if split == "tune":
        fit, tune = stratified(labels[train], HELD_OUT, seed=_SPLIT_SEED + 1)
        train, held_out = train[fit], train[tune]
    return (
        Part(enlarge(images[train], size), labels[train]),
        Part(enlarge(images[held_out], size), labels[held_out]),
    )


def stratified(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the same share of every class.

    Args:
        labels: (n,) integers.
        share: of each class, rounded to whole samples.
        seed: decides which samples.

    Returns:
        Two ascending index arrays, disjoint and together all of range(n): kept and held out.
    """
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen = epoch_order(len(members), seed, int(label))[: round(share * len(members))]
        held_out[members[chosen]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear interpolation, pixel centres aligned as in OpenCV's INTER_LINEAR, to RGB.

    For sizes that are powers of two the sums are exact, so every machine gets the same bytes.

    Args:
        images: (n, 8, 8) values 0 to 16.
        size: S, the new side in pixels.

    Returns:
        (n, S, S, 3) uint8, three equal channels, 16 becoming 255.
    """
    weights = _bilinear(images.shape[1], size)  # (S, 8)
    grey = np.rint((weights @ images @ weights.T) * 255 / 16).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def _bilinear(old: int, new: int) -> np.ndarray:
    """The (new, old) matrix that interpolates linearly along one side."""
    centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(old)))
