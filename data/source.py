"""What a kind of data is to those who write it or plan with it; one file each in `data.sources`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class Stored(NamedTuple):
    """An image as a .beton holds it: (bytes,) uint8, a JPEG or rows of RGB pixels."""

    jpeg: bool
    height: int
    width: int
    content: np.ndarray


class Samples(Protocol):
    """Pairs of an image and its label, the image an array (H, W, 3) uint8 or stored already.

    `len` is how many there are, or more: a source may find only then that one can't be read.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[np.ndarray | Stored, int]]: ...


@dataclass(frozen=True)
class Content:
    """What a source provides. `classes`, `mean` and `std` as in `Dataset`.

    Attributes:
        mode: how arrays are stored, "raw" or "jpg".
        page_size: of the file, in bytes, a power of two; None: FFCV's smallest, for a file is at
            least two pages long. No image can take more.
        findings: called once train and val were gone through, for entries of `Dataset` that are
            known only then. A DataError leaves nothing written.
    """

    classes: list[str]
    mean: list[float]
    std: list[float]
    train: Samples
    val: Samples
    mode: str = "raw"
    page_size: int | None = None
    findings: Callable[[], dict[str, Any]] = dict


class Known(NamedTuple):
    """The size of a data set that is known without its files."""

    name: str
    images: int  # for training
    classes: int
    resolution: int | None  # pixels of a side, as stored; None where images differ


class Source:
    """A kind of data that can be written. Its flags are its settings.

    Attributes:
        embedded: whether it needs nothing else, so that training writes it where it is missing.
        known: the sizes of data sets of this kind.
    """

    embedded = False
    known: tuple[Known, ...] = ()

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Declare its flags."""

    def load(self, **settings: Any) -> Content:
        """What is written; a DataError or ValueError says what is wrong with files or settings."""
        raise NotImplementedError

    def record(self, **settings: Any) -> dict[str, Any]:
        """What dataset.json records. Two that record the same are the same data."""
        return settings

    def defaults(self) -> dict[str, Any]:
        """Its settings where no flag is given."""
        parser = argparse.ArgumentParser()
        self.add_flags(parser)
        return vars(parser.parse_args([]))


def folder_name(text: str) -> Path:
    """A folder from a flag, whose name would fit the line of an error."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder")
    return Path(text)


def of_arrays(
    classes: list[str], train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]
) -> Content:
    """Images (n, H, W, 3) uint8 and labels (n,) of both parts, with statistics of the first."""
    counts = np.zeros((3, 256), np.int64)
    for image in train[0]:
        counts += levels(image)
    return Content(
        classes,
        *moments(counts),
        train=list(zip(*train, strict=True)),
        val=list(zip(*val, strict=True)),
    )


def levels(image: np.ndarray) -> np.ndarray:
    """How often each level occurs in each channel of (H, W, 3) uint8: (3, 256) int64."""
    import cv2  # not for those who only plan

    # Floats, but exact ones: no level occurs more than LARGEST**2 = 2**24 times.
    counts = [cv2.calcHist([image], [c], None, [256], [0, 256]).reshape(-1) for c in range(3)]
    return np.array(counts).astype(np.int64)


def moments(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, from (3, 256) how often each level occurs."""
    # From histograms: CIFAR-10's images would take a gigabyte as floating-point numbers.
    shares, levels = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ levels
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
    return mean.round(6).tolist(), std.round(6).tolist()
