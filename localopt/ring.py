"""A mean in place, as a ring of messages that divide where they add.

gloo's all_reduce only adds, and a division before or after it is one more pass over the memory,
which costs a fifth of the whole. Here a message is divided and added while it is in the cache.

The memory is cut into m shards. In m - 1 steps each rank passes a shard on to the next and adds
what it gets to its own; then it has the mean of one shard, and in m - 1 steps more these go around.
Each rank sends 2 (m - 1) / m of the memory, as in any ring. Additions are in one fixed order.

A message costs some 40 µs, however long it is; and a slow link stands still for one to three
messages' time in all, the longer the more. So messages grow with the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

CHUNK, LONGEST = 1_440_000, 1_920_000  # bytes of a message: at least, and at most
PARTS = 125  # between these bounds, messages of the whole memory
AHEAD = 2  # messages that may arrive before they are added


class Waitable(Protocol):
    """A message that is on its way; to be waited for once."""

    def wait(self) -> object: ...


Post = Callable[[Tensor, int], Waitable]  # a tensor and the message's number


def mean_(
    whole: Tensor,
    averaged: Tensor,
    rank: int,
    m: int,
    to_next: Post,
    from_last: Post,
) -> None:
    """Replace ``averaged``, a part of ``whole`` (n,), by its mean over the ranks; the rest by sums.

    Collective. n is a multiple of the number of ranks.

    Args:
        whole, averaged: in memory, and the same size on all ranks.
        rank, m: this rank, and how many there are.
        to_next, from_last: begin to send to rank + 1, and to receive from rank - 1.
    """
    length = max(CHUNK, min(whole.nbytes // PARTS, LONGEST)) // whole.itemsize
    shards = [list(shard.split(length)) for shard in whole.chunk(m)]
    first = averaged.storage_offset() - whole.storage_offset()
    last, size = first + len(averaged), len(whole) // m
    count = len(shards[0])
    total = (m - 1) * count  # messages of each half
    # Used again and again, so that it stays in the cache.
    spare = [whole.new_empty(min(length, size)) for _ in range(min(AHEAD, total))]
    sent: list[Waitable] = []
    arriving: list[Waitable] = []

    def pass_on(chunk: Tensor) -> None:
        sent.append(to_next(chunk, len(sent)))

    def expect() -> None:
        """Begin to receive the next message: a sum in the first half, in the second a mean.

        So few at a time, and all along: what signals to the rank before that it may send queues
        behind the messages that this rank is sending.
        """
        i = len(arriving)
        if i < total:
            chunk = spare[i % len(spare)][: len(shards[0][i % count])]
        elif i < 2 * total:
            sent[i - total].wait()  # the mean arrives where this was sent from
            step, k = divmod(i - total, count)
            chunk = shards[(rank - step) % m][k]
        else:
            return
        arriving.append(from_last(chunk, i))

    for _ in spare:
        expect()
    for chunk in shards[rank]:
        pass_on(chunk)
    for i in range(total):  # a ring of sums; what is sent on is complete in the last step
        step, k = divmod(i, count)
        shard = (rank - step - 1) % m
        chunk, start = shards[shard][k], shard * size + k * length
        other = spare[i % len(spare)][: len(chunk)]
        arriving[i].wait()
        if first <= start and start + len(chunk) <= last:
            _add_divided(chunk, other, m, divided=step > 0)
        else:
            a = min(max(first - start, 0), len(chunk))
            b = min(max(last - start, a), len(chunk))
            _add_divided(chunk[a:b], other[a:b], m, divided=step > 0)
            for part in (slice(a), slice(b, None)):
                chunk[part].add_(other[part])
        pass_on(chunk)
        expect()
    for i in range(total):  # the means go around
        arriving[total + i].wait()
        if i + count < total:
            step, k = divmod(i, count)
            pass_on(shards[(rank - step) % m][k])
        expect()
    for work in sent[total:]:  # a message is to be waited for once
        work.wait()


def _add_divided(x: Tensor, other: Tensor, m: int, *, divided: bool) -> None:
    """x ← x/m + other/m, or + other where that has been ``divided``; so nothing overflows."""
    if divided:
        torch.add(other, x, alpha=1 / m, out=x)
    elif m == 2:
        x.lerp_(other, 0.5)  # in one pass
    else:
        x.div_(m).add_(other, alpha=1 / m)
