"""Write a data set as FFCV files: `python -m data.write SOURCE --out DIR`.

DIR then holds train.beton, val.beton and, written last, dataset.json, which describes them. Files
appear under their names only when complete. Running again does nothing if all is there and valid;
what is there and is anything else is written over only with --force.
The bytes depend only on the source and its settings (and the releases of OpenCV and Pillow).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from data import cifar10, digits, imagefolder
from data.dataset import DESCRIPTION, TRAIN, VAL, DataError, Dataset, File, command
from data.ffcv_parts import (
    JPEG,
    MIN_PAGE_SIZE,
    RAW,
    DatasetWriter,
    IntField,
    MemoryAllocator,
    RGBImageField,
)
from data.imagefolder import Stored

QUALITY = 90  # of JPEGs made from arrays
NAMED = 20  # broken images that an error lists
PLACE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])  # FFCV's
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and std that everybody uses


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
        page_size: of the file, in bytes, a power of two. No image can take more.
        findings: called once train and val were gone through, for entries of `Dataset` that are
            known only then. A DataError leaves nothing written.
    """

    classes: list[str]
    mean: list[float]
    std: list[float]
    train: Samples
    val: Samples
    mode: str = "raw"
    page_size: int = MIN_PAGE_SIZE  # FFCV's smallest: a file is at least two pages long
    findings: Callable[[], dict[str, Any]] = dict


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


def _path(text: str) -> Path:
    """A folder from a flag, whose name would fit the line of an error."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder")
    return Path(text)


def _digits_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=32, help="side in pixels (default 32)")
    parser.add_argument(
        "--split", choices=["test", "tune"], default="test",
        help="evaluate on the validation part (test), or on a part of the training part, to choose "
        "settings (tune)",
    )  # fmt: skip


def _load_digits(size: int, split: str) -> Content:
    return _content(digits.CLASSES, *digits.digits(split, size))


def _cifar10_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=_path, required=True,
        help=f"{cifar10.FOLDER}, or the folder that torchvision put it into",
    )  # fmt: skip


def _load_cifar10(folder: Path) -> Content:
    return _content(*cifar10.cifar10(folder))


def _imagefolder_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write an ImageFolder tree, such as ImageNet: TREE/train/CLASS/*.JPEG and "
        "TREE/val/CLASS/*.JPEG. The defaults are those of FFCV's ImageNet of 500 pixels, half of "
        "it JPEG of quality 90. Images are found by their extensions "
        f"({' '.join(imagefolder.EXTENSIONS)}), below each class's folder; other files and hidden "
        "ones are ignored. Each is decoded, and all that are broken are reported at the end."
    )
    add = parser.add_argument
    add("--folder", type=_path, required=True, metavar="TREE", help="the tree to read")
    add(
        "--max-size", type=int, default=500, metavar="PIXELS",
        help="an image whose longer side exceeds this is scaled down until it doesn't, keeping its "
        "shape, by averaging over areas (OpenCV's INTER_AREA, sides rounded down, as FFCV does); "
        "smaller ones keep their size (default 500)",
    )  # fmt: skip
    add(
        "--mode", choices=["jpg", "raw", "proportion"], default="proportion",
        help="store all as JPEG, all as pixels, or a share of them as JPEG, chosen by an image's "
        "place in the list of files (default proportion)",
    )  # fmt: skip
    add(
        "--jpeg-share", type=float, metavar="SHARE",
        help="with mode proportion: how probably an image is stored as JPEG, 0 to 1 (default 0.5)",
    )  # fmt: skip
    add("--quality", type=int, default=90, help="of the JPEGs, 1 to 100 (default 90)")
    add(
        "--statistics", choices=["imagenet", "measured"], default="imagenet",
        help="mean and standard deviation to normalise with: the usual ones of ImageNet, or those "
        "of the training images as scaled (default imagenet)",
    )  # fmt: skip
    add(
        "--skip-broken", action="store_true",
        help="leave broken images out, and name them in dataset.json, instead of refusing",
    )  # fmt: skip
    add(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes that decode and compress; the result doesn't depend on their number "
        "(default: one per core, %(default)s here)",
    )  # fmt: skip


def _record_imagefolder(
    folder: Path, mode: str, jpeg_share: float | None, workers: int, **settings: Any
) -> dict[str, Any]:
    storage = _storage(mode=mode, jpeg_share=jpeg_share, **settings)
    kept = {key: settings[key] for key in ("statistics", "skip_broken")}
    return asdict(storage) | kept | imagefolder.identity(imagefolder.find(folder))


def _storage(
    mode: str, jpeg_share: float | None, max_size: int, quality: int, **_: Any
) -> imagefolder.Storage:
    if jpeg_share is not None and mode != "proportion":
        raise ValueError(
            f"a share of JPEGs, got {jpeg_share}, goes with mode proportion, not with {mode}"
        )
    share = 0.5 if jpeg_share is None else jpeg_share
    return imagefolder.Storage(max_size, quality, {"raw": 0.0, "jpg": 1.0}.get(mode, share))


def _load_imagefolder(
    folder: Path, workers: int, statistics: str, skip_broken: bool, **settings: Any
) -> Content:
    tree, storage = imagefolder.find(folder), _storage(**settings)
    measured = statistics == "measured"
    train = imagefolder.Images(tree.train, storage, workers=workers, counting=measured)
    val = imagefolder.Images(tree.val, storage, workers=workers)

    def findings() -> dict[str, Any]:
        broken = train.broken | val.broken
        if broken and not skip_broken:
            raise _broken(folder, broken, len(train) + len(val))
        for images in (train, val):
            if len(images.broken) == len(images):
                raise DataError(f"{folder}: no image is left")
        found: dict[str, Any] = {"skipped": list(broken)}
        if measured:
            found["mean"], found["std"] = _moments(train.counts)
        return found

    page_size = max(4 * MIN_PAGE_SIZE, 1 << (storage.room - 1).bit_length())
    return Content(tree.classes, *IMAGENET, train, val, page_size=page_size, findings=findings)


def _broken(folder: Path, broken: dict[str, str], images: int) -> DataError:
    lines = [f"{folder / name}: {reason}" for name, reason in broken.items()]
    if len(lines) > NAMED:
        lines[NAMED:] = [f"and {len(lines) - NAMED} more"]
    return DataError(
        f"{len(broken)} of {images} images are broken, nothing is written "
        "(--skip-broken leaves them out):" + "".join(f"\n  {line}" for line in lines)
    )


def _content(
    classes: list[str], train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]
) -> Content:
    """Images (n, H, W, 3) uint8 and labels (n,) of both parts, with statistics of the first."""
    counts = np.zeros((3, 256), np.int64)
    for image in train[0]:
        counts += imagefolder.levels(image)
    return Content(
        classes,
        *_moments(counts),
        train=list(zip(*train, strict=True)),
        val=list(zip(*val, strict=True)),
    )


def _moments(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, from (3, 256) how often each level occurs."""
    # From histograms: CIFAR-10's images would take a gigabyte as floating-point numbers.
    shares, levels = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ levels
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
    return mean.round(6).tolist(), std.round(6).tolist()


