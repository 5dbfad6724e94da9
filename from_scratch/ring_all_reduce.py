"""Ring all-reduce: no server. N equal workers, each of which sends to the next one only.

        worker 0 → worker 1
           ↑          ↓
        worker 3 ← worker 2

Each update every worker computes the gradient of its shard of the batch; then all of them average,
and each steps its own replica. All make the same step, so the replicas stay equal, bit for bit.

To average, each worker cuts its gradient into N chunks of equal size, and twice N − 1 times sends
one to the next worker while it receives one from the worker before (r is the rank, all indices are
modulo N):

1. share-reduce, i = 0 … N − 2: send chunk r − i, and add what arrives to chunk r − i − 1.
   A chunk gathers the terms of all workers on its way; afterwards worker r has all of chunk r + 1.
2. share-only, i = 0 … N − 2: send chunk r − i + 1, and overwrite chunk r − i with what arrives.
   The complete chunks go round.

Then everybody divides by N. Each worker has sent

    2 (N − 1) ⌈n / N⌉ · itemsize   bytes,

n the number of weights: less than twice the gradient, for any N. That is the point of the ring:
no link carries more when workers are added. What grows is the number of messages one after another.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import torch

from .meter import Meter
from .processes import Peer, context
from .task import Replica, Task


def peers(n: int) -> dict[str, Any]:
    """n workers, of which each gets the end of a pipe to the next and of one from the previous."""
    pipes = [context.Pipe(duplex=False) for _ in range(n)]  # pipe r leads from r to r + 1
    return {f"worker {r}": (pipes[r][1], pipes[r - 1][0]) for r in range(n)}


def train(peer: Peer, task: Task, link: tuple[Connection, Connection]) -> torch.Tensor:
    """What every worker does."""
    replica = Replica(task, peer.device, shard=peer.rank, shards=peer.world_size)
    ring = Ring(peer.rank, peer.world_size, *link, peer.meter)
    for epoch in peer.epochs(replica):
        for batch in replica.batches(epoch):
            replica.differentiate(batch)
            ring.average(replica.gradient)
            replica.step()
    return replica.weights


class Ring:
    """One worker's place in the ring.

    Args:
        rank, world_size: r and N.
        to_next, from_last: ends of pipes.
        meter: told of what is sent.
    """

    def __init__(
        self, rank: int, world_size: int, to_next: Connection, from_last: Connection, meter: Meter
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._to_next, self._from_last = to_next, from_last
        self._meter = meter
        self._courier = ThreadPoolExecutor(max_workers=1)

    def average(self, vector: torch.Tensor) -> None:
        """Replace a vector by its mean over all workers. All of them call it, in the same order."""
        r, n = self.rank, self.world_size
        size = len(vector)
        chunks = torch.zeros(n, -(-size // n), dtype=vector.dtype)  # row i is chunk i; padded
        chunks.view(-1)[:size] = vector
        arrived = torch.empty_like(chunks[0])

        for i in range(n - 1):  # share-reduce
            self._exchange(chunks[(r - i) % n], arrived)
            chunks[(r - i - 1) % n] += arrived
        for i in range(n - 1):  # share-only
            self._exchange(chunks[(r - i + 1) % n], chunks[(r - i) % n])

        vector.copy_(chunks.view(-1)[:size] / n)

    def _exchange(self, chunk: torch.Tensor, arrived: torch.Tensor) -> None:
        """Send a chunk to the next worker while one arrives from the last.

        A pipe takes 64 KiB; whoever sends more stands still until the other end reads. If all sent
        first and read later, all would stand still for ever. So a thread sends.
        """
        sending = self._courier.submit(self._to_next.send_bytes, chunk.numpy())
        with self._meter.waiting():
            self._from_last.recv_bytes_into(arrived.numpy())
        with self._meter.sending():  # what is left of it
            sending.result()
        self._meter.bytes += chunk.nbytes
