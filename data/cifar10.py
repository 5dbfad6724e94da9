"""CIFAR-10, read from the folder where torchvision puts it. Nothing is downloaded.

The files are pickles of Python 2. A pickle can name any function to be called when it is read, so
these are read with all names refused but the few that arrays are pickled with.
"""

from __future__ import annotations

import codecs
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.dataset import DataError, irregular, sha256

FOLDER = "cifar-10-batches-py"
TEST, META = "test_batch", "batches.meta"
SIDE = 32  # pixels
_PIXELS = 3 * SIDE * SIDE
LARGEST_FILE = 2**28  # bytes; a batch has 31 million

Part = tuple[np.ndarray, np.ndarray]  # images (n, 32, 32, 3) uint8, labels (n,) int64


class Files(NamedTuple):
    """The files of a folder: training batches in order, test batch, names of the classes."""

    train: list[Path]
    test: Path
    meta: Path


def cifar10(folder: Path) -> tuple[list[str], Part, Part]:
    """The classes' names, the part to train on and the part to test on.

    Args:
        folder: cifar-10-batches-py, or the folder that holds it.

    Raises:
        DataError: a file is missing, or isn't what it should be.
    """
    files = find(folder)
    classes = _classes(files.meta)
    parts = [_batch(path, len(classes)) for path in files.train]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return classes, (images, labels), _batch(files.test, len(classes))


def identity(folder: Path) -> dict[str, Any]:
    """What tells these data from others, wherever they lie: one checksum over all files.

    Args:
        folder: as for `cifar10`.

    Raises:
        DataError: a file is missing.
    """
    files = find(folder)
    paths = [*files.train, files.test, files.meta]
    total = hashlib.sha256("".join(sha256(path) for path in paths).encode())
    return {"batches": len(files.train), "sha256": total.hexdigest()}


def find(folder: Path) -> Files:
    """The files below `folder`, or in it. There are as many training batches as are found.

    Raises:
        DataError: there are none, or one is missing.
    """
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    elif not folder.is_dir() or (folder.name != FOLDER and not (folder / META).exists()):
        raise DataError(
            f"{folder} holds no {FOLDER}; torchvision.datasets.CIFAR10(ROOT, download=True) puts "
            "it into ROOT"
        )
    matches = (re.fullmatch(r"data_batch_([1-9]\d*)", path.name) for path in folder.iterdir())
    last = max((int(match[1]) for match in matches if match), default=1)
    return Files(
        [_present(folder / f"data_batch_{number}") for number in range(1, last + 1)],
        _present(folder / TEST),
        _present(folder / META),
    )


def _present(path: Path) -> Path:
    try:
        what, size = irregular(path), path.stat().st_size
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise DataError(f"{path} {'is missing' if missing else error.strerror}") from None
    if what is not None or size > LARGEST_FILE:
        raise DataError(f"{path} is {what or f'larger than {LARGEST_FILE} bytes'}")
    return path


def _batch(path: Path, classes: int) -> Part:
    content = _entries(path, b"data", b"labels")
    pixels, labels = _matrix(content[b"data"]), content[b"labels"]
    if pixels is None:
        raise DataError(f"{path}: its data aren't bytes of shape (n, {_PIXELS})")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise DataError(f"{path}: its labels aren't a list of {len(pixels)}, one per image")
    for image, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < classes:
            raise DataError(f"{path}: the label of image {image} isn't one of 0 to {classes - 1}")
    images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


def _classes(path: Path) -> list[str]:
    names = _entries(path, b"label_names")[b"label_names"]
    if not isinstance(names, list) or not names or {type(name) for name in names} != {bytes}:
        raise DataError(f"{path}: its label_names aren't a list of names")
    return [name.decode(errors="replace") for name in names]


def _entries(path: Path, *keys: bytes) -> dict[bytes, Any]:
    """The dictionary that a file holds, known to have these keys."""
    with path.open("rb") as file:
        try:
            content = _Unpickler(file, encoding="bytes").load()
        except Exception as error:  # pickle doesn't say what it raises for a malformed file
            raise DataError(f"{path} isn't a file of CIFAR-10 ({error!r})") from None
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise DataError(f"{path} isn't a file of CIFAR-10 (it has no {key.decode()})")
    return content


class _Recorded:
    """What a pickle says of an array or of a dtype. Nothing is made of it.

    numpy would believe it, and a crafted dtype makes it take bytes for addresses.
    """

    arguments: Any = ()
    state: Any = ()

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


# What arrays are pickled with: in NumPy's old modules and its new ones, and bytes by Python 3.
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Recorded,
    ("numpy._core.multiarray", "_reconstruct"): _Recorded,
    ("numpy", "ndarray"): _Recorded,
    ("numpy", "dtype"): _Recorded,
    ("_codecs", "encode"): codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ADMITTED[module, name]


def _matrix(recorded: Any) -> np.ndarray | None:
    """The recorded array (n, 3072) uint8, or None where it isn't of this form."""
    try:
        *_, shape, dtype, by_columns, content = recorded.state
        code = dtype.arguments[0]
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    if code not in ("u1", b"u1") or type(content) is not bytes or not content:
        return None
    if shape != (len(content) // _PIXELS, _PIXELS) or len(content) % _PIXELS:
        return None
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")
