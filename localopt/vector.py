"""What a rule keeps for each element of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .entry import Entry


class Vector:
    """A number for each element of the parameters, such as an anchor or a momentum.

    Args:
        entries, starts: where the parameters are.
        like: the parameters' part of the flat buffers.
        wide: whether parameters of 16 bits have theirs in float32, so that small updates to it are
            not lost.

    Attributes:
        data: as the parameters' part of the flat buffers: one tensor (n,) per buffer.
        views: by the parameter's name, in its shape.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        starts: Sequence[dict[str, int]],
        like: Sequence[Tensor],
        *,
        wide: bool,
    ) -> None:
        self.wide = wide
        types = [torch.promote_types(x.dtype, torch.float32) if wide else x.dtype for x in like]
        self.data = [torch.zeros_like(x, dtype=t) for x, t in zip(like, types, strict=True)]
        homes = {name: (data, at[name]) for data, at in zip(self.data, starts, strict=True)
                  for name in at}  # fmt: skip
        self.views = {
            e.name: data.as_strided(e.shape, e.stride, start)
            for e in entries
            for data, start in (homes[e.name],)
        }

    def copy_(self, source: Sequence[Tensor]) -> None:
        """Take the values of other tensors of this layout."""
        for mine, x in zip(self.data, source, strict=True):
            mine.copy_(x)

    def write_to(self, target: Sequence[Tensor]) -> None:
        """Give other tensors of this layout these values."""
        for mine, x in zip(self.data, target, strict=True):
            x.copy_(mine)

    def equals(self, other: Sequence[Tensor]) -> bool:
        """Whether tensors of this layout hold the same values. Cost: one host sync each."""
        return all(torch.equal(z.to(x.dtype), x) for z, x in zip(self.data, other, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies, by the parameter's name."""
        return {name: view.clone() for name, view in self.views.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of the parameters named in ``state``.

        Raises:
            ValueError: if one has another shape here.
        """
        for name, saved in state.items():
            if name not in self.views or self.views[name].shape != saved.shape:
                raise ValueError(
                    f"the state to load has parameter {name} of shape {tuple(saved.shape)}, which "
                    "this optimizer does not have"
                )
            self.views[name].copy_(saved)
