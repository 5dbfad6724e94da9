"""What a rule keeps between rounds and sends at their ends: parts that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..compression import Codec, codec
from ..outer import Outer
from ..replica import Replica
from ..transport import Compressed, Copied, InPlace
from ..vector import Vector


class Parts:
    """Base of `Rule`: what it has asked for is saved, loaded and laid out anew here.

    Attributes:
        replica: the replica.
        in_place: the mean of the parameters in their own memory.
        replicas_agree: whether all replicas are known to hold the same parameters, where no round
            is open. Before the first round they are not: weights may have been loaded since.
        overlaps: whether what is sent travels behind training; else replicas wait for it.
        centre: name of the anchor that is the consensus; None: the replicas' mean is.
        compress: the codec for what is sent, or its name; None for numbers as they are.
    """

    replica: Replica
    in_place: InPlace
    replicas_agree = False
    overlaps = False
    centre: str | None = None
    compress: str | Codec | None = None

    def attach(self, replica: Replica) -> None:
        """Allocate what the rule keeps. Called once, by the optimizer. Collective."""
        if hasattr(self, "replica"):
            raise ValueError(
                f"this {type(self).__name__} already belongs to an optimizer: make a new one"
            )
        self.replica = replica
        self._copied: Copied | None = None
        self._anchors: dict[str, Vector] = {}
        self._momenta: dict[str, Vector] = {}
        self._outer: Outer | None = None

    def __getstate__(self) -> dict[str, Any]:
        if hasattr(self, "replica"):
            raise TypeError(
                f"this {type(self).__name__} belongs to an optimizer and cannot be copied: make a "
                "new one"
            )
        return vars(self)

    # What a rule asks for when it is attached.

    def anchor(self, name: str, *, wide: bool = True) -> Vector:
        """A vector that starts as the parameters; ``wide``: in float32 for those of 16 bits.

        One named "z" starts again at the consensus when all replicas are made equal.
        """
        self._anchors[name] = self.replica.flat.vector(wide=wide)
        self._anchors[name].copy_(self.replica.flat.params)
        return self._anchors[name]

    def zeros(self, name: str) -> Vector:
        """A vector that starts as zeros."""
        self._momenta[name] = self.replica.flat.vector(wide=True)
        return self._momenta[name]

    def mean_of_copies(
        self,
        fragments: int | None = None,
        *,
        start: Vector | None = None,
    ) -> Copied:
        """x̄ in memory of its own; behind training if the rule `overlaps`. Collective.

        Args:
            fragments: into how many to cut the parameters.
            start: z, to have the mean of z - x instead; that may be `compress`ed.
        """
        chosen = None if start is None else codec(self.compress)
        lost = None if chosen is None else self.zeros("lost")
        self._copied = Copied(
            self.replica, behind=self.overlaps, fragments=fragments, start=start,
            compress=chosen, lost=lost,
        )  # fmt: skip
        return self._copied

    def mean_change(self) -> InPlace | Compressed:
        """The mean of what a round has changed, in place of the parameters; `compress`ed."""
        chosen = codec(self.compress)
        if chosen is None:
            return self.in_place
        return Compressed(self.replica, chosen, self.zeros("lost"))

    def outer_step(self, outer: Outer) -> Optimizer:
        """An outer optimizer on `stepped`."""
        outer.attach(self.stepped(), self.replica.collective.world_size)
        self._outer = outer
        return outer.optimizer

    def stepped(self) -> dict[str, Tensor]:
        """What the outer optimizer steps on: z, by parameter."""
        return self._anchors["z"].views

    # Saved, loaded, begun again.

    @torch.no_grad()
    def start_over(self) -> None:
        """Begin again from the parameters as they are now, with nothing in flight."""
        for vector in self._anchors.values():
            vector.copy_(self.replica.flat.params)
        for vector in self._momenta.values():
            vector.copy_([torch.zeros_like(x) for x in vector.data])
        if self._outer is not None:
            self._outer.start_over()
        self.replicas_agree = False

    @torch.no_grad()
    def relayout(self) -> None:
        """Move what is kept to the replica's new layout, which has parameters more."""
        for name, vector in {**self._anchors, **self._momenta}.items():
            new = self.replica.flat.vector(wide=vector.wide)
            if name in self._anchors:
                new.copy_(self.replica.flat.params)
            new.load_state_dict(vector.views)
            vector.data, vector.views = new.data, new.views
        if self._copied is not None:
            self._copied.relayout()
        if self._outer is not None:
            self._outer.relayout(self.stepped())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in types that ``torch.load(weights_only=True)`` reads."""
        vectors = {**self._anchors, **self._momenta}
        return {
            "replicas_agree": self.replicas_agree,
            "anchors": list(self._anchors),
            "centre": self.centre,
            "vectors": {name: vector.state_dict() for name, vector in vectors.items()},
            **(self._outer.state_dict() if self._outer is not None else {}),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless a state is of a rule with the same parts as this one."""
        missing = {*self._anchors, *self._momenta} - state["vectors"].keys()
        if missing:
            raise ValueError(
                f"the state to load has no {min(missing)!r}, which {self!r} keeps: it was saved by "
                "a rule with other settings"
            )
        if self._outer is not None:
            if "outer" not in state:
                raise ValueError(
                    f"the state to load has no outer optimizer, which {self!r} has: it was saved "
                    "by a rule with other settings"
                )
            self._outer.check_state(state)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.replicas_agree = state["replicas_agree"]
        for name, vector in {**self._anchors, **self._momenta}.items():
            vector.load_state_dict(state["vectors"][name])
        if self._outer is not None:
            self._outer.load_state_dict(state)
