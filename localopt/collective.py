"""Every collective there is, with the bytes it sends.

A sum over tensors, waited for or left to run behind training, and a broadcast: the rest of the
library is built on these, so that what travels can be counted here. They are always called
from the thread that trains, in the same order on all ranks. With one rank, or where
torch.distributed is not initialised, they do nothing.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ring

RING_BYTES = 2**22  # below which one all_reduce is faster than a ring of messages
_TAG = 0x10CA10  # of the first message: far from those that a user would choose
_ROWS = _TAG - 1  # of `start_rows_`


class Waiting:
    """Whether the thread that trains is in a collective: other threads look here.

    Cost: 0.3 µs per collective.

    Attributes:
        depth: 0 outside.
        count: how many have been entered so far.
        failed: whether the last one raised, as it does where another rank has gone.
    """

    def __init__(self) -> None:
        self.depth = self.count = 0
        self.failed = False

    def __enter__(self) -> None:
        self.depth += 1
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.depth -= 1
        self.failed = kind is not None


waiting = Waiting()


class Pending:
    """What runs behind training: a sum, or an exchange of rows.

    What cannot even be launched, for another rank has gone, fails when it is waited for, as what
    fails on its way does.

    Args:
        launches: what to launch.
        sent: bytes that this rank sends.
    """

    def __init__(self, launches: Iterable[Callable[[], dist.Work | None]], sent: int) -> None:
        self.bytes = sent
        self._works: list[dist.Work] = []
        self._failed: RuntimeError | None = None
        try:
            for launch in launches:
                if (work := launch()) is not None:  # which torch may, says its type
                    self._works.append(work)
        except RuntimeError as error:
            self._failed = error

    def done(self) -> bool:
        """Whether it has ended, without waiting."""
        return self._failed is not None or all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Wait until it has ended; on a GPU, make the current stream wait."""
        with waiting:
            if self._failed is not None:
                raise self._failed
            for work in self._works:
                work.wait()


