"""Which tensors can live in flat buffers: name, shape, strides, type and device of each."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A tensor of the layout: name, shape, strides (in elements), type and device."""

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


def entries_of(named: Sequence[tuple[str, nn.Parameter]], extra: Sequence[Entry]) -> list[Entry]:
    """The entries of parameters that can live in flat buffers, next to what is ``extra``.

    Raises:
        ValueError: if a parameter is not dense, not floating-point, not materialised, sharded,
            or overlaps another in memory; if two have the same name.
    """
    _refuse_odd_parameters(named)
    own = [Entry.like(name, p) for name, p in named]
    _refuse_equal_names([*own, *extra])
    return own


def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether by the strides the elements lie side by side, in some order of the dimensions."""
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
