"""Bytes and seconds that synchronising costs one rank."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch

from .collective import waiting

# How a meeting is counted: as a synchronisation that ends a round, as a part of one, or apart.
Count = Literal["round", "part", "other"]


@dataclass
class Traffic:
    """What synchronising has cost this rank so far.

    Attributes:
        syncs: synchronisations, i.e. finished rounds whose replicas exchanged parameters.
        bytes: bytes this rank sent in them, by the ring all-reduce's 2 (m - 1) / m per payload.
        exposed: seconds in which training stood still for them.
        hidden: seconds of communication that ran behind training, to within one local step.
        wait: per rank, seconds it was idle at boundaries for the slowest rank: how much less than
            that one it was busy since the boundary before.
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


Collectives = Literal["all_reduce", "broadcast", "shards"]


@dataclass(frozen=True)
class Sending:
    """One collective at the ends of rounds, as a plan needs to know it.

    Args:
        how: "all_reduce"; "broadcast" from one rank; or "shards", of which each rank gets one from
            all others, and sends it to them again.
        bytes: payload, which is as large on every rank.
        group_size: consecutive ranks in a group, where groups do so at once; None: all ranks.
        across: between the groups instead of inside: an all-reduce of each member's own shard, and
            a broadcast of the shards inside.
        every: rounds from one to the next.

    Raises:
        ValueError: if a setting is out of range, or ``across`` has no groups.
    """

    how: Collectives
    bytes: int
    group_size: int | None = None
    across: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        if self.how not in get_args(Collectives):
            known = ", ".join(get_args(Collectives))
            raise ValueError(f"Sending: how is {self.how!r}: it must be one of {known}")
        for name, least in (("bytes", 0), ("group_size", 1), ("every", 1)):
            value = getattr(self, name)
            if not (value is None and name == "group_size") and value < least:
                raise ValueError(f"Sending: {name} is {value}: it must be at least {least}")
        if self.across and self.group_size is None:
            raise ValueError("Sending: across is about groups: it needs group_size")


class Meter:
    """Counts them.

    Args:
        device: whose work is waited for before a clock is read.
        world_size: number of replicas.

    Attributes:
        traffic: the sums.
        resumed: when training went on after the last meeting.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._device, self._world_size = device, world_size
        self.traffic = Traffic()
        self.resumed = self.now()

    def now(self) -> float:
        """Seconds, of `synchronised_clock`."""
        return synchronised_clock(self._device)

    def count(
        self, count: Count, sent: int, started: float, waits: Mapping[int, float] | None = None
    ) -> None:
        """Bytes sent since ``started``, the seconds up to now, and who waited how long."""
        traffic, now = self.traffic, self.now()
        seconds = now - started
        # What happens within a round is not busy time, and does not begin a new count of it.
        self.resumed = self.resumed + seconds if count == "other" else now
        if count == "other":
            traffic.other_bytes += sent
            traffic.other_seconds += seconds
            return
        traffic.bytes += sent
        traffic.exposed += seconds
        self.count_waits(waits or {})

    def count_start(self, sent: int, started: float) -> None:
        """Training begins: what came before is counted apart."""
        self.resumed = self.now()
        self.traffic.other_bytes += sent
        self.traffic.other_seconds += self.resumed - started

    def count_landing(self, started: float, hidden: float) -> None:
        """What was launched before has been waited for since ``started``."""
        exposed = self.now() - started
        self.resumed += exposed  # so that it does not count as busy
        self.traffic.exposed += exposed
        self.traffic.hidden += max(0.0, hidden)

    def count_sync(self) -> None:
        """A round's synchronisation is done."""
        self.traffic.syncs += 1

    def count_waits(self, waits: Mapping[int, float]) -> None:
        """Add each rank's seconds."""
        if waits and not self.traffic.wait:
            self.traffic.wait = [0.0] * self._world_size
        for rank, seconds in waits.items():
            self.traffic.wait[rank] += seconds

    def forget_waits(self) -> None:
        """The ranks are not those that were waited for."""
        self.traffic.wait = []

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.traffic)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.traffic = Traffic(**copy.deepcopy(dict(state)))


def synchronised_clock(device: torch.device) -> float:
    """Seconds, read when ``device`` has finished its work. Cost: one host sync on a GPU."""
    if device.type != "cpu":
        with waiting:  # it is here that a GPU's collectives are waited for
            torch.accelerator.current_stream(device).synchronize()
    return time.perf_counter()
