"""Parameters as views of flat buffers: a synchronisation is one collective in place, no copy.

A buffer holds, in this order, one header slot per rank (first buffer only), the parameters, what
is averaged beside them, and what is taken from rank 0. There is one buffer per device and dtype;
each tensor starts at a multiple of 64 bytes, with the strides that the parameter had.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .header import SLOT

ALIGNMENT = 64  # bytes: a cache line, and what vectorised kernels like best


@dataclass(frozen=True)
class Entry:
    """A tensor's place in the layout: name, shape, strides (in elements), type and device."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    from_rank0: bool = False

    @classmethod
    def like(cls, name: str, tensor: Tensor, *, from_rank0: bool = False) -> Entry:
        """The entry for a dense tensor of the shape, strides, type and device of ``tensor``."""
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        if not _dense(shape, stride):
            raise ValueError(
                f"{name}: shape {shape} with strides {stride} overlaps itself or has holes; "
                "call .contiguous() on it before building the optimizer"
            )
        return cls(name, shape, stride, tensor.dtype, tensor.device, from_rank0)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{self.name}: shape {self.shape}, strides {self.stride}, {self.dtype}"


@dataclass(eq=False)
class FlatBuffer:
    """One dtype's memory on one device.

    Attributes:
        data: all of it, (n,); what a collective sums.
        slots: the ranks' headers, (world_size, SLOT), in the first buffer; else (0, SLOT).
        params: the parameters alone, alignment gaps (zeros) included.
        averaged: what a mean divides: parameters, and what is averaged beside them.
    """

    data: Tensor
    slots: Tensor
    params: Tensor
    averaged: Tensor


