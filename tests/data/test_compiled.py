"""data.compiled: machine code that is kept on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from data import compiled as compiled_
from tests.support.patience import PATIENCE

ROOT = Path(__file__).parents[2]
# What decoding and augmenting need: as a loader calls it, without an image.
PROGRAM = """
import json, numpy as np
from data.augment import SAMPLE, decode_samples
from data.randaugment import RandAugment, transform
file = np.zeros(64, np.uint8)
images = np.empty((0, 8, 8, 3), np.uint8)
none = np.empty(0, np.int64)
decode_samples(none, np.zeros(1, SAMPLE), file, images, None)
RandAugment(depth=2, severity=10, operations="all").apply(images, np.empty(0, np.uint64))
functions = (decode_samples, transform)
print(json.dumps([[sum(f.stats.cache_hits.values()), sum(f.stats.cache_misses.values())]
                  for f in functions]))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    def counts() -> list[list[int]]:
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, capture_output=True, check=True,
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}, timeout=PATIENCE,
        )  # fmt: skip
        return json.loads(ended.stdout)

    assert counts() == [[0, 1], [0, 1]]
    assert counts() == [[1, 0], [1, 0]]


def test_where_nothing_can_be_written_it_works_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusing(cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(compiled_, "njit", refusing)

    @compiled_.compiled
    def double(x: float) -> float:
        return 2 * x

    assert double(2.0) == 4.0
