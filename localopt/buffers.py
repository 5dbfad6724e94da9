"""A model's buffers (BatchNorm statistics, counters) under a policy.

``keep`` leaves each replica its own, ``average`` averages the floating-point ones, ``broadcast``
gives every replica rank 0's, whenever the parameters are averaged in place: by rules that make
the replicas equal at each synchronisation, by the others in `consensus` and `finish`. They travel
in the parameters' collective: copied in before it and out after it, for they are small and modules
may replace them at any time. Integers are never averaged; under ``broadcast`` they travel as
bytes, which no type can round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .collective import Collective
from .entry import Entry

BufferPolicy = Literal["keep", "average", "broadcast"]

_SHIFTS = torch.arange(0, 64, 8)


class Buffers:
    """The buffers of ``model`` (None: of no model) under ``policy``.

    Args:
        model: the module whose buffers to care for.
        policy: "keep", "average" or "broadcast".
        params: the parameters that the optimizer owns.

    Raises:
        ValueError: if the policy is unknown, or asks for buffers where there is no model.
    """

    def __init__(
        self, model: nn.Module | None, policy: BufferPolicy, params: Iterable[nn.Parameter]
    ) -> None:
        if policy not in get_args(BufferPolicy):
            raise ValueError(f"buffers must be one of {get_args(BufferPolicy)}, not {policy!r}")
        if policy != "keep" and model is None:
            raise ValueError(f'buffers="{policy}" needs model=, the module that holds them')
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model is wrapped in DistributedDataParallel, which averages gradients at every "
                "step: give the bare module, and do not wrap it"
            )
        self.model = model
        self.policy = policy
        self._owned = {id(p) for p in params}
        self._integer_dtype = next((p.dtype for p in params), torch.float32)

    @property
    def travel(self) -> bool:
        """Whether any are sent with the parameters."""
        return bool(self.entries())

    def named(self) -> dict[str, Tensor]:
        """The model's buffers as they are now."""
        return dict(self.model.named_buffers()) if self.model is not None else {}

    def described(self) -> list[str]:
        """A line for each tensor that `equalise` sends."""
        tensors = {**self.named(), **self._other_parameters()}
        return [f"{name}: shape {tuple(t.shape)}, {t.dtype}" for name, t in tensors.items()]

    def entries(self) -> list[Entry]:
        """What the policy adds to the flat layout."""
        if self.policy == "keep":
            return []
        entries = []
        for name, t in self.named().items():
            t = _real(t)
            if t.dtype.is_floating_point:
                like = t.new_empty(t.shape)
            elif self.policy == "broadcast":
                like = t.new_empty((*t.shape, 8), dtype=self._integer_dtype)
            else:
                continue
            rank0 = self.policy == "broadcast"
            entries.append(Entry.like(f"buffer {name}", like, from_rank0=rank0))
        return entries

    def gather(self, views: Mapping[str, Tensor], *, from_rank0: bool) -> None:
        """Copy the buffers into their views; what only rank 0 brings is zero elsewhere."""
        for tensor, view in self._pairs(views):
            if self.policy == "broadcast" and not from_rank0:
                view.zero_()
            elif tensor.dtype.is_floating_point:
                view.copy_(tensor)
            else:
                shifts = _SHIFTS.to(tensor.device)
                view.copy_((tensor.long().unsqueeze(-1) >> shifts) & 255)

    def scatter(self, views: Mapping[str, Tensor]) -> None:
        """Copy the views back into the buffers."""
        for tensor, view in self._pairs(views):
            if tensor.dtype.is_floating_point:
                tensor.copy_(view)
            else:
                tensor.copy_((view.long() << _SHIFTS.to(tensor.device)).sum(-1))

    def _pairs(self, views: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        if self.policy == "keep":
            return []
        named = {f"buffer {name}": _real(t) for name, t in self.named().items()}
        return [(t, views[name]) for name, t in named.items() if name in views]

    def _other_parameters(self) -> dict[str, Tensor]:
        """The model's parameters that the optimizer does not own."""
        named = self.model.named_parameters() if self.model is not None else ()
        return {name: p.data for name, p in named if id(p) not in self._owned}

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all buffers."""
        return {name: tensor.clone() for name, tensor in self.named().items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Write a snapshot back."""
        named = self.named()
        for name, saved in snapshot.items():
            named[name].copy_(saved)

    def equalise(self, collective: Collective) -> None:
        """Give every replica rank 0's buffers, and rank 0's parameters outside the optimizer."""
        if self.model is None or collective.world_size == 1:
            return
        tensors = [*self.named().values(), *self._other_parameters().values()]
        if not tensors:
            return
        device = tensors[0].device
        chunks = [t.contiguous().reshape(-1).view(torch.uint8).to(device) for t in tensors]
        packed = torch.cat(chunks)
        collective.broadcast_([packed])
        for tensor, chunk in zip(tensors, packed.split([len(c) for c in chunks]), strict=True):
            # A clone starts at an aligned address, which a view of another type needs.
            tensor.copy_(chunk.clone().view(tensor.dtype).view(tensor.shape))


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as a view of pairs of reals; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
