"""The control plane: what ranks tell each other through the process group's store.

Nothing here is a collective, so replicas that differ can say so instead of crashing one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .collective import Collective
from .header import ranks_text

TIMEOUT = timedelta(minutes=5)
_FAREWELL = timedelta(seconds=10)

_agreements: Counter[str] = Counter()


class LayoutMismatchError(ValueError):
    """Replicas were built with different parameters, rules or periods; raised on every rank."""


def agree(collective: Collective, lines: Sequence[str], timeout: timedelta = TIMEOUT) -> None:
    """Raise on every rank, naming the first difference, unless all ranks bring the same lines.

    Args:
        collective: the ranks to compare; every one must call, in the same order of calls.
        lines: what this rank has, a line each.
        timeout: how long to wait for the slowest rank.

    Raises:
        LayoutMismatchError: if ranks differ, or one does not arrive within ``timeout``.
    """
    if collective.world_size == 1:
        return
    group = collective.group or dist.group.WORLD
    name = group.group_name
    _agreements[name] += 1
    store = dist.PrefixStore(
        f"localopt/agree/{name}/{_agreements[name]}",
        distributed_c10d._get_process_group_store(group),
    )
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests = _exchange(store, "digest", digest, collective, range(collective.world_size), timeout)
    odd = [rank for rank, other in digests.items() if other != digests[0]]
    if not odd:
        return
    texts = _exchange(store, "text", "\n".join(lines), collective, (0, odd[0]), timeout)
    # The store lives in one of the ranks: none may leave before all have read.
    _exchange(store, "read", "", collective, range(collective.world_size), _FAREWELL)
    mine, theirs = (texts[rank].split("\n") for rank in (0, odd[0]))
    for a, b in itertools.zip_longest(mine, theirs, fillvalue="nothing more"):
        if a != b:
            raise LayoutMismatchError(
                f"{ranks_text(odd)} of {collective.world_size} "
                f"{'differs' if len(odd) == 1 else 'differ'} from rank 0: rank {odd[0]} has "
                f"[{b}] where rank 0 has [{a}]. All replicas need the same model, period and rule"
            )


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
        store.wait(keys, timeout)
    except dist.DistStoreError as error:
        missing = [rank for rank, k in zip(wanted, keys, strict=True) if not store.check([k])]
        raise LayoutMismatchError(
            f"{ranks_text(missing)} did not build the optimizer within "
            f"{timeout.total_seconds():.0f} s; rank {collective.rank} has waited for it"
        ) from error
    return {rank: store.get(k).decode() for rank, k in zip(wanted, keys, strict=True)}
