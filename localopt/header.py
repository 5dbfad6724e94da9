"""What ranks exchange before they synchronise: one slot of bytes for each of them.

Every rank writes its own slot and zeros elsewhere, and gets those of the others: by a message from
each, or by a sum over the ranks, which leaves each slot as its rank wrote it. The exchange has one
size whatever it is that follows: ranks that are out of step, or that bring different optimizers,
meet in it and can say so before a parameter is touched.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import struct
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ReplicaMismatchError, ranks_text

_FIELDS = struct.Struct("<qqqqdddqqqqqqd")
_CHECK = struct.Struct("<I")
SLOT = _FIELDS.size + _CHECK.size + 1  # bytes: the fields, their checksum, and the flag


class Kind(enum.IntEnum):
    """Why ranks meet; ranks that disagree are out of step."""

    SYNC = 1
    CONSENSUS = 2
    FINISH = 3
    ADD_GROUP = 4


@dataclass(frozen=True)
class Header:
    """One rank's slot.

    Attributes:
        kind: why this rank has come.
        step: local steps this rank has finished.
        h: local steps in its round.
        identity: number of its optimizer, in the order in which they were built in the group.
        busy: seconds from its last synchronisation to its arrival at this one.
        square_norm: squared norm of its parameters where drift is tracked, else 0.
        loss: mean training loss of its round; NaN where none was recorded.
        settings: checksum of what the rule goes by now and must be the same on all ranks.
        rates: checksum of its learning rates.
        fingerprint: of its parameters, where they are believed to be equal on all ranks; else 0.
        start: a sample of its parameters at the round's start, where they should have been equal
            on all ranks; else 0.
        backwards: backward passes it has made in the round.
        levels: groups that it meets for this call, one after another.
        total: the sum of what it brings; NaN where that was not looked at.
        finite: whether all it brings is finite.
    """

    kind: Kind
    step: int
    h: int
    identity: int = 0
    busy: float = 0.0
    square_norm: float = 0.0
    loss: float = math.nan
    settings: int = 0
    rates: int = 0
    fingerprint: int = 0
    start: int = 0
    backwards: int = 0
    levels: int = 1
    total: float = math.nan
    finite: bool = True


def write(slots: Tensor, rank: int, header: Header, total: Tensor | None = None) -> None:
    """Write ``header`` into row ``rank`` of ``slots`` (world_size, SLOT) of bytes, zeros elsewhere.

    ``total`` is a 0-dim float64 tensor that stays on the device (no host synchronisation), and
    replaces the header's ``total`` and ``finite``.
    """
    *fields, finite = dataclasses.astuple(header)
    packed = _FIELDS.pack(*fields)
    row = bytearray(packed + _CHECK.pack(zlib.crc32(packed[:-8])) + bytes([finite]))
    slots.zero_()
    slots[rank] = torch.frombuffer(row, dtype=torch.uint8).to(slots.device)
    if total is not None:
        at = _FIELDS.size - 8
        slots[rank, at : at + 8] = total.reshape(1).view(torch.uint8)
        slots[rank, -1] = torch.isfinite(total)


def read(slots: Tensor, ranks: Iterable[int] | None = None) -> dict[int, Header]:
    """Return the headers by rank, all or those of ``ranks``. Cost: one host synchronisation.

    Raises:
        ReplicaMismatchError: if these are no headers.
    """
    rows = slots.tolist()
    headers, odd = {}, []
    for rank in range(len(rows)) if ranks is None else ranks:
        row = bytes(rows[rank])
        packed, check = row[: _FIELDS.size], row[_FIELDS.size : -1]
        if _CHECK.unpack(check)[0] != zlib.crc32(packed[:-8]):
            odd.append(rank)
            continue
        kind, *fields = *_FIELDS.unpack(packed), bool(row[-1])
        headers[rank] = Header(Kind(kind), *fields)
    if odd:
        raise ReplicaMismatchError(
            f"what {ranks_text(odd)} brought is not localopt's: another collective, of the "
            "program's own, ran in this process group where the others synchronised. All ranks "
            "must make the same calls in the same order; nothing was changed"
        )
    return headers


def check_in_step(headers: Mapping[int, Header], name: Callable[[int], str]) -> None:
    """Raise `ReplicaMismatchError` unless all ranks have come for the same.

    Args:
        headers: by rank.
        name: of the optimizer with a number, for people.
    """
    if odd := _parted(headers, lambda header: header.identity):
        found = "; ".join(
            f"{ranks_text(ranks)} with {name(headers[ranks[0]].identity)}"
            f" ({headers[ranks[0]].kind.name.lower()})"
            for ranks in odd
        )
        raise ReplicaMismatchError(
            f"different optimizers have met: {found}. All ranks must call their optimizers in the "
            "same order; nothing was changed"
        )
    if odd := _parted(headers, lambda header: (header.kind, header.step, header.h)):
        found = "; ".join(
            f"{ranks_text(ranks)} at step {header.step} with H {header.h} "
            f"({header.kind.name.lower()})"
            for ranks in odd
            for header in (headers[ranks[0]],)
        )
        raise ReplicaMismatchError(
            f"replicas are out of step: {found}. All ranks must make the same calls: same number "
            "of batches, same period, same learning rate"
        )
    step = next(iter(headers.values())).step
    if odd := _parted(headers, lambda header: header.rates):
        raise ReplicaMismatchError(
            f"at step {step} the learning rates of {_versus(odd)} differ: all ranks must use the "
            "same schedule, and step it as often"
        )
    if odd := _parted(headers, lambda header: header.settings):
        raise ReplicaMismatchError(
            f"at step {step} the settings of {_versus(odd)} differ: learning rates, the outer "
            "optimizer's settings, and train() or eval() must be the same on all ranks"
        )


def check_start(headers: Mapping[int, Header]) -> None:
    """Raise `ReplicaMismatchError` unless all started the round with the same weights."""
    step = next(iter(headers.values())).step
    if odd := _parted(headers, lambda header: header.start):
        raise ReplicaMismatchError(
            f"the weights of {_versus(odd)} differed at the start of the round that ends at step "
            f"{step}, where all replicas had been equal: some rank has changed its own, as by "
            "loading a checkpoint. Load on all ranks alike"
        )


def _parted(headers: Mapping[int, Header], key: Callable[[Header], Hashable]) -> list[list[int]]:
    """The ranks, by what ``key`` gives of each; none if that is the same for all."""
    groups: dict[Hashable, list[int]] = {}
    for rank, header in headers.items():
        groups.setdefault(key(header), []).append(rank)
    return list(groups.values()) if len(groups) > 1 else []


def _versus(groups: Sequence[Sequence[int]]) -> str:
    return " and ".join(ranks_text(ranks) for ranks in groups)


def spread(headers: Mapping[int, Header], mean_square_norm: float) -> float:
    """Root mean square distance of the replicas from their mean.

    sqrt(mean_i |x_i - x̄|^2) = sqrt(mean_i |x_i|^2 - |x̄|^2), in the units of the parameters.
    """
    mean = math.fsum(header.square_norm for header in headers.values()) / len(headers)
    return math.sqrt(max(mean - mean_square_norm, 0.0))  # in this order NaN stays NaN
