"""Write a data set as FFCV files: `python -m data.write SOURCE --out DIR`.

DIR then holds train.beton, val.beton and, written last, dataset.json, which describes them. Files
appear under their names only when complete. Running again does nothing if all is there and valid.
The bytes depend only on the source and its settings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data import cifar10, digits
from data.dataset import DESCRIPTION, TRAIN, VAL, DataError, Dataset, File, sha256
from data.ffcv_parts import (
    MIN_PAGE_SIZE,
    DatasetWriter,
    IntField,
    MemoryAllocator,
    RGBImageField,
    handle_sample,
)

Samples = Sequence[tuple[np.ndarray, int]]  # image (H, W, 3) uint8, label


@dataclass(frozen=True)
class Content:
    """What a source provides. `classes`, `mean` and `std` as in `Dataset`.

    `mode` is how the images are stored: "raw" or "jpg".
    """

    classes: list[str]
    mean: list[float]
    std: list[float]
    train: Samples
    val: Samples
    mode: str = "raw"


@dataclass(frozen=True)
class Source:
    """A kind of data that can be written.

    Attributes:
        add_flags: declares the source's own flags, its settings.
        load: from the settings to the content.
        record: from the settings to what dataset.json records: by default themselves. Two that
            record the same are the same data.
    """

    add_flags: Callable[[argparse.ArgumentParser], None]
    load: Callable[..., Content]
    record: Callable[..., dict[str, Any]] = dict


def _digits_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=32, help="side in pixels (default 32)")
    parser.add_argument(
        "--split", choices=["test", "tune"], default="test",
        help="evaluate on the test part, or on a part of the training part to choose settings",
    )  # fmt: skip


def _load_digits(size: int, split: str) -> Content:
    return _content(digits.CLASSES, *digits.digits(split, size))


def _cifar10_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, required=True,
        help=f"{cifar10.FOLDER}, or the folder that torchvision put it into",
    )  # fmt: skip


def _load_cifar10(folder: Path) -> Content:
    return _content(*cifar10.cifar10(folder))


def _content(
    classes: list[str], train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]
) -> Content:
    """Images (n, H, W, 3) uint8 and labels (n,) of both parts, with statistics of the first."""
    # From histograms: CIFAR-10's images would take a gigabyte as floating-point numbers.
    counts = np.zeros((3, 256), np.int64)
    for image in train[0]:
        for channel in range(3):
            counts[channel] += np.bincount(image[..., channel].reshape(-1), minlength=256)
    shares, levels = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ levels
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
    return Content(
        classes=classes,
        mean=mean.round(6).tolist(),
        std=std.round(6).tolist(),
        train=list(zip(*train, strict=True)),
        val=list(zip(*val, strict=True)),
    )


SOURCES = {
    "digits": Source(_digits_flags, _load_digits),
    "cifar10": Source(_cifar10_flags, _load_cifar10, cifar10.identity),
}


def write(name: str, settings: dict[str, Any], out: Path, *, force: bool = False) -> bool:
    """Write a source's data into a folder, unless they are there already.

    Args:
        name: a key of SOURCES.
        settings: the source's flags.
        out: the folder; made if missing.
        force: write even over valid files or another data set.

    Returns:
        Whether anything was written.

    Raises:
        DataError: the folder holds another data set, or can't be written; or the source's own
            files aren't as they should be.
        ValueError: the source refuses the settings.
    """
    source = SOURCES[name]
    recorded = source.record(**settings)
    if not force and _is_there(name, recorded, out):
        return False
    write_content(name, recorded, source.load(**settings), out)
    return True


def write_content(name: str, settings: dict[str, Any], content: Content, out: Path) -> None:
    """Write both .beton files, and then dataset.json, into a folder, made if missing.

    Args:
        name, settings: recorded in dataset.json.
        content: what to write.
        out: the folder.

    Raises:
        DataError: the folder can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = {}
        for file, samples in ((TRAIN, content.train), (VAL, content.val)):
            with _replacing(out / file) as temporary:
                write_beton(temporary, samples, content.mode, label=file)
            files[file] = File(len(samples), (out / file).stat().st_size, sha256(out / file))
        dataset = Dataset(name, settings, content.classes, content.mean, content.std, files)
        with _replacing(out / DESCRIPTION) as temporary:
            temporary.write_text(dataset.dump())
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}") from error


def write_beton(path: Path, samples: Samples, mode: str, label: str) -> None:
    """Write one file with the fields `image` and `label`.

    Args:
        path: where to.
        samples: what.
        mode: "raw" or "jpg".
        label: a name for the progress bar.
    """
    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    # FFCV's smallest page: a file is at least two pages long.
    writer = _InProcessWriter(str(path), fields, page_size=MIN_PAGE_SIZE, num_workers=1)
    writer.label = label
    writer.from_indexed_dataset(samples)


class _InProcessWriter(DatasetWriter):
    """FFCV's writer without its worker processes.

    Those write pages in the order in which they happen to finish, and FFCV waits for ever for one
    that died, of a full disk or an unreadable image. Here bytes are reproducible and errors rise.
    """

    label = ""

    def _write_common(self, num_samples, queue_content, work_fn, extra_worker_args) -> None:
        (dataset,) = extra_worker_args
        self.num_samples = num_samples
        self.prepare()
        try:
            metadata = np.zeros(num_samples, self.metadata_type)
            allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            names = self.metadata_type.names
            with allocator, tqdm(total=num_samples, desc=self.label, unit=" images") as progress:
                for chunk in queue_content:
                    for position, index in chunk:
                        handle_sample(
                            dataset[index], position, names, metadata, allocator, self.fields
                        )
                    progress.update(len(chunk))
            self.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
            self.finalize([allocator.allocations])
        finally:
            self.metadata_sm.close()
            self.metadata_sm.unlink()


def _is_there(name: str, settings: dict[str, Any], out: Path) -> bool:
    """Whether the folder holds just these data, undamaged; DataError if it holds others."""
    if not (out / DESCRIPTION).exists():
        return False
    try:
        dataset = Dataset.load(out / DESCRIPTION)
    except DataError:
        return False
    if (dataset.name, dataset.settings) != (name, settings):
        raise DataError(
            f"{out} holds {dataset.name} {json.dumps(dataset.settings)}, not {name} "
            f"{json.dumps(settings)}; choose another folder, or --force to overwrite"
        )
    return set(dataset.files) == {TRAIN, VAL} and all(
        (out / file).is_file() and sha256(out / file) == recorded.sha256
        for file, recorded in dataset.files.items()
    )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there takes its place if all goes well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp made the file private; give it the usual permissions
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after one line on stderr."""
    parser = _Parser(prog="python -m data.write", description="Write a data set as .beton files.")
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, source in SOURCES.items():
        sub = sources.add_parser(name)
        sub.add_argument("--out", type=Path, required=True, help="folder to write to")
        sub.add_argument("--force", action="store_true", help="write even if all is there")
        source.add_flags(sub)
    settings = vars(parser.parse_args(arguments))
    name, out, force = (settings.pop(key) for key in ("source", "out", "force"))
    try:
        written = write(name, settings, out, force=force)
    except (DataError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {'written' if written else 'all there and valid, nothing to do'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
