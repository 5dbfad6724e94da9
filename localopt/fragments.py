"""The parameters cut into fragments that travel one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .entry import Entry
from .flat import Flat, Memory


class Fragments:
    """The parameters cut into K fragments of equal size, and memory for the mean of one of them.

    Fragment k of a buffer with n elements has those from ⌊k n / K⌋ to ⌊(k + 1) n / K⌋, in the order
    of the parameters; a parameter may lie in several. Parameters that come later are in the last.

    Args:
        flat: the parameters.
        number: K.
        before: the fragments of the layout before this one.

    Attributes:
        number: K.
        memory: as large as the largest fragment.
    """

    def __init__(self, flat: Flat, number: int, before: Fragments | None = None) -> None:
        self.number = number
        self._spans = flat.spans()
        kinds = [(x.device, x.dtype) for x in flat.params]
        self._counts: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for kind, spans in zip(kinds, self._spans, strict=True):
            n = sum(last - first for _, first, last in spans)
            first_ones = [k * n // number for k in range(number)]
            if before is not None:
                first_ones = before._counts.get(kind, [0] * (number + 1))[:-1]
            self._counts[kind] = [*first_ones, n]
        self._cuts = [
            [_cut_after(count, spans) for count in self._counts[kind]]
            for kind, spans in zip(kinds, self._spans, strict=True)
        ]
        sizes = [max(b - a for a, b in itertools.pairwise(cuts)) for cuts in self._cuts]
        entries = [
            Entry(f"buffer {i}", (size,), (1,), dtype, device)
            for i, (size, (device, dtype)) in enumerate(zip(sizes, kinds, strict=True))
        ]
        self.memory = Memory(entries, [], flat.world_size)

    def of(self, tensors: Sequence[Tensor], k: int) -> list[Tensor]:
        """Fragment k of each buffer's (n,)."""
        return [x[cuts[k] : cuts[k + 1]] for x, cuts in zip(tensors, self._cuts, strict=True)]

    def pieces(self, tensors: Sequence[Tensor], k: int) -> dict[str, Tensor]:
        """Fragment k of each buffer's (n,), by the parameters it is made of: (n,) each."""
        return self._pieces(tensors, k, [0] * len(self._cuts))

    def pieces_of_mean(self, k: int) -> dict[str, Tensor]:
        """The same of what `memory` holds."""
        return self._pieces(self.memory.params, k, [cuts[k] for cuts in self._cuts])

    def _pieces(
        self, tensors: Sequence[Tensor], k: int, starts: Sequence[int]
    ) -> dict[str, Tensor]:
        pieces = {}
        for x, cuts, spans, start in zip(tensors, self._cuts, self._spans, starts, strict=True):
            for name, first, last in spans:
                a, b = max(first, cuts[k]), min(last, cuts[k + 1])
                if a < b:
                    pieces[f"{name}[{a - first}:]"] = x[a - start : b - start]
        return pieces

    def mean(self, k: int) -> list[Tensor]:
        """What `memory` holds of fragment k."""
        return [
            x[: cuts[k + 1] - cuts[k]]
            for x, cuts in zip(self.memory.params, self._cuts, strict=True)
        ]

    def non_finite(self, k: int) -> list[str]:
        """Names of the parameters of which `memory` holds NaN or infinity as fragment k."""
        names = []
        for mean, cuts, spans in zip(self.mean(k), self._cuts, self._spans, strict=True):
            for name, first, last in spans:
                part = mean[max(first - cuts[k], 0) : max(last - cuts[k], 0)]
                if not bool(torch.isfinite(part).all()):
                    names.append(name)
        return names


def _cut_after(count: int, spans: Sequence[tuple[str, int, int]]) -> int:
    """Where the element lies that ``count`` others come before, gaps not counted."""
    for _, first, last in spans:
        if count < last - first:
            return first + count
        count -= last - first
    return spans[-1][2] if spans else 0
