"""scikit-learn's handwritten digits."""

from __future__ import annotations

import argparse

from data import digits
from data.source import Content, Known, Source, of_arrays


class Digits(Source):
    """The embedded data set."""

    embedded = True
    known = (Known("digits", 1_438, 10, 32),)

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", type=int, default=32, help="side in pixels (default 32)")
        parser.add_argument(
            "--split", choices=["test", "tune"], default="test",
            help="evaluate on the test part, or on a part of the training part to choose settings",
        )  # fmt: skip

    def load(self, size: int, split: str) -> Content:
        return of_arrays(digits.CLASSES, *digits.digits(split, size))


SOURCE = Digits()
