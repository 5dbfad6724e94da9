"""An ImageFolder tree, such as ImageNet's, read by several processes and made ready for storing.

TREE/train/CLASS/*.JPEG and TREE/val/CLASS/*.JPEG become what FFCV's script for ImageNet makes of
them: decoded by Pillow, scaled down, some compressed again and some kept as pixels. Processes
rather than threads: Pillow holds the interpreter lock for a good part of the time. What they hand
over comes in the order of the files, so their number and their timing change nothing.
"""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from io import BytesIO
from mmap import mmap
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from data.dataset import DataError
from data.order import Stream, draws
from data.source import Stored, levels

# As in torchvision; and the formats of these names, for Pillow knows some that run programs.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
LARGEST = 4096  # pixels; an image and then a page of the file have to fit into memory

_CHUNK, _CHUNK_BYTES = 8, 2**23  # images handed over at once; fewer if they could take more bytes


@dataclass(frozen=True)
class Storage:
    """How images are stored, as FFCV's RGBImageField does with these settings.

    Attributes:
        max_size: larger images are scaled down, by averaging over areas, until the longer side has
            so many pixels or, by rounding, one less; others keep their size.
        quality: of the JPEGs, from 1 to 100.
        jpeg_share: how probably an image is stored as JPEG and not as pixels.

    Raises:
        ValueError: a number is out of range.
    """

    max_size: int
    quality: int
    jpeg_share: float

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("the largest size", self.max_size, 1, LARGEST),
            ("the quality", self.quality, 1, 100),
            ("the share of JPEGs", self.jpeg_share, 0, 1),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")

    @property
    def room(self) -> int:
        """Bytes that an image takes at most, as pixels or JPEG, which may be mostly header."""
        return 4 * self.max_size**2 + 4096

    def jpegs(self, indices: np.ndarray) -> np.ndarray:
        """Which images are stored as JPEG, (m,) bool, decided by their places in their part."""
        return draws(0, 0, indices, 1, Stream.STORAGE)[:, 0] < self.jpeg_share


def as_jpeg(image: np.ndarray, quality: int) -> Stored:
    """Compress an image (H, W, 3) uint8, as FFCV does."""
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality]
    _, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    return Stored(True, *image.shape[:2], content.reshape(-1))


def as_pixels(image: np.ndarray) -> Stored:
    """Keep an image (H, W, 3) uint8 as it is."""
    return Stored(False, *image.shape[:2], np.ascontiguousarray(image).reshape(-1))


def decoded(content: bytes) -> np.ndarray:
    """The image in a file, (H, W, 3) uint8, as torchvision's loader gives it.

    Greys, palettes and CMYK become RGB, an orientation in the metadata is ignored, of several
    pictures the first is taken. Only greys of 16 bits, which the loader would make nearly white,
    are scaled.

    Raises:
        Exception: Pillow doesn't say what it raises for a malformed file.
    """
    if not content:
        raise ValueError("empty")
    image = Image.open(BytesIO(content), formats=FORMATS)
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"its levels (Pillow's mode {image.mode}) have no known range")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def shrunk(image: np.ndarray, max_size: int) -> np.ndarray:
    """Scale an image (H, W, 3) down to `max_size` where it is larger, as `Storage` says."""
    sides = np.array(image.shape[1::-1])
    ratio = max_size / sides.max()
    if ratio >= 1:
        return image
    # FFCV rounds like this, but has no image where the shorter side becomes zero.
    size = np.maximum((ratio * sides).astype(int), 1).tolist()
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


class Part(NamedTuple):
    """The files of the part to train on or of that to evaluate on, class after class.

    Attributes:
        folder: TREE.
        names: relative to it.
        labels: (n,) int64.
    """

    folder: Path
    names: list[str]
    labels: np.ndarray


class Tree(NamedTuple):
    """An ImageFolder tree: names of the classes, and both parts."""

    classes: list[str]
    train: Part
    val: Part


def find(folder: Path) -> Tree:
    """List a tree as torchvision's ImageFolder does, but for hidden files, which are ignored.

    A class's label is the place of its folder among the sorted ones of train.

    Args:
        folder: TREE, with TREE/train/CLASS and TREE/val/CLASS.

    Raises:
        DataError: it isn't laid out like this; or a class has no image, or is in val only.
    """
    classes = _classes(folder / "train")
    evaluated = _classes(folder / "val")
    unknown = sorted(set(evaluated).difference(classes))
    if unknown:
        named = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise DataError(f"{folder / 'val'} has classes that aren't in train: {named}")
    labels = {name: label for label, name in enumerate(classes)}
    parts = (_part(folder, *pair, labels) for pair in (("train", classes), ("val", evaluated)))
    return Tree(classes, *parts)


def identity(tree: Tree) -> dict[str, Any]:
    """What tells these images from others, wherever they lie: a checksum of names and sizes.

    One of the contents would take as long as reading all of ImageNet.
    """
    total = hashlib.sha256()
    for part in (tree.train, tree.val):
        for name in part.names:
            try:
                size = os.stat(part.folder / name).st_size
            except OSError:
                size = -1  # it will turn out to be broken
            total.update(os.fsencode(f"{name}\0{size}\n"))
    counts = {"train": len(tree.train.names), "val": len(tree.val.names)}
    return counts | {"sha256": total.hexdigest()}