class Flat:
    """The flat buffers of one replica, and the views that its parameters have become.

    Args:
        params: named parameters; their memory moves into the buffers.
        beside: what else a synchronisation carries (buffers, optimizer state).
        world_size: number of header slots.

    Raises:
        ValueError: if a parameter is not dense, not floating-point, not materialised, sharded,
            or overlaps another in memory.
    """

    def __init__(
        self,
        params: Sequence[tuple[str, nn.Parameter]],
        beside: Sequence[Entry] = (),
        world_size: int = 1,
    ) -> None:
        _refuse_odd_parameters(params)
        self.params = list(params)
        own = [Entry.like(name, p) for name, p in params]
        self.entries = [*own, *beside]
        _refuse_equal_names(self.entries)
        self.buffers: list[FlatBuffer] = []
        self.views: dict[str, Tensor] = {}
        kinds = dict.fromkeys((e.device, e.dtype) for e in self.entries)
        for i, (device, dtype) in enumerate(kinds):
            mine = [e for e in own if (e.device, e.dtype) == (device, dtype)]
            rest = [e for e in beside if (e.device, e.dtype) == (device, dtype)]
            self._allocate(mine, rest, world_size if i == 0 else 0, device, dtype)
        with torch.no_grad():
            for name, p in params:
                self.views[name].copy_(p)
                p.data = self.views[name]
        # One id per parameter: comparing them at a boundary costs 0.1 µs each.
        self._pointers = [view.data_ptr() for view in (self.views[name] for name, _ in params)]

    def _allocate(
        self,
        params: list[Entry],
        beside: list[Entry],
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        step = ALIGNMENT // dtype.itemsize
        averaged = [e for e in beside if not e.from_rank0]
        from_rank0 = [e for e in beside if e.from_rank0]
        sizes = [-(-n // step) * step for n in (slots * SLOT, *(e.numel for e in params))]
        beside_sizes = [-(-e.numel // step) * step for e in (*averaged, *from_rank0)]
        starts = [0, *itertools.accumulate(sizes + beside_sizes)]
        data = torch.zeros(starts[-1], dtype=dtype, device=device)
        first, last = starts[1], starts[1 + len(params)]
        end_averaged = starts[1 + len(params) + len(averaged)]
        buffer = FlatBuffer(
            data=data,
            slots=data[: slots * SLOT].view(slots, SLOT),
            params=data[first:last],
            averaged=data[first:end_averaged],
        )
        for entry, start in zip((*params, *averaged, *from_rank0), starts[1:], strict=False):
            self.views[entry.name] = data.as_strided(entry.shape, entry.stride, start)
        self.buffers.append(buffer)

    @property
    def slots(self) -> Tensor:
        """The ranks' headers, (world_size, SLOT)."""
        return self.buffers[0].slots

    def check_pointers(self) -> None:
        """Raise `RuntimeError` if a parameter no longer lives in its flat buffer."""
        for (name, p), pointer in zip(self.params, self._pointers, strict=True):
            if p.data_ptr() != pointer:
                raise RuntimeError(
                    f"parameter {name} no longer lives in the optimizer's flat buffer: model.to(), "
                    ".half(), load_state_dict(assign=True) or an assignment to .data moved it. Do "
                    "that before building the optimizer"
                )

    def square_norm(self) -> float:
        """Squared norm of the parameters, accumulated in float64. Cost: one host sync."""
        return sum(
            float(torch.linalg.vector_norm(b.params, dtype=torch.float64) ** 2)
            for b in self.buffers
        )

    def finite(self) -> Tensor:
        """0-dim bool on the device: False if what is averaged holds NaN or infinity.

        A sum carries any NaN and infinity along in one read of the memory, where ``isfinite``
        would write a mask as well. The sum of finite values may overflow: `non_finite` decides.
        """
        device = self.buffers[0].data.device
        sums = [
            b.averaged.sum(dtype=torch.promote_types(b.data.dtype, torch.float32)).to(device)
            for b in self.buffers
        ]
        return torch.isfinite(torch.stack([s.double() for s in sums])).all()

    def non_finite(self) -> list[str]:
        """Names of what is averaged and holds NaN or infinity. Cost: a full pass, host syncs."""
        averaged = [e.name for e in self.entries if not e.from_rank0]
        return [n for n in averaged if not bool(torch.isfinite(self.views[n]).all())]


def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the strides place the elements side by side, in some order of the dimensions."""
    expected = 1
    for step, size in sorted((st, sz) for st, sz in zip(stride, shape, strict=True) if sz != 1):
        if size == 0:
            return True
        if step != expected:
            return False
        expected *= size
    return True


def _refuse_odd_parameters(params: Sequence[tuple[str, nn.Parameter]]) -> None:
    if not params:
        raise ValueError("the optimizer has no parameters")
    spans = []
    for name, p in params:
        reason = _odd(p)
        if reason:
            raise ValueError(f"parameter {name} {reason}")
        spans.append((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name))
    # Disjoint slices of one storage are fine (cuDNN lays an LSTM's weights out like that).
    spans = sorted(span for span in spans if span[0] < span[1])
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"parameters {name} and {other} are distinct but share storage: tie them as one "
                "Parameter, or clone one of them"
            )


def _refuse_equal_names(entries: Sequence[Entry]) -> None:
    counts = Counter(entry.name for entry in entries)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"distinct parameters have the same name {twice[0]}: name them apart")


def _odd(p: nn.Parameter) -> str | None:
    if isinstance(p, nn.parameter.UninitializedParameter):
        return "has no shape yet: run one forward pass before building the optimizer"
    if hasattr(p, "device_mesh"):
        return "is sharded (DTensor): local methods need the whole parameter on every replica"
    if p.device.type == "meta":
        return "is on the meta device: materialise the model before building the optimizer"
    if p.layout != torch.strided:
        return f"has the layout {p.layout}: only dense parameters can be averaged"
    if not p.dtype.is_floating_point or p.dtype.itemsize < 2:
        return f"is {p.dtype}: only 16, 32 and 64-bit floating-point parameters can be averaged"
    return None


def float_entries(named: Iterable[tuple[str, Tensor]], *, from_rank0: bool) -> list[Entry]:
    """Contiguous entries for the floating-point tensors among ``named``."""
    return [
        Entry.like(name, t.new_empty(t.shape), from_rank0=from_rank0)
        for name, t in named
        if t.dtype.is_floating_point
    ]