class Collective:
    """The collectives of one process group.

    Args:
        group: a torch.distributed process group; None for the default one.
        alone: whether to be the only one of its kind, whatever groups there are.

    Attributes:
        rank: this process's rank in the group.
        world_size: number of replicas m.
        ranks: whom a sum covers, in the numbers of the group that this one was made from.
    """

    ranks: Sequence[int]

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self.group = group
        together = dist.is_available() and dist.is_initialized() and not alone
        self.rank = dist.get_rank(group) if together else 0
        self.world_size = dist.get_world_size(group) if together else 1
        if self.rank < 0:
            raise ValueError("this process is not a member of process_group")
        self.ranks = range(self.world_size)

    @property
    def key(self) -> dist.ProcessGroup | None:
        """The group itself, also where it is the default one; None with one rank."""
        return None if self.world_size == 1 else self.group or dist.group.WORLD

    @property
    def gone(self) -> bool:
        """Whether somebody has destroyed the process group."""
        return self.world_size > 1 and not dist.is_initialized()

    def subgroup(self, ranks: Sequence[int]) -> Collective:
        """A new process group of some of this one's ranks, this one among them.

        Collective: each of them calls, with groups in the same order. Collectives that run behind
        training need a group of their own, or they would mix with the user's. Where the default
        group is bound to a device (NCCL's ``device_id``), all its ranks must be doing this.
        """
        if self.world_size == 1:
            return self
        members = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        group = dist.new_group(
            [members[rank] for rank in ranks],
            timeout=self._timeout(),
            backend=dist.get_backend(self.group),
            use_local_synchronization=len(ranks) < dist.get_world_size(),
        )
        made = Collective(group)
        made.ranks = ranks
        return made

    def shared(self, purpose: str, ranks: Sequence[int]) -> Collective:
        """As `subgroup`, but one and the same for all who ask for this purpose and ranks, and this
        one itself where these are all.

        Where several optimizers meet in one group, ranks that bring different ones find out.
        """
        if len(ranks) == self.world_size:
            return self
        made = _shared.setdefault(self.key, {})
        key = purpose, tuple(ranks)
        if key not in made:
            made[key] = self.subgroup(ranks)
        return made[key]

    def split(self, size: int) -> tuple[Collective, Collective]:
        """Groups of ``size`` consecutive ranks: this rank's, and that of its peers in the others.

        Collective. The same groups for all who ask.

        Raises:
            ValueError: if ``size`` does not divide the number of ranks.
        """
        if self.world_size % size:
            raise ValueError(
                f"group_size is {size}: it does not divide the {self.world_size} replicas"
            )
        first, member = self.rank // size * size, self.rank % size
        inside = self.shared("inside", range(first, first + size))
        return inside, self.shared("peers", range(member, self.world_size, size))

    def _timeout(self) -> timedelta | None:
        """The group's own time-out, which torch gives to no new group; None where it is hidden."""
        group: Any = self.group or dist.group.WORLD
        with contextlib.suppress(AttributeError, RuntimeError, IndexError):
            timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
            return timeout
        return None

    def sum_(self, tensors: Sequence[Tensor]) -> int:
        """Replace each tensor by its sum over the ranks, in place; return the bytes sent.

        One collective per tensor, launched one after another.
        """
        if self.world_size == 1:
            return 0
        with waiting:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)
        return self._sum_bytes(tensors)

    def rings(self, wholes: Sequence[Tensor]) -> bool:
        """Whether `mean_` sends these around in messages; the same on all ranks."""
        return (
            self.world_size > 1
            and dist.get_backend(self.group) == "gloo"
            and all(whole.device.type == "cpu" for whole in wholes)
            and sum(whole.nbytes for whole in wholes) >= RING_BYTES
        )

    def mean_(self, wholes: Sequence[Tensor], averaged: Sequence[Tensor]) -> int:
        """Replace each of ``wholes`` (n,) by its sum over the ranks, and the parts ``averaged`` of
        them by means, in place; return the bytes sent."""
        if self.world_size == 1:
            return 0
        if self.rings(wholes):
            with waiting:
                for whole, part in zip(wholes, averaged, strict=True):
                    ring.mean_(
                        whole, part, self.rank, self.world_size,
                        self._to_next, self._from_last,
                    )  # fmt: skip
            return self._sum_bytes(wholes)
        for part in averaged:
            part.div_(self.world_size)  # before the sum, which then cannot overflow
        return self.sum_(wholes)

    def _to_next(self, tensor: Tensor, number: int) -> dist.Work:
        return self._send(tensor, (self.rank + 1) % self.world_size, _TAG + number)

    def _from_last(self, tensor: Tensor, number: int) -> dist.Work:
        return self._receive(tensor, (self.rank - 1) % self.world_size, _TAG + number)

    def start_sum_(self, tensors: Sequence[Tensor]) -> Pending:
        """As `sum_`, but return at once; the tensors are not to be touched before `wait`."""
        if self.world_size == 1:
            return Pending([], 0)
        all_reduce = partial(dist.all_reduce, group=self.group, async_op=True)
        return Pending([partial(all_reduce, t) for t in tensors], self._sum_bytes(tensors))

    def start_rows_(self, rows: Tensor) -> Pending:
        """Replace row j of ``rows`` (m, n), for the ranks j that a sum covers, by rank j's; return
        at once. Other rows are zeros.

        By messages where they can be, for a link's latency counts once: in a ring it counts
        2 (m - 1) times. And they have numbers of their own, by which a collective of the program's
        cannot take them for its.
        """
        if self.world_size == 1:
            return Pending([], 0)
        if dist.get_backend(self.group) != "gloo" or rows.device.type != "cpu":
            return self.start_sum_([rows])
        mine = rows[self.ranks[self.rank]]
        others = [j for j in range(self.world_size) if j != self.rank]
        launches = [partial(self._receive, rows[self.ranks[j]], j, _ROWS) for j in others]
        launches += [partial(self._send, mine, j, _ROWS) for j in others]
        return Pending(launches, mine.nbytes * len(others))

    def _send(self, tensor: Tensor, to: int, tag: int) -> dist.Work:
        work = dist.isend(tensor, group=self.group, tag=tag, group_dst=to)
        assert work is not None, "this rank is in the group"
        return work

    def _receive(self, tensor: Tensor, source: int, tag: int) -> dist.Work:
        work = dist.irecv(tensor, group=self.group, tag=tag, group_src=source)
        assert work is not None, "this rank is in the group"
        return work

    def _sum_bytes(self, tensors: Sequence[Tensor]) -> int:
        payload = sum(tensor.nbytes for tensor in tensors)
        return 2 * (self.world_size - 1) * payload // self.world_size

    def broadcast_(self, tensors: Sequence[Tensor], source: int = 0) -> int:
        """Replace each tensor by rank ``source``'s, in place; return the bytes per rank (mean)."""
        if self.world_size == 1:
            return 0
        with waiting:
            for tensor in tensors:
                dist.broadcast(tensor, group=self.group, group_src=source)
        payload = sum(tensor.nbytes for tensor in tensors)
        return (self.world_size - 1) * payload // self.world_size

    def start_exchange_shards(
        self, shards: Tensor, number: int = 0
    ) -> tuple[Callable[[], Tensor], Pending]:
        """Send row j of ``shards`` (m, n) to rank j; what gives the rows got, once they are here.

        gloo's own all_to_all may send before it announces that it will receive: the announcement
        queues behind that, and a slow link works in one direction at a time. So there it is done by
        messages. ``number`` is that of this exchange among those that are on their way.
        """
        if self.world_size == 1:
            return lambda: shards, Pending([], 0)
        gloo = dist.get_backend(self.group) == "gloo"
        held = shards.cpu() if gloo else shards  # it exchanges what is in the host's memory only
        got = torch.empty_like(held)
        sent = shards.nbytes * (self.world_size - 1) // self.world_size
        if gloo:
            got[self.rank] = held[self.rank]
            launches = self._messages(lambda j: held[j], got, _TAG + 2 * number)
        else:
            exchange = partial(dist.all_to_all_single, group=self.group, async_op=True)
            launches = [partial(exchange, got, held)]
        return lambda: got.to(shards.device), Pending(launches, sent)

    def start_gather_shards_(self, shards: Tensor, number: int = 0) -> Pending:
        """Replace row j of ``shards`` (m, n) by rank j's row j, in place.

        ``number`` is that of this one among those that are on their way.
        """
        if self.world_size == 1:
            return Pending([], 0)
        sent = shards.nbytes * (self.world_size - 1) // self.world_size
        if dist.get_backend(self.group) == "gloo" and shards.device.type == "cpu":
            mine = shards[self.rank]  # gloo's own all_gather copies all of it twice
            return Pending(self._messages(lambda _: mine, shards, _TAG + 2 * number + 1), sent)
        # Its name since torch 2.13, and before.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        launch = partial(
            gather, shards.view(-1), shards[self.rank].clone(), group=self.group, async_op=True
        )
        return Pending([launch], sent)

    def _messages(
        self, sent: Callable[[int], Tensor], got: Tensor, tag: int
    ) -> list[partial[dist.Work]]:
        """What launches a message to each other rank j, ``sent`` (j), and one from it into
        ``got[j]``."""
        others = [(self.rank + i) % self.world_size for i in range(1, self.world_size)]
        launches = [partial(self._receive, got[j], j, tag) for j in others]
        return launches + [partial(self._send, sent(j), j, tag) for j in others]


