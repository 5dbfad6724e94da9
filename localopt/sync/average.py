"""Averaging: x_i ← x̄ at the end of a round (Local SGD, Local AdamW)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..compression import PIECE, Codec, codec
from ..entry import Entry
from ..replica import Replica
from .rule import Rule


@dataclass(eq=False)
class Average(Rule):
    """Replace every replica by the mean of the replicas.

    x_i ← x̄ = (1/m) Σ_j x_j

    Optimizer state (momentum, Adam's moments) stays local unless named. With SGD, momentum
    included, and H = 1 this is data-parallel SGD, for momentum is linear in the gradients. With
    an adaptive inner optimizer it is not: second moments are local.

    With ``compress`` ranks send their changes since the round's start in fewer bytes, what these
    lose is sent with the next changes (error feedback), and replicas are equal all the same.
    The same for any number of ranks: half the bytes with "bf16", a quarter with "int8".

    Args:
        state_fields: names of optimizer-state tensors, of their parameter's shape and type, that
            are averaged too, such as ``("exp_avg", "exp_avg_sq")``. They travel in the same
            collective. A replica that has not stepped on a parameter yet brings zeros.
        reset_fields: names of optimizer-state tensors that are set to zero at each
            synchronisation, such as ``("momentum_buffer",)``.
        compress: None, "bf16", "int8", or a codec of `localopt.compression`.

    Raises:
        ValueError: if a setting is unknown, or excludes another; at the first synchronisation, if
            no parameter's state has a named field or it is not like its parameter.

    Source: Stich 2018, arXiv 1805.09767; Gu et al. 2023, arXiv 2310.14423 (Local AdamW).
    """

    state_fields: Sequence[str] = ()
    reset_fields: Sequence[str] = ()
    compress: str | Codec | None = None

    def __post_init__(self) -> None:
        for name in ("state_fields", "reset_fields"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a sequence of names: write ({getattr(self, name)!r},)")
        both = set(self.state_fields) & set(self.reset_fields)
        if both:
            raise ValueError(f"{sorted(both)} cannot be both averaged and reset")
        if codec(self.compress) and self.state_fields:
            raise ValueError(f"compress={self.compress!r} and state_fields exclude each other")

    def attach(self, replica: Replica) -> None:
        super().attach(replica)
        if self.compress is not None:
            self.z = self.anchor("z")
            self.change = self.mean_change()

    def extra(self, params: Sequence[tuple[str, nn.Parameter]]) -> list[Entry]:
        return [Entry.like(f"{name}/{f}", p) for f in self.state_fields for name, p in params]

    @torch.no_grad()
    def end_round(self) -> None:
        self.adopt()
        if self.compress is None:
            self.in_place.mean_()
        else:
            with self.change.mean_change(self.z):
                follow_(self.replica.flat.params, self.z.data)
        self.replicas_agree = True
        self._reset_state()

    def finish(self) -> None:
        ends_round = self.replica.round.open
        self.adopt()
        super().finish()
        if ends_round:
            self._reset_state()

    @torch.no_grad()
    def adopt(self) -> None:
        """Make the named state fields views of the flat buffers, as the parameters are."""
        for field in (*self.state_fields, *self.reset_fields):
            self._require(field)
        state, views = self.replica.inner.state, self.replica.flat.views
        for field in self.state_fields:
            for name, p in self.replica.flat.named:
                view = views[f"{name}/{field}"]
                tensor = state.get(p, {}).get(field)
                if tensor is None:  # never stepped on this replica: it brings zeros
                    view.zero_()
                elif tensor.data_ptr() != view.data_ptr():
                    if (tensor.shape, tensor.dtype) != (view.shape, view.dtype):
                        raise ValueError(
                            f"state field {field!r} of parameter {name} has shape "
                            f"{tuple(tensor.shape)} and {tensor.dtype}, its parameter "
                            f"{tuple(view.shape)} and {view.dtype}: only fields like their "
                            "parameter can be averaged"
                        )
                    view.copy_(tensor)
                    state[p][field] = view

    def _reset_state(self) -> None:
        for field in self.reset_fields:
            for state in self.replica.inner.state.values():
                if isinstance(state.get(field), Tensor):
                    state[field].zero_()

    def _require(self, field: str) -> None:
        known = {key: None for state in self.replica.inner.state.values() for key in state}
        if known and field not in known:
            raise ValueError(
                f"the inner optimizer's state has no field {field!r}; it has {sorted(known)}"
            )


def follow_(x: Sequence[Tensor], z: Sequence[Tensor]) -> None:
    """z ← z - Δ, x ← z, where x holds the mean of the changes Δ = z - x_i."""
    for mine, start in zip(x, z, strict=True):
        for piece, start_piece in zip(mine.split(PIECE), start.split(PIECE), strict=True):
            piece.copy_(start_piece.sub_(piece))