def _classes(folder: Path) -> list[str]:
    expected = f"expected {folder / 'CLASS' / '*.JPEG'}, one folder per class"
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; {expected}") from None
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    files = {entry.name for entry in entries}.difference(classes)
    loose = min((name for name in files if _is_image(name)), default=None)
    if loose is not None:
        raise DataError(f"{folder} has images outside of class folders, like {loose}; {expected}")
    if not classes:
        raise DataError(f"{folder} has no class folders; {expected}")
    return classes


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _part(folder: Path, part: str, classes: list[str], labels: dict[str, int]) -> Part:
    names, counts = [], []
    for name in classes:
        images = _images(folder / part / name)
        if not images:
            raise DataError(f"{folder / part / name} holds no image ({' '.join(EXTENSIONS)})")
        names += [f"{part}/{name}/{image}" for image in images]
        counts.append(len(images))
    return Part(folder, names, np.repeat([labels[name] for name in classes], counts))


def _images(folder: Path) -> list[str]:
    """Names of all images below a class's folder, relative to it, in torchvision's order."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}")

    names: list[str] = []
    seen = set()
    for place, _, files in sorted(os.walk(folder, onerror=fail, followlinks=True)):
        if (real := os.path.realpath(place)) in seen:
            raise DataError(f"{place} is a link to a folder that is listed already")
        seen.add(real)
        below = os.path.relpath(place, folder)
        if below == ".":
            names += filter(_is_image, sorted(files))
        elif not any(piece.startswith(".") for piece in below.split(os.sep)):
            names += (f"{below}/{name}" for name in sorted(files) if _is_image(name))
    return names


class Images:
    """The images of a part in order, as pairs of a `Stored` and a label. Broken ones are left out.

    A content is memory that is used again once the next one has been asked for.

    Args:
        part: which.
        storage: how they are stored.
        workers: processes that decode and compress.
        counting: whether to fill `counts`.

    Attributes:
        broken: by file name, what is wrong with it; complete after the last image.
        counts: (3, 256) int64, how often each level occurs in each channel, before JPEG's losses.

    Raises:
        DataError: while going through them: a worker died.
        ValueError: no worker.
    """

    def __init__(
        self, part: Part, storage: Storage, *, workers: int, counting: bool = False
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.part, self.storage, self.workers, self.counting = part, storage, workers, counting
        self.broken: dict[str, str] = {}
        self.counts = np.zeros((3, 256), np.int64)

    def __len__(self) -> int:
        return len(self.part.names)

    def __iter__(self) -> Iterator[tuple[Stored, int]]:
        room = self.storage.room
        chunk = max(1, min(_CHUNK, _CHUNK_BYTES // room))
        # Shared with the workers: through pipes pixels would take half as long as to decode. What
        # isn't used of a slot takes no memory.
        slots = [
            np.frombuffer(mmap(-1, chunk * room), np.uint8) for _ in range(2 * self.workers + 2)
        ]
        pool = ProcessPoolExecutor(
            self.workers, get_context("fork"), _start, (slots, self.storage, self.counting)
        )
        pending: deque[tuple[int, np.ndarray, Future]] = deque()
        try:
            for number, first in enumerate(range(0, len(self), chunk)):
                if len(pending) == len(slots):
                    yield from self._received(*pending.popleft())
                slot = number % len(slots)
                paths = [self.part.folder / n for n in self.part.names[first : first + chunk]]
                pending.append((first, slots[slot], pool.submit(_prepare, slot, first, paths)))
            while pending:
                yield from self._received(*pending.popleft())
        except (BrokenProcessPool, MemoryError):
            raise DataError(
                "a worker process died, perhaps for lack of memory; fewer --workers need less"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _received(
        self, first: int, slot: np.ndarray, job: Future[_Chunk]
    ) -> Iterator[tuple[Stored, int]]:
        images, counts = job.result()
        if counts is not None:
            self.counts += counts
        place = 0
        for index, image in enumerate(images, first):
            if isinstance(image, str):
                self.broken[self.part.names[index]] = image
                continue
            jpeg, height, width, size = image
            content = slot[place : place + size]
            yield Stored(jpeg, height, width, content), int(self.part.labels[index])
            place += size


# Of each image what `Stored` says, with the content's size in its place, or what is wrong with it;
# and the levels' counts, if they are wanted.
_Chunk = tuple[list[tuple[bool, int, int, int] | str], np.ndarray | None]


class _Worker(NamedTuple):
    """What a worker process is given when it starts."""

    slots: list[np.ndarray]
    storage: Storage
    counting: bool


_worker: _Worker  # set in the worker processes only


def _start(*given: Any) -> None:
    global _worker
    _worker = _Worker(*given)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, interrupted too, ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(1)
    warnings.simplefilter("ignore")  # Pillow's, of metadata
    # Work comes through a pipe that the other workers hold open too: without its parent a worker
    # would wait for ever.
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _prepare(slot: int, first: int, paths: list[Path]) -> _Chunk:
    """Decode, scale and compress a few images into a slot, one after the other."""
    room, place, images = _worker.slots[slot], 0, []
    counts = np.zeros((3, 256), np.int64) if _worker.counting else None
    storage = _worker.storage
    jpegs = storage.jpegs(np.arange(first, first + len(paths)))
    for path, jpeg in zip(paths, jpegs.tolist(), strict=True):
        try:
            pixels = decoded(path.read_bytes())
        except MemoryError:
            raise
        except Exception as error:  # Pillow doesn't say what it raises for a malformed file
            images.append(_what_is_wrong(error))
            continue
        pixels = shrunk(pixels, storage.max_size)
        if counts is not None:
            counts += levels(pixels)
        _, height, width, content = as_jpeg(pixels, storage.quality) if jpeg else as_pixels(pixels)
        room[place : place + content.size] = content
        place += content.size
        images.append((jpeg, height, width, content.size))
    return images, counts


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
