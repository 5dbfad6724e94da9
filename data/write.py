"""Write a data set as FFCV files: `python -m data.write SOURCE --out DIR`.

DIR then holds train.beton, val.beton and, written last, dataset.json, which describes them. Files
appear under their names only when complete. Running again does nothing if all is there and valid.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data import imagefolder, sources
from data.dataset import DESCRIPTION, TRAIN, VAL, DataError, Dataset, File
from data.ffcv_parts import (
    JPEG,
    MIN_PAGE_SIZE,
    RAW,
    DatasetWriter,
    IntField,
    MemoryAllocator,
    RGBImageField,
)
from data.source import Content, Samples, Stored, folder_name

QUALITY = 90  # of JPEGs made from arrays
PLACE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])  # FFCV's



def write(name: str, settings: dict[str, Any], out: Path, *, force: bool = False) -> bool:
    """Write a source's data into a folder, unless they are there already.

    Args:
        name: one of `data.sources.NAMES`.
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
    source = sources.source(name)
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
        with ExitStack() as both:
            for file, samples in ((TRAIN, content.train), (VAL, content.val)):
                temporary = both.enter_context(_replacing(out / file))
                images = write_beton(
                    temporary, samples, content.mode, label=file, page_size=content.page_size
                )
                files[file] = File(images, temporary.stat().st_size, _checksum(temporary, file))
            found = {"mean": content.mean, "std": content.std} | content.findings()
        dataset = Dataset(name, settings, content.classes, files=files, **found)
        with _replacing(out / DESCRIPTION) as temporary:
            temporary.write_text(dataset.dump())
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}") from error


def write_beton(
    path: Path, samples: Samples, mode: str, label: str, page_size: int | None = None
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
    writer = _Writer(str(path), fields, page_size or MIN_PAGE_SIZE, num_workers=1)
    return writer.write(samples, mode, label)


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
        (out / file).is_file() and _checksum(out / file, file) == recorded.sha256
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
    """The command line. Returns the exit code: 0; or, with the reason on stderr, 2 or 130."""
    parser = _Parser(prog="python -m data.write", description="Write a data set as .beton files.")
    kinds = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name in sources.NAMES:
        sub = kinds.add_parser(name)
        sub.add_argument("--out", type=folder_name, required=True, help="folder to write to")
        sub.add_argument("--force", action="store_true", help="write even if all is there")
        sources.source(name).add_flags(sub)
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