# The groups that several optimizers share, as long as the group that they were made from is there.
_shared: weakref.WeakKeyDictionary[Any, dict[tuple[str, tuple[int, ...]], Collective]] = (
    weakref.WeakKeyDictionary()
)


class Across:
    """A sum over groups whose members hold the same: each sums one shard with its peers.

    Together with a sum inside the groups it is a sum over all, of which a group as a whole sends
    no more than one of its members would. The tensors' sizes are multiples of the group's.

    Args:
        inside: this rank's group.
        peers: those of this rank's number in the other groups.
        ranks: all ranks.
    """

    def __init__(self, inside: Collective, peers: Collective, ranks: Sequence[int]) -> None:
        self.inside, self.peers, self.ranks = inside, peers, ranks

    def mean_(self, wholes: Sequence[Tensor], averaged: Sequence[Tensor]) -> int:
        """As `Collective.mean_`, over the groups."""
        if self.peers.world_size == 1:
            return 0
        for part in averaged:
            part.div_(self.peers.world_size)
        cut = [tensor.chunk(self.inside.world_size) for tensor in wholes]
        sent = self.peers.sum_([shards[self.inside.rank] for shards in cut])
        for source in range(self.inside.world_size):
            sent += self.inside.broadcast_([shards[source] for shards in cut], source)
        return sent
