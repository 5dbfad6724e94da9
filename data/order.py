"""Who reads what: permutations, shards and random draws as pure functions of their arguments.

Nothing here keeps state. The random bits come from Philox and SeedSequence, whose streams NumPy
guarantees not to change between releases, from RandomState, whose distributions it froze as well,
and from the splitmix64 hash written out below.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 divided by the golden ratio
_TURNS = 100  # in which ranks fill their shards


class Stream(IntEnum):
    """What a draw is for. Two purposes never share a number, so adding one changes no other."""

    CROP = 1
    FLIP = 2
    PIXELS = 3  # one seed per sample, for augmentations of the decoded image
    ESTIMATION = 4  # BatchNorm's re-estimation: seeds its own order, crops and flips
    SHIFT = 5  # where a crop of the padded image lies
    SHARDS = 6  # which images a replica owns, where the replicas' shards are skewed
    SHARD_ORDER = 7  # in which order it goes through them
    MIXUP = 8  # how much of its neighbour an image takes; in place of the epoch, the step
    STORAGE = 9  # whether an image of a tree is stored as JPEG or as pixels


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


def label_shards(
    labels: np.ndarray, world_size: int, concentration: float, seed: int
) -> np.ndarray:
    """A shard of the samples for each rank, each with a class mix of its own.

    Shards are disjoint and of equal size s = floor(n / world_size); the fewer than world_size
    samples left over are in none. Rank r's class mix is q_r ~ Dir(α·p), p being the classes' shares
    of all samples and α the concentration (Hsu, Qi, Brown 2019, arXiv 1909.06335, section 2). See
    `label_counts` for how the shards are filled.

    Args:
        labels: (n,) integers.
        world_size: number of shards.
        concentration: α in [1e-6, 1e6]; the smaller, the more skewed.
        seed: decides the mixes and who gets which sample, at least 0.

    Returns:
        (world_size, s) int64, each row ascending.

    Raises:
        ValueError: a number is out of range.
    """
    classes, totals = np.unique(labels, return_counts=True)
    seeds = bits(seed, 0, np.array([0]), 2, Stream.SHARDS)[0].tolist()
    counts = label_counts(totals, world_size, concentration, seeds[0])  # (world_size, K)
    unowned = totals - counts.sum(axis=0)
    # Each class's samples in random order, class after class, and beside them their owners.
    shuffled = epoch_order(len(labels), seeds[1], 0)
    pools = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owners = np.tile(np.arange(world_size + 1), len(classes))
    owners = np.repeat(owners, np.vstack([counts, unowned]).T.reshape(-1))
    return np.stack([np.sort(pools[owners == rank]) for rank in range(world_size)])


def label_counts(
    totals: np.ndarray, world_size: int, concentration: float, seed: int
) -> np.ndarray:
    """How many samples of each class each rank's shard has.

    A rank draws classes from its mix, without replacement: an exhausted class leaves the mix, and
    what is left of it is scaled up. The ranks take turns of a hundredth of a shard, so that no rank
    is left with only what the others did not draw.

    Args:
        totals: (K,) samples in each class, at least one.
        world_size, concentration: as for `label_shards`.
        seed: at least 0.

    Returns:
        (world_size, K) int64; rows sum to floor(totals.sum() / world_size), columns to at most
        `totals`.

    Raises:
        ValueError: as `label_shards`.
    """
    if world_size < 1:
        raise ValueError(f"the number of shards must be at least 1, got {world_size}")
    if not 1e-6 <= concentration <= 1e6:
        raise ValueError(f"the concentration must lie in [1e-6, 1e6], got {concentration}")
    # RandomState: unlike Generator's, its distributions are frozen by NumPy's policy (NEP 19).
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    n = int(totals.sum())
    mixes = log_dirichlet(concentration * totals / n, world_size, random)
    counts = np.zeros((world_size, len(totals)), np.int64)
    for turn in range(1, _TURNS + 1):
        for rank in range(world_size):
            while (short := n // world_size * turn // _TURNS - counts[rank].sum()) > 0:
                left = totals - counts.sum(axis=0)
                some = np.flatnonzero(left)
                share = np.exp(mixes[rank, some] - mixes[rank, some].max())
                drawn = random.multinomial(short, share / share.sum())
                counts[rank, some] += np.minimum(drawn, left[some])
    return counts


def log_dirichlet(shape: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
    """Draws from a Dirichlet distribution as logarithms, which small parameters don't underflow.

    A Dirichlet vector is one of gamma variables, normalised; and with G ~ Γ(a + 1) and U uniform,
    G·U^(1/a) ~ Γ(a).

    Args:
        shape: (K,) parameters, positive.
        count: number of draws.
        random: where the random numbers come from.

    Returns:
        (count, K) float64; each row plus some constant is the logarithm of a draw.
    """
    size = (count, len(shape))
    gamma = random.standard_gamma(shape + 1, size)
    return np.log(gamma) + np.log1p(-random.random_sample(size)) / shape


def shard_order(shard: np.ndarray, rank: int, seed: int, epoch: int) -> np.ndarray:
    """An epoch's permutation of one rank's own shard, a function of (seed, epoch, rank).

    Args:
        shard: (s,) sample indices.
        rank: whose.
        seed, epoch: at least 0.

    Returns:
        (s,) of shard's dtype.
    """
    own = int(bits(seed, epoch, np.array([rank]), 1, Stream.SHARD_ORDER)[0, 0])
    return shard[epoch_order(len(shard), own, epoch)]


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
    return words(_mix(state ^ _mix(np.asarray(indices).astype(np.uint64))), count)


def words(starts: np.ndarray, count: int) -> np.ndarray:
    """The first `count` words of splitmix64 streams.

    Args:
        starts: (m,) uint64, the streams' starting states.
        count: words per stream.

    Returns:
        (m, count) uint64.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)  # (count,)
    return _mix(starts[:, None] + steps)


def draws(seed: int, epoch: int, indices: np.ndarray, count: int, stream: int) -> np.ndarray:
    """`count` uniform numbers per sample, from `bits`' words.

    Args:
        as `bits`.

    Returns:
        (m, count) float64 in [0, 1).
    """
    return uniform(bits(seed, epoch, indices, count, stream))


def uniform(bits: np.ndarray) -> np.ndarray:
    """Words of any shape, uint64, as numbers in [0, 1), float64: the upper 53 bits of each."""
    return (bits >> np.uint64(11)) * 2.0**-53


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
