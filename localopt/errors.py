"""Every exception that the library raises of its own, and how ranks are named in them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence


class SyncError(RuntimeError):
    """A synchronisation that cannot stand; raised on every rank that took part in it."""


class ReplicaMismatchError(SyncError):
    """Replicas met that do not fit: other calls, steps, H, optimizers, settings or weights."""


class CollectiveError(SyncError):
    """A collective failed in torch: another rank has gone, or it met one of the program's own."""


class NonFiniteError(SyncError):
    """A replica brought NaN or infinity into a synchronisation."""


class LayoutMismatchError(ValueError):
    """Replicas were built with different parameters, rules or periods; raised on every rank."""


class AbsentRankError(SyncError):
    """A rank did not arrive in time; raised on those that waited for it."""


def ranks_text(ranks: Sequence[int]) -> str:
    """One as "rank 3", several as "ranks 0, 1, 2"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


class Warnings:
    """Warnings that name the rank, and are given once each."""

    def __init__(self, rank: int) -> None:
        self._rank, self._given = rank, set[str]()

    def once(self, about: str, text: str) -> None:
        """Warn, unless this has been warned of before."""
        if about not in self._given:
            self._given.add(about)
            warnings.warn(f"rank {self._rank}: {text}", stacklevel=6)
