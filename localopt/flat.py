"""Parameters as views of flat buffers: a synchronisation is one collective in place, no copy.

A buffer holds, in this order, the parameters, what is averaged with them, and what is taken from
rank 0. There is one buffer per device and dtype; each tensor starts at a multiple of 64 bytes, with
the strides that the parameter had. To everybody else a tensor looks like one with a storage of its
own, of its own size: whatever saves or copies storages takes this tensor and no other. Such a
storage cannot be resized.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .entry import Entry, entries_of
from .vector import Vector

ALIGNMENT = 64  # bytes: a cache line, and what vectorised kernels like best


@dataclass(eq=False)
class FlatBuffer:
    """One dtype's memory on one device.

    Attributes:
        data: all of it, (n,); what a collective sums.
        params: the parameters alone, alignment gaps (zeros) included.
        averaged: what a mean divides: parameters, and what is averaged with them.
        extra: what travels with the parameters, the rest of the memory.
        extra_averaged: of that, what is averaged.
    """

    data: Tensor
    params: Tensor
    averaged: Tensor
    extra: Tensor
    extra_averaged: Tensor


class Memory:
    """Flat buffers for a list of entries, and each entry's view of them.

    Args:
        own: the parameters' entries.
        extra: what else a synchronisation carries (buffers, optimizer state).
        world_size: every buffer can be cut in so many equal shards.
    """

    def __init__(self, own: Sequence[Entry], extra: Sequence[Entry], world_size: int) -> None:
        self._layout = (own, extra, world_size)
        self.world_size = world_size
        self.entries = [*own, *extra]
        self.buffers: list[FlatBuffer] = []
        self.views: dict[str, Tensor] = {}
        self._starts: list[dict[str, int]] = []
        kinds = dict.fromkeys((e.device, e.dtype) for e in self.entries)
        for device, dtype in kinds:
            mine = [e for e in own if (e.device, e.dtype) == (device, dtype)]
            rest = [e for e in extra if (e.device, e.dtype) == (device, dtype)]
            self._allocate(mine, rest, device, dtype)

    def _allocate(
        self,
        params: list[Entry],
        extra: list[Entry],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        step = ALIGNMENT // dtype.itemsize
        averaged = [e for e in extra if not e.from_rank0]
        from_rank0 = [e for e in extra if e.from_rank0]
        tensors = (*params, *averaged, *from_rank0)
        starts = [0, *itertools.accumulate(-(-e.numel // step) * step for e in tensors)]
        shards = step * self._layout[2]
        data = torch.zeros(-(-starts[-1] // shards) * shards, dtype=dtype, device=device)
        last, end_averaged = starts[len(params)], starts[len(params) + len(averaged)]
        buffer = FlatBuffer(
            data=data,
            params=data[:last],
            averaged=data[:end_averaged],
            extra=data[last : starts[-1]],
            extra_averaged=data[last:end_averaged],
        )
        for entry, start in zip(tensors, starts, strict=False):
            own = _own_storage(data[start : start + entry.numel])
            self.views[entry.name] = own.as_strided(entry.shape, entry.stride)
        self._starts.append({e.name: start for e, start in zip(params, starts, strict=False)})
        self.buffers.append(buffer)

    def twin(self) -> Memory:
        """Other memory of the same layout, zeros."""
        return Memory(*self._layout)

    @property
    def device(self) -> torch.device:
        """The first buffer's."""
        return self.buffers[0].data.device

    @property
    def params(self) -> list[Tensor]:
        """The parameters' part of each buffer, (n,)."""
        return [buffer.params for buffer in self.buffers]

    def square_norm(self) -> float:
        """Squared norm of the parameters, accumulated in float64. Cost: one host sync."""
        return square_norm(self.params)

    def fingerprint(self) -> int:
        """Of the parameters' bits: the same for the same bits. Cost: one read, one host sync."""
        return _fingerprint([_sums_of_bits(x) for x in self.params])

    def total(self) -> Tensor:
        """As the function `total`, of what is averaged."""
        return total([b.averaged for b in self.buffers])

    def non_finite(self) -> list[str]:
        """Names of what is averaged and holds NaN or infinity. Cost: a full pass, host syncs."""
        averaged = [e.name for e in self.entries if not e.from_rank0]
        return [n for n in averaged if not bool(torch.isfinite(self.views[n]).all())]


