"""What travels beside the parameters: one slot per rank in front of the flat buffer.

Every rank writes its own slot and zeros elsewhere, so the sum of a collective leaves each slot
as its rank wrote it. A slot holds small integers only (bytes, 0 to 255, and one flag), which no
floating-point type of 8 or more significant bits can round: 64-bit integers and doubles arrive
exactly, whatever the parameters' type.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FIELDS = struct.Struct("<qqqdddqq")
SLOT = _FIELDS.size + 1  # elements: the bytes of the fields, and the flag


class SyncError(RuntimeError):
    """A synchronisation that cannot stand; raised on every rank that took part in it."""


class ReplicaMismatchError(SyncError):
    """Replicas reached the same collective at different steps, H or kinds of call."""


class NonFiniteError(SyncError):
    """A replica brought NaN or infinity into a synchronisation."""


class Kind(enum.IntEnum):
    """Why a collective is made; ranks that disagree are out of step."""

    SYNC = 1
    CONSENSUS = 2
    FINISH = 3


@dataclass(frozen=True)
class Header:
    """One rank's slot.

    Attributes:
        kind: why this rank makes the collective.
        step: local steps this rank has finished.
        h: local steps in its round.
        busy: seconds from its last collective to its arrival at this one.
        square_norm: squared norm of its parameters where drift is tracked, else 0.
        loss: mean training loss of its round; NaN where none was recorded.
        settings: checksum of what the rule goes by now and must be the same on all ranks.
        fingerprint: of its parameters, where they are believed to be equal on all ranks; else 0.
        finite: whether all it brings is finite.
    """

    kind: Kind
    step: int
    h: int
    busy: float
    square_norm: float = 0.0
    loss: float = math.nan
    settings: int = 0
    fingerprint: int = 0
    finite: bool = True


def write(slots: Tensor, rank: int, header: Header, finite: Tensor | None) -> None:
    """Write ``header`` into row ``rank`` of ``slots`` (world_size, SLOT), zeros elsewhere.

    ``finite`` is a 0-dim tensor that stays on the device (no host synchronisation); None means
    not looked at.
    """
    *told, _ = dataclasses.astuple(header)
    packed = _FIELDS.pack(*told)
    slots.zero_()
    slots[rank, :-1] = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(slots)
    slots[rank, -1] = 1 if finite is None else finite.to(slots.dtype)


def read(slots: Tensor, ranks: Iterable[int] | None = None) -> dict[int, Header]:
    """Return the headers by rank, all or those of ``ranks``. Cost: one host synchronisation."""
    rows = slots.tolist()
    headers = {}
    for rank in range(len(rows)) if ranks is None else ranks:
        *packed, finite = (int(element) for element in rows[rank])
        kind, *told = _FIELDS.unpack(bytes(packed))
        headers[rank] = Header(Kind(kind), *told, finite=bool(finite))
    return headers


def check_in_step(headers: Mapping[int, Header]) -> None:
    """Raise `ReplicaMismatchError` unless all ranks agree on kind, step, H and settings."""
    groups: dict[tuple[Kind, int, int], list[int]] = {}
    settings: dict[int, list[int]] = {}
    for rank, header in headers.items():
        groups.setdefault((header.kind, header.step, header.h), []).append(rank)
        settings.setdefault(header.settings, []).append(rank)
    if len(groups) > 1:
        told = "; ".join(
            f"{ranks_text(ranks)} at step {step} with H {h} ({kind.name.lower()})"
            for (kind, step, h), ranks in groups.items()
        )
        raise ReplicaMismatchError(
            f"replicas are out of step: {told}. All ranks must make the same calls: same number "
            "of batches, same period, same learning rate"
        )
    if len(settings) > 1:
        told = " and ".join(ranks_text(ranks) for ranks in settings.values())
        raise ReplicaMismatchError(
            f"at step {next(iter(headers.values())).step} the settings of {told} differ: "
            "learning rates and the outer optimizer's settings must be the same on all ranks"
        )


def spread(headers: Mapping[int, Header], mean_square_norm: float) -> float:
    """Root mean square distance of the replicas from their mean.

    sqrt(mean_i |x_i - x̄|^2) = sqrt(mean_i |x_i|^2 - |x̄|^2), in the units of the parameters.
    """
    mean = math.fsum(header.square_norm for header in headers.values()) / len(headers)
    return math.sqrt(max(mean - mean_square_norm, 0.0))  # in this order NaN stays NaN


def ranks_text(ranks: Sequence[int]) -> str:
    """One as "rank 3", several as "ranks 0, 1, 2"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
