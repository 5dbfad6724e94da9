"""What compressed changes look like when they arrive."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .case import Launches
from .inner import Array

# The headers, then the shards to those that average them, and their means to all.
IN_SHARDS = Launches(((1, 2),))


def to_bfloat16(x: Array) -> Array:
    """Rounded to the nearest with 8 significant bits, ties to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def to_int8(x: Array, block: int) -> Array:
    """A multiple of max |x| / 127 over each block, which is a 32-bit float."""
    told = np.zeros_like(x)
    for first in range(0, len(x), block):
        part = x[first : first + block]
        scale = float(np.float32(np.abs(part).max() / 127))
        if scale > 0:
            told[first : first + block] = np.clip(np.rint(part / scale), -127, 127) * scale
    return told


class Wire:
    """What arrives of the replicas' changes d_i + e_i: each rank averages one shard.

    e_i is what rank i has not yet told: of its own change, and, in the shard that it averages, of
    the sum. ``compress`` has a block, and is named for what it sends.
    """

    PARTS = (7, 1, 15, 33)  # sizes of the parameters, each of which begins at a multiple of 8

    def __init__(self, compress: Any, m: int) -> None:
        self.block = compress.block
        self.tell = {
            "Bfloat16": to_bfloat16,
            "Int8": functools.partial(to_int8, block=self.block),
        }[type(compress).__name__]
        ends = np.cumsum([-(-size // 8) * 8 for size in self.PARTS])
        starts = [0, *ends[:-1]]
        self.places = np.concatenate(
            [np.arange(a, a + n) for a, n in zip(starts, self.PARTS, strict=True)]
        )
        self.n = int(ends[-1])
        self.left = np.zeros((m, self.n))

    def mean(self, d: Array) -> Array:
        m = len(d)
        whole = np.zeros((m, self.n))
        whole[:, self.places] = d
        whole += self.left
        size = math.ceil(math.ceil(self.n / self.block) / m) * self.block
        result = np.zeros(self.n)
        for owner in range(m):
            shard = slice(owner * size, (owner + 1) * size)
            if m == 1:
                return d[0]
            total = whole[owner, shard].copy()
            for rank in range(m):
                if rank != owner:
                    told = self.tell(whole[rank, shard])
                    total += told
                    self.left[rank, shard] = whole[rank, shard] - told
            result[shard] = self.tell(total / m)
            self.left[owner, shard] = total - m * result[shard]
        return result[self.places]