class Flat(Memory):
    """The flat buffers that one replica's parameters live in.

    Args:
        named: named parameters; their memory moves into the buffers.
        extra, world_size: as for `Memory`.

    Raises:
        ValueError: as `entries_of`.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        extra: Sequence[Entry] = (),
        world_size: int = 1,
    ) -> None:
        self.named = list(named)
        super().__init__(entries_of(named, extra), extra, world_size)
        with torch.no_grad():
            for name, p in named:
                self.views[name].copy_(p)
                p.data = self.views[name]
        # One id per parameter: comparing them at a boundary costs 0.1 µs each.
        self._pointers = [view.data_ptr() for view in (self.views[name] for name, _ in named)]
        self._extra = {entry.name: self.views[entry.name].data_ptr() for entry in extra}
        self._sampled = [
            torch.tensor(indices, device=buffer.data.device)
            for buffer, spans in zip(self.buffers, self.spans(), strict=True)
            for indices in (_sampled(spans),)
        ]

    def take_back(self) -> None:
        """Let the parameters live here again, with the values that they had here."""
        for name, p in self.named:
            p.data = self.views[name]

    def check_pointers(self) -> None:
        """Raise `RuntimeError` if a tensor no longer lives in its flat buffer."""
        for (name, p), pointer in zip(self.named, self._pointers, strict=True):
            if p.data_ptr() != pointer:
                raise RuntimeError(
                    f"parameter {name} no longer lives in the optimizer's flat buffer: model.to(), "
                    ".half(), share_memory(), load_state_dict(assign=True) or an assignment to "
                    ".data moved it. Do that before building the optimizer"
                )
        for name, pointer in self._extra.items():
            if self.views[name].data_ptr() != pointer:
                raise RuntimeError(
                    f"{name} no longer lives in the optimizer's flat buffer: share_memory_() moved "
                    "it, which sending a tensor to another process does as well. Send a clone"
                )

    def sample(self) -> int:
        """A fingerprint of some elements of each parameter: cheap, and another one where tensors
        were replaced. Cost: one host sync."""
        parts = [x[at] for x, at in zip(self.params, self._sampled, strict=True) if len(at)]
        return _fingerprint(parts)

    def spans(self) -> list[list[tuple[str, int, int]]]:
        """By buffer, where each parameter is among `params`: name, first and last element + 1."""
        return [
            [(name, first, first + self.views[name].numel()) for name, first in starts.items()]
            for starts in self._starts
        ]

    def vector(self, *, wide: bool) -> Vector:
        """Zeros, one for each element of the parameters."""
        return Vector(self._layout[0], self._starts, self.params, wide=wide)


def _own_storage(part: Tensor) -> Tensor:
    """``part`` (n,), the same memory as a storage of its own, which keeps the whole alive."""
    if part.device.type not in ("cpu", "cuda"):
        return part
    return torch.from_dlpack(part)


def bits_of(x: Tensor) -> int:
    """A fingerprint of one tensor. Cost: one host sync."""
    return _fingerprint([_sums_of_bits(x.contiguous().reshape(-1))])


def _sums_of_bits(x: Tensor) -> Tensor:
    """Sums of the bits of x (n,), of each column of lines of 64 bytes over a few lines: what is
    changed, negated or moved elsewhere changes some of them. Up to 512 lines as they are."""
    bits = x.view(torch.int16 if x.itemsize == 2 else torch.int32)  # whose sums do not overflow
    columns = ALIGNMENT // bits.itemsize
    lines = len(bits) // columns
    few = max(1, lines // 256)
    end = lines // few * few * columns
    sums = bits[:end].view(-1, few, columns).sum(1, dtype=torch.int64)
    return torch.cat([sums.view(-1), bits[end:].long()])


def _fingerprint(tensors: Sequence[Tensor]) -> int:
    """Of the bits of tensors: the same for the same bits. Cost: one host sync each."""
    digest = hashlib.blake2b(digest_size=8)
    for x in tensors:
        held = x.cpu()
        digest.update(ctypes.string_at(held.data_ptr(), held.nbytes))
    return int.from_bytes(digest.digest(), signed=True)


def _sampled(spans: Sequence[tuple[str, int, int]]) -> list[int]:
    """Up to 64 indices of each parameter, evenly spread."""
    return [
        first + i * (last - first) // count
        for _, first, last in spans
        for count in (min(64, last - first),)
        for i in range(count)
    ]


def square_norm(tensors: Sequence[Tensor]) -> float:
    """Their squared norm, accumulated in float64. Cost: one host sync each."""
    return sum(float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2) for x in tensors)


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, a 0-dim float64 tensor on the first one's device: finite only if they all are.

    A sum carries any NaN and infinity along in one read of the memory, where ``isfinite`` would
    write a mask as well. The sum of finite values may overflow: a closer look decides.
    """
    device = tensors[0].device
    sums = [x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).to(device) for x in tensors]
    return torch.stack([s.double() for s in sums]).sum()


def pull_(x: Sequence[Tensor], z: Sequence[Tensor], weight: float) -> None:
    """x ← x + weight (z - x), in place; tensors of one layout, z perhaps of a wider type."""
    for mine, anchor in zip(x, z, strict=True):
        if mine.dtype == anchor.dtype:
            mine.lerp_(anchor, weight)
        else:
            mine.copy_(mine.to(anchor.dtype).lerp_(anchor, weight))
