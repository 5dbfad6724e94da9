"""dataset.json, which says what the .beton files beside it hold, and the checks before reading one.

FFCV follows the addresses inside a .beton without looking whether they lie in the file: a truncated
one ends the process. So a file is opened only when it is what its writer recorded.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DESCRIPTION = "dataset.json"
TRAIN, VAL = "train.beton", "val.beton"

# Up to this size a file's checksum is compared at every opening (a tenth of a second); of a larger
# one only the size, since reading all of ImageNet would take minutes.
CHECKSUM_LIMIT = 64 * 2**20
DESCRIPTION_LIMIT = 2**24  # bytes; that of ImageNet has 30,000


class DataError(Exception):
    """Data are missing, damaged or not those asked for. One line, with the path; where several
    files are broken, one for each.
    """


@dataclass(frozen=True)
class File:
    """What the writer recorded of one .beton."""

    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """The content of dataset.json.

    Attributes:
        name: the source's name.
        settings: what the source was asked for, such as the split and the image size in pixels, or
            a checksum of the files it was made from.
        classes: names; the label is the position.
        mean, std: per channel, black being 0 and white 1: what images are normalised with, by
            default the training part's own.
        files: by file name.
        skipped: names of the source's files that were left out, being broken.
    """

    name: str
    settings: dict[str, Any]
    classes: list[str]
    mean: list[float]
    std: list[float]
    files: dict[str, File]
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Dataset:
        """Read a dataset.json.

        Raises:
            DataError: it is missing or not of this form.
        """
        try:
            content = json.loads(regular(path, DESCRIPTION_LIMIT))
            files = {name: File(**entry) for name, entry in content.pop("files").items()}
            dataset = cls(**content, files=files)
        except FileNotFoundError:
            raise DataError(f"{path} is missing; {remedy(path)}") from None
        except (
            OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError
        ) as error:  # fmt: skip
            told = " ".join(str(error).split())
            raise DataError(f"{path} cannot be read ({told}); {remedy(path)}") from None
        if wrong := _wrong(dataset):
            raise DataError(f"{path}: {wrong}; {remedy(path)}")
        return dataset

    def dump(self) -> str:
        content = asdict(self)
        if not self.skipped:
            del content["skipped"]
        return json.dumps(content, indent=2) + "\n"


def _wrong(dataset: Dataset) -> str | None:
    """The first entry of a dataset.json that is not of its kind, and what it should be."""
    expected = [
        ("name", dataset.name, _is_text, "text"),
        ("settings", dataset.settings, lambda value: isinstance(value, dict), "an object"),
        ("classes", dataset.classes, _are_texts, "a list of names"),
        ("mean", dataset.mean, _are_levels, "three numbers"),
        (
            "std", dataset.std,
            lambda value: _are_levels(value) and min(value) > 0, "three positive numbers",
        ),
        ("skipped", dataset.skipped, _are_texts, "a list of names"),
    ]  # fmt: skip
    for name, file in dataset.files.items():
        expected += [
            (f"images of {name!r}", file.images, _is_count, "a count"),
            (f"bytes of {name!r}", file.bytes, _is_count, "a count"),
            (f"sha256 of {name!r}", file.sha256, _is_text, "text"),
        ]
    for name, value, fits, what in expected:
        if not fits(value):
            return f"{name} is {reprlib.repr(value)}: it must be {what}"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_levels(value: Any) -> bool:
    """One finite number for each of the three channels."""
    numbers = isinstance(value, list) and all(type(level) in (int, float) for level in value)
    return numbers and len(value) == 3 and all(map(math.isfinite, value))


def checked(path: str | Path) -> Dataset:
    """The description of a .beton which was found to be as its writer left it.

    Args:
        path: the .beton; dataset.json lies in the same folder.

    Raises:
        DataError: either file is missing, or they don't agree.
    """
    path = Path(path)
    if not path.is_file():
        state = "isn't a file" if path.exists() else "is missing"
        raise DataError(f"{path} {state}; {remedy(path)}")
    dataset = Dataset.load(path.with_name(DESCRIPTION))
    if path.name not in dataset.files:
        raise DataError(f"{path} isn't described in {DESCRIPTION}; {remedy(path)}")
    file, size = dataset.files[path.name], path.stat().st_size
    if size != file.bytes:
        raise damaged(path, f"has {size} bytes instead of {file.bytes}")
    if size <= CHECKSUM_LIMIT and sha256(path) != file.sha256:
        raise damaged(path, f"doesn't have the checksum recorded in {DESCRIPTION}")
    return dataset


def damaged(path: Path, what: str) -> DataError:
    """The error for a file whose content is wrong; `what` completes the sentence."""
    return DataError(f"{path} {what}; {remedy(path)}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def regular(path: Path, most: int) -> bytes:
    """The content of a regular file, or of one that links lead to, of at most so many bytes.

    Reading a FIFO could wait for ever, and a device may have no end.

    Raises:
        OSError: it can't be read.
        ValueError: it is of another kind, or larger.
    """
    if (what := irregular(path)) is not None:
        raise ValueError(what)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most} bytes")
    return content


def irregular(path: Path) -> str | None:
    """What is wrong with a file that isn't a regular one; OSError where there is none."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
    return f"not a regular file but {kinds.get(stat.S_IFMT(mode), 'a device')}"


def remedy(path: Path) -> str:
    """The end of an error about a file of a data set: the command that writes the data set."""
    from data import sources  # they know this module

    folder = path.parent
    source, settings = _recorded(folder / DESCRIPTION)
    source = source if source in sources.NAMES else sources.kind_of(folder.name)
    # What is there is written over only where the command says so.
    there = any((folder / name).exists() for name in (TRAIN, VAL, DESCRIPTION))
    *others, last = sources.NAMES
    which = "" if source else f", SOURCE being {', '.join(others)} or {last}"
    return f"run {sources.command(source, folder, settings, force=there)}{which}"


def _recorded(description: Path) -> tuple[Any, dict[str, Any]]:
    """Source and settings of the data that a description, which may be damaged, is of."""
    try:
        content = json.loads(regular(description, DESCRIPTION_LIMIT))
        name, settings = content["name"], content["settings"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None, {}
    return name, settings if isinstance(settings, dict) else {}
