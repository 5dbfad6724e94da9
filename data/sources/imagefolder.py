"""A tree of images, such as ImageNet."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data import imagefolder
from data.dataset import DataError
from data.source import Content, Known, Source, folder_name, moments

NAMED = 20  # broken images that an error lists
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and std that everybody uses


class ImageFolder(Source):
    """TREE/train/CLASS/*.JPEG and TREE/val/CLASS/*.JPEG."""

    known = (Known("imagenet", 1_281_167, 1000, None),)

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        parser.description = (
            "Write an ImageFolder tree, such as ImageNet: TREE/train/CLASS/*.JPEG and "
            "TREE/val/CLASS/*.JPEG. The defaults are those of FFCV's ImageNet of 500 pixels, half "
            "of it JPEG of quality 90. Images are found by their extensions "
            f"({' '.join(imagefolder.EXTENSIONS)}), below each class's folder; other files and "
            "hidden ones are ignored. Each is decoded, and all that are broken are reported at the "
            "end."
        )
        add = parser.add_argument
        add("--folder", type=folder_name, required=True, metavar="TREE", help="the tree to read")
        add(
            "--max-size", type=int, default=500, metavar="PIXELS",
            help="an image whose longer side exceeds this is scaled down until it doesn't, keeping "
            "its shape, by averaging over areas (OpenCV's INTER_AREA, sides rounded down, as FFCV "
            "does); smaller ones keep their size (default 500)",
        )  # fmt: skip
        add(
            "--mode", choices=["jpg", "raw", "proportion"], default="proportion",
            help="store all as JPEG, all as pixels, or a share of them as JPEG, chosen by an "
            "image's place in the list of files (default proportion)",
        )  # fmt: skip
        add(
            "--jpeg-share", type=float, metavar="SHARE",
            help="with mode proportion: how probably an image is stored as JPEG, 0 to 1 (default "
            "0.5)",
        )  # fmt: skip
        add("--quality", type=int, default=90, help="of the JPEGs, 1 to 100 (default 90)")
        add(
            "--statistics", choices=["imagenet", "measured"], default="imagenet",
            help="mean and standard deviation to normalise with: the usual ones of ImageNet, or "
            "those of the training images as scaled (default imagenet)",
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

    def record(
        self, folder: Path, mode: str, jpeg_share: float | None, workers: int, **settings: Any
    ) -> dict[str, Any]:
        storage = _storage(mode=mode, jpeg_share=jpeg_share, **settings)
        kept = {key: settings[key] for key in ("statistics", "skip_broken")}
        return asdict(storage) | kept | imagefolder.identity(imagefolder.find(folder))

    def load(
        self, folder: Path, workers: int, statistics: str, skip_broken: bool, **settings: Any
    ) -> Content:
        from data.ffcv_parts import MIN_PAGE_SIZE  # takes long to import

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
                found["mean"], found["std"] = moments(train.counts)
            return found

        page_size = max(4 * MIN_PAGE_SIZE, 1 << (storage.room - 1).bit_length())
        return Content(tree.classes, *IMAGENET, train, val, page_size=page_size, findings=findings)


def _storage(
    mode: str, jpeg_share: float | None, max_size: int, quality: int, **_: Any
) -> imagefolder.Storage:
    if jpeg_share is not None and mode != "proportion":
        raise ValueError(
            f"a share of JPEGs, got {jpeg_share}, goes with mode proportion, not with {mode}"
        )
    share = 0.5 if jpeg_share is None else jpeg_share
    return imagefolder.Storage(max_size, quality, {"raw": 0.0, "jpg": 1.0}.get(mode, share))


def _broken(folder: Path, broken: dict[str, str], images: int) -> DataError:
    lines = [f"{folder / name}: {reason}" for name, reason in broken.items()]
    if len(lines) > NAMED:
        lines[NAMED:] = [f"and {len(lines) - NAMED} more"]
    return DataError(
        f"{len(broken)} of {images} images are broken, nothing is written "
        "(--skip-broken leaves them out):" + "".join(f"\n  {line}" for line in lines)
    )


SOURCE = ImageFolder()
