"""Every collective there is, with the bytes it sends and the seconds it takes.

A sum over one tensor, a broadcast from rank 0: the rest of the library is built on these two, so
that what travels can be counted in one place. With one rank, or where torch.distributed is not
initialised, both do nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What synchronising has cost this rank so far.

    Attributes:
        syncs: synchronisations, i.e. finished rounds whose replicas exchanged parameters.
        bytes: bytes this rank sent in them, by the ring all-reduce's 2 (m - 1) / m per payload.
        exposed: seconds in which training stood still for them.
        hidden: seconds of communication that ran behind training.
        wait: per rank, seconds it has waited at boundaries for the slowest rank.
        other_bytes: bytes sent outside rounds (start, `consensus`, `finish` of a closed round).
        other_seconds: seconds those took.
    """

    syncs: int = 0
    bytes: int = 0
    exposed: float = 0.0
    hidden: float = 0.0
    wait: list[float] = field(default_factory=list)
    other_bytes: int = 0
    other_seconds: float = 0.0

    def count_wait(self, busy: Sequence[float]) -> None:
        """Add each rank's wait for the one that was busy longest. ``busy``: seconds per rank."""
        slowest = max(busy)
        before = self.wait or [0.0] * len(busy)
        self.wait = [w + slowest - b for w, b in zip(before, busy, strict=True)]


class Collective:
    """The collectives of one process group.

    Args:
        group: a torch.distributed process group; None for the default one.

    Attributes:
        rank: this process's rank in the group.
        world_size: number of replicas m.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if together else 0
        self.world_size = dist.get_world_size(group) if together else 1
        if self.rank < 0:
            raise ValueError("this process is not a member of process_group")

    def sum_(self, tensors: Sequence[Tensor]) -> int:
        """Replace each tensor by its sum over the ranks, in place; return the bytes sent.

        One collective per tensor, launched one after another.
        """
        if self.world_size == 1:
            return 0
        for tensor in tensors:
            dist.all_reduce(tensor, group=self.group)
        payload = sum(tensor.nbytes for tensor in tensors)
        return 2 * (self.world_size - 1) * payload // self.world_size

    def broadcast_(self, tensors: Sequence[Tensor]) -> int:
        """Replace each tensor by rank 0's, in place; return the bytes sent per rank (mean)."""
        if self.world_size == 1:
            return 0
        for tensor in tensors:
            dist.broadcast(tensor, group=self.group, group_src=0)
        payload = sum(tensor.nbytes for tensor in tensors)
        return (self.world_size - 1) * payload // self.world_size


def clock(device: torch.device) -> float:
    """Seconds, read when ``device`` has finished its work. Cost: one host sync on a GPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
