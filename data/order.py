"""Who reads what: permutations, shards and random draws as pure functions of their arguments.

Nothing here keeps state. The random bits come from Philox and SeedSequence, whose streams NumPy
guarantees not to change between releases, and from the splitmix64 hash written out below.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 divided by the golden ratio


class Stream(IntEnum):
    """What a draw is for. Two purposes never share a number, so adding one changes no other."""

    CROP = 1
    FLIP = 2
    PIXELS = 3  # one seed per sample, for augmentations of the decoded image
    ESTIMATION = 4  # BatchNorm's re-estimation: seeds its own order, crops and flips


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """One permutation of all `n` samples, a function of (seed, epoch) only.

    The samples are sorted by one raw 64-bit Philox output each (ties by index), rather than
    shuffled by `Generator.permutation`, whose algorithm NumPy is free to change.

    Args:
        n: number of samples, at least 0.
        seed: at least 0.
        epoch: at least 0.

    Returns:
        (n,) int64.

    Raises:
        ValueError: a negative argument.
    """
    for name, value in (("n", n), ("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def shard(
    order: np.ndarray,
    *,
    rank: int,
    world_size: int,
    total_batch: int,
    start_step: int = 0,
    steps: int | None = None,
) -> np.ndarray:
    """This rank's samples, step after step.

    Global batch k is `order[k*B : (k+1)*B]`, and rank r takes the r-th of its `world_size` equal
    slices. Hence the ranks' union at step k is the same set for every world size that divides B.
    The last global batch is dropped where it is incomplete.

    Args:
        order: (n,) sample indices.
        rank, world_size: which slice, and of how many.
        total_batch: B, samples per step over all ranks.
        start_step: the first step to return, for a resumed epoch.
        steps: how many steps; None for all that are left.

    Returns:
        (steps * B / world_size,) of order's dtype.

    Raises:
        ValueError: B isn't divisible by world_size or exceeds n; rank or steps out of range.
    """
    n = len(order)
    _check_rank(rank, world_size)
    if total_batch < 1 or total_batch % world_size:
        raise ValueError(
            f"the total batch {total_batch} isn't a positive multiple of the {world_size} ranks"
        )
    if total_batch > n:
        raise ValueError(f"the total batch {total_batch} exceeds the {n} samples of an epoch")
    whole = n // total_batch
    stop = whole if steps is None else start_step + steps
    if not 0 <= start_step <= stop <= whole:
        raise ValueError(
            f"steps {start_step} to {stop} do not lie in an epoch of {whole} steps "
            f"({n} samples, total batch {total_batch})"
        )
    batches = order[: whole * total_batch].reshape(whole, world_size, total_batch // world_size)
    return batches[start_step:stop, rank].reshape(-1)


def validation_shard(n: int, rank: int, world_size: int) -> np.ndarray:
    """This rank's contiguous part of `n` samples: each sample on exactly one rank, none padded.

    Args:
        n: number of samples.
        rank, world_size: which part, and of how many.

    Returns:
        (m,) int64 with m = n / world_size rounded down or up; may be empty.

    Raises:
        ValueError: rank out of range.
    """
    _check_rank(rank, world_size)
    return np.arange(n * rank // world_size, n * (rank + 1) // world_size, dtype=np.int64)


def bits(seed: int, epoch: int, indices: np.ndarray, count: int, stream: int) -> np.ndarray:
    """`count` random 64-bit words per sample, by hashing (seed, epoch, stream, index, k).

    A splitmix64 stream per sample (Steele, Lea, Flood, OOPSLA 2014), whose starting state is the
    hash of the other four. Word k of a sample depends on nothing else, in particular not on which
    other samples are asked for, in which order, or by whom.

    Args:
        seed, epoch: at least 0, below 2**64.
        indices: (m,) sample indices, at least 0.
        count: words per sample.
        stream: purpose, see `Stream`.

    Returns:
        (m, count) uint64.
    """
    state = np.zeros(1, np.uint64)  # not a scalar: NumPy warns when those wrap around
    for part in (seed, epoch, stream):
        state = _mix((state + np.uint64(_GOLDEN)) ^ np.uint64(part))
    start = _mix(state ^ _mix(np.asarray(indices).astype(np.uint64)))  # (m,)
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)  # (count,)
    return _mix(start[:, None] + steps)


def draws(seed: int, epoch: int, indices: np.ndarray, count: int, stream: int) -> np.ndarray:
    """`count` uniform numbers per sample: the upper 53 of each of `bits`' words.

    Args:
        as `bits`.

    Returns:
        (m, count) float64 in [0, 1).
    """
    return (bits(seed, epoch, indices, count, stream) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function, a bijection of 64-bit words; arithmetic modulo 2**64."""
    x = x ^ (x >> np.uint64(30))
    x = np.multiply(x, np.uint64(0xBF58476D1CE4E5B9))
    x = x ^ (x >> np.uint64(27))
    x = np.multiply(x, np.uint64(0x94D049BB133111EB))
    return x ^ (x >> np.uint64(31))


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not lie in a world of size {world_size}")
