"""The control plane: what ranks write for each other in the process group's store.

Nothing here is a collective, so replicas that differ can say so instead of crashing one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..collective import Collective, waiting
from ..errors import AbsentRankError, LayoutMismatchError, ranks_text

TIMEOUT = timedelta(minutes=5)
_FAREWELL = timedelta(seconds=10)

_calls: Counter[str] = Counter()


def agree(collective: Collective, lines: Sequence[str], timeout: timedelta) -> None:
    """Raise on every rank, naming the first difference, unless all ranks bring the same lines.

    Args:
        collective: the ranks to compare; every one must call, in the same order of calls.
        lines: what this rank has, a line each.
        timeout: how long to wait for the slowest rank.

    Raises:
        LayoutMismatchError: if ranks differ.
        AbsentRankError: if one does not arrive within ``timeout``.
    """
    if collective.world_size == 1:
        return
    store = _store(collective, "agree")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests = _exchange(store, "digest", digest, collective, range(collective.world_size), timeout)
    odd = [rank for rank, other in digests.items() if other != digests[0]]
    if not odd:
        return
    texts = _exchange(store, "text", "\n".join(lines), collective, (0, odd[0]), timeout)
    store.set(f"read/{collective.rank}", "")
    if dist.get_rank() == 0:  # the store may live in this process: leave when all have read
        with contextlib.suppress(RuntimeError):  # a rank has died meanwhile: say what is known
            store.wait([f"read/{rank}" for rank in range(collective.world_size)], _FAREWELL)
    mine, theirs = (texts[rank].split("\n") for rank in (0, odd[0]))
    for a, b in itertools.zip_longest(mine, theirs, fillvalue="nothing more"):
        if a != b:
            raise LayoutMismatchError(
                f"{ranks_text(odd)} of {collective.world_size} "
                f"{'differs' if len(odd) == 1 else 'differ'} from rank 0: rank {odd[0]} has "
                f"[{b}] where rank 0 has [{a}]. Replicas must be built alike"
            )


def gather(collective: Collective, value: str, timeout: timedelta = TIMEOUT) -> list[str]:
    """Every rank's ``value``, by rank: a barrier that carries text.

    Args:
        collective: the ranks; every one must call, in the same order of calls.
        value: what this rank says.
        timeout: how long to wait for the slowest rank.

    Raises:
        AbsentRankError: if a rank does not arrive within ``timeout``.
    """
    if collective.world_size == 1:
        return [value]
    ranks = range(collective.world_size)
    texts = _exchange(_store(collective, "gather"), "text", value, collective, ranks, timeout)
    return [texts[rank] for rank in ranks]


def _store(collective: Collective, purpose: str) -> dist.Store:
    """A store of its own for this call, the same on all ranks."""
    group = collective.group or dist.group.WORLD
    assert group is not None, "there is a default group, for there are several ranks"
    _calls[group.group_name] += 1
    prefix = f"localopt/{purpose}/{group.group_name}/{_calls[group.group_name]}"
    return dist.PrefixStore(prefix, distributed_c10d._get_process_group_store(group))


def cloned(store: dist.Store) -> dist.Store:
    """The same store, by a connection of its own."""
    untyped: Any = store  # as torch has it
    clone: dist.Store = untyped.clone()
    return clone


def _exchange(
    store: dist.Store,
    key: str,
    value: str,
    collective: Collective,
    wanted: Sequence[int],
    timeout: timedelta,
) -> dict[int, str]:
    """Publish this rank's value; return those of the ranks wanted."""
    store.set(f"{key}/{collective.rank}", value)
    keys = [f"{key}/{rank}" for rank in wanted]
    try:
        with waiting:
            store.wait(keys, timeout)
    except RuntimeError as error:  # a FileStore's time-out is no DistStoreError
        missing = [rank for rank, k in zip(wanted, keys, strict=True) if not store.check([k])]
        raise AbsentRankError(
            f"{ranks_text(missing)} did not arrive within {timeout.total_seconds():.0f} s, where "
            f"rank {collective.rank} waited: it has died, hangs, or made another call"
        ) from error
    return {rank: store.get(k).decode() for rank, k in zip(wanted, keys, strict=True)}


class Board:
    """Notes that ranks leave for each other: to write one waits for nobody.

    For a thread of its own: it has its own connection to the store.

    Args:
        collective: the ranks; every one must make one, in the same order of calls.
        purpose: what it is for.
    """

    def __init__(self, collective: Collective, purpose: str) -> None:
        self._alone = collective.world_size == 1
        self._notes: dict[str, str] = {}
        if not self._alone:
            self._store = cloned(_store(collective, purpose))

    def put(self, key: str, note: str) -> None:
        """Leave a note."""
        if self._alone:
            self._notes[key] = note
        else:
            self._store.set(key, note)

    def get(self, keys: Sequence[str], timeout: timedelta) -> list[str]:
        """The notes of these names; waits for those that are not there yet.

        Raises:
            AbsentRankError: if one does not come within ``timeout``.
        """
        if self._alone:
            return [self._notes[key] for key in keys]
        try:
            self._store.wait(list(keys), timeout)
            return [self._store.get(key).decode() for key in keys]
        except RuntimeError as error:
            raise AbsentRankError(
                f"{', '.join(keys)}: not there within {timeout.total_seconds():.0f} s"
            ) from error
