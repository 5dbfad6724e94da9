"""CIFAR-10, from torchvision's folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data import cifar10
from data.source import Content, Known, Source, folder_name, of_arrays


class CIFAR10(Source):
    """50,000 and 10,000 images of 32 x 32 pixels."""

    known = (Known("cifar10", 50_000, 10, 32),)

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--folder", type=folder_name, required=True,
            help=f"{cifar10.FOLDER}, or the folder that torchvision put it into",
        )  # fmt: skip

    def load(self, folder: Path) -> Content:
        return of_arrays(*cifar10.cifar10(folder))

    def record(self, folder: Path) -> dict[str, Any]:
        return cifar10.identity(folder)


SOURCE = CIFAR10()