SOURCES = {
    "digits": Source(_digits_flags, _load_digits),
    "cifar10": Source(_cifar10_flags, _load_cifar10, cifar10.identity),
    "imagefolder": Source(_imagefolder_flags, _load_imagefolder, _record_imagefolder),
}


def write(name: str, settings: dict[str, Any], out: Path, *, force: bool = False) -> bool:
    """Write a source's data into a folder, unless they are there already.

    Args:
        name: a key of SOURCES.
        settings: the source's flags.
        out: the folder; made if missing.
        force: write even over valid files, another data set, or files that are none of it.

    Returns:
        Whether anything was written.

    Raises:
        DataError: the folder holds another data set or other files of these names, or can't be
            written; or the source's own files aren't as they should be.
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
        # They take their places together, the description last: two runs that write the same data
        # at the same time don't find each other's without one.
        with ExitStack() as all_three:
            description = all_three.enter_context(_replacing(out / DESCRIPTION))
            for file, samples in ((TRAIN, content.train), (VAL, content.val)):
                temporary = all_three.enter_context(_replacing(out / file))
                images = write_beton(
                    temporary, samples, content.mode, label=file, page_size=content.page_size
                )
                _sync(temporary)
                files[file] = File(images, temporary.stat().st_size, _checksum(temporary, file))
            found = {"mean": content.mean, "std": content.std} | content.findings()
            dataset = Dataset(name, settings, content.classes, files=files, **found)
            description.write_text(dataset.dump())
            _sync(description)
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}") from error


def write_beton(
    path: Path, samples: Samples, mode: str, label: str, page_size: int = MIN_PAGE_SIZE
) -> int:
    """Write one file with the fields `image` and `label`.

    Args:
        path: where to.
        samples: what.
        mode, page_size: as in `Content`.
        label: a name for the progress bar.

    Returns:
        The number of images.
    """
    fields = {"image": RGBImageField(), "label": IntField()}
    return _Writer(str(path), fields, page_size, num_workers=1).write(samples, mode, label)


class _Writer(DatasetWriter):
    """FFCV's writer without its worker processes.

    Those write pages in the order in which they happen to finish, and FFCV waits for ever for one
    that died, of a full disk or an unreadable image. Here bytes are reproducible and errors rise.
    """

    def write(self, samples: Samples, mode: str, label: str) -> int:
        """What `write_beton` does."""
        self.num_samples = len(samples)
        self.prepare()
        try:
            metadata, places = (np.zeros(len(samples), x) for x in (self.metadata_type, PLACE))
            written = 0
            pages = _Pages(self.fname, self.data_region_start, self.page_size)
            with pages, tqdm(total=len(samples), desc=label, unit=" images") as progress:
                for image, number in samples:
                    if not isinstance(image, Stored):
                        image = _stored(image, mode)
                    address, kind = pages.put(image.content), JPEG if image.jpeg else RAW
                    metadata[written] = ((kind, image.width, image.height, address), number)
                    places[written] = (written, address, image.content.size)
                    written += 1
                    progress.update()
            # Fewer than expected leave a gap between their table and the first page.
            self.header["num_samples"] = written
            self.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
            self.finalize([places[:written]])
            return written
        finally:
            self.metadata_sm.close()
            self.metadata_sm.unlink()


class _Pages(MemoryAllocator):
    """FFCV's pages of a file, of which none is lost.

    FFCV doesn't look whether a page was written in full, and, interrupted at the wrong moment,
    waits for ever to write one that is written already.
    """

    def __enter__(self) -> None:
        self.fp = open(self.fname, "ab")  # buffered, and so in full or an error

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self.fp:
            if kind is None:
                self.flush_page()

    def put(self, content: np.ndarray) -> int:
        """Store (bytes,) uint8; returns their address in the file."""
        address, room = self.malloc(content.size)
        room[:] = content
        self.allocations.clear()  # for ImageNet a quarter of a gigabyte
        return address


def _stored(image: np.ndarray, mode: str) -> Stored:
    return imagefolder.as_jpeg(image, QUALITY) if mode == "jpg" else imagefolder.as_pixels(image)


def _checksum(path: Path, label: str) -> str:
    """The sha256 of a file. That of ImageNet takes minutes, so there is a progress bar."""
    total, size = hashlib.sha256(), path.stat().st_size
    bar = tqdm(desc=f"{label} checksum", total=size, unit="B", unit_scale=True, delay=2)
    with path.open("rb") as file, bar as progress:
        while block := file.read(2**20):
            total.update(block)
            progress.update(len(block))
    return total.hexdigest()


def _is_there(name: str, settings: dict[str, Any], out: Path) -> bool:
    """Whether the folder holds just these data; DataError if something else is in their way."""
    overwriting = command(name, out, settings, force=True)
    there = [file for file in (TRAIN, VAL, DESCRIPTION) if os.path.lexists(out / file)]
    if DESCRIPTION not in there:
        if there:
            raise DataError(
                f"{out / there[0]} is there already, and no {DESCRIPTION} says what it is: move it "
                f"away, or overwrite it with {overwriting}"
            )
        return False
    try:
        dataset = Dataset.load(out / DESCRIPTION)
    except DataError:
        raise DataError(
            f"{out / DESCRIPTION} is there already, and describes no data set: move it away, or "
            f"overwrite it with {overwriting}"
        ) from None
    if (dataset.name, dataset.settings) != (name, settings):
        raise DataError(
            f"{out} holds {dataset.name} {json.dumps(dataset.settings)}, not {name} "
            f"{json.dumps(settings)}; choose another folder, or --force to overwrite"
        )
    for file in (TRAIN, VAL):
        recorded = dataset.files.get(file)
        same = file in there and recorded and (out / file).is_file()
        if file in there and not (same and _checksum(out / file, file) == recorded.sha256):
            raise DataError(
                f"{out / file} is not what {DESCRIPTION} records: move it away, or overwrite it "
                f"with {overwriting}"
            )
    return len(there) == 3


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there takes its place if all goes well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
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
    """The command line. Returns the exit code: 0; or, with the reason on stderr, 2 or 130."""
    parser = _Parser(prog="python -m data.write", description="Write a data set as .beton files.")
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, source in SOURCES.items():
        sub = sources.add_parser(name)
        sub.add_argument("--out", type=_path, required=True, help="folder to write to")
        sub.add_argument("--force", action="store_true", help="write over what is there")
        source.add_flags(sub)
    settings = vars(parser.parse_args(arguments))
    name, out, force = (settings.pop(key) for key in ("source", "out", "force"))
    try:
        written = write(name, settings, out, force=force)
        skipped = len(Dataset.load(out / DESCRIPTION).skipped)
    except (DataError, ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    without = f", without {skipped} broken images, which {DESCRIPTION} names" if skipped else ""
    print(f"{out}: {'written' if written else 'all there and valid, nothing to do'}{without}")
    return 0


def _terminate(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)  # to leave no half-written file either
    sys.exit(main())
