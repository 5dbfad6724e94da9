"""What a synchronisation rule is: the end of a round, and what it keeps between rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..collective import Across, Collective
from ..compression import Codec, codec
from ..flat import Entry, Vector
from ..header import Kind
from ..outer import Outer
from ..replica import Replica
from ..traffic import Sending
from ..transport import Compressed, Copied, InPlace


class Rule(ABC):
    """Base of the rules. A subclass is one file, in this folder or of your own.

    A rule sees its replica, and nothing of periods. It is attached once, when all replicas hold the
    same parameters. What it keeps and what it sends are parts that it asks for when it is attached
    (`anchor`, `zeros`, `outer_step`, `mean_of_copies`, `mean_change`): saving, loading and new
    parameter groups are then taken care of here.

    Attributes:
        replica: the replica.
        in_place: the mean of the parameters in their own memory.
        agrees: whether rounds end, all or some, with all replicas equal.
        replicas_agree: whether all replicas are known to hold the same parameters, where no round
            is open. Before the first round they are not: weights may have been loaded since.
        needs_loss: whether the training loss must be recorded at every step.
        overlaps: whether what it sends travels behind training; else replicas wait for it.
        centre: name of the anchor that is the consensus; None: the replicas' mean is.
        compress: the codec for what it sends, or its name; None for numbers as they are.
        was_named: by which other name states of this rule were saved.
    """

    replica: Replica
    agrees = True
    replicas_agree = False
    needs_loss = False
    overlaps = False
    centre: str | None = None
    compress: str | Codec | None = None
    was_named: str | None = None

    def levels(self, everyone: Collective) -> Sequence[Collective]:
        """Whom with headers are exchanged at a meeting, one after another."""
        return [everyone]

    def sums(self, everyone: Collective) -> Sequence[Collective | Across]:
        """The sums that one after another make the sum over all replicas."""
        return [everyone]

    def attach(self, replica: Replica) -> None:
        """Allocate what the rule keeps. Called once, by the optimizer. Collective."""
        if hasattr(self, "replica"):
            raise ValueError(
                f"this {type(self).__name__} already belongs to an optimizer: make a new one"
            )
        self.replica = replica
        self.in_place = InPlace(replica, self.sums(replica.collective))
        self._copied: Copied | None = None
        self._anchors: dict[str, Vector] = {}
        self._momenta: dict[str, Vector] = {}
        self._outer: Outer | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

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

    # What happens when.

    def extra(self, params: Sequence[tuple[str, nn.Parameter]]) -> list[Entry]:
        """What the rule wants averaged in the parameters' collective; entries of the layout."""
        return []

    def sends(self, parameters: int, extra: int, itemsize: int) -> list[Sending]:
        """What the ends of rounds send; asked before the rule is attached.

        Args:
            parameters: how many numbers the parameters are.
            extra: how many are averaged with them: `extra` and buffers.
            itemsize: bytes of a number.
        """
        chosen = codec(self.compress)
        if chosen is None:
            return [Sending("all_reduce", (parameters + extra) * itemsize)]
        blocks = -(-parameters // chosen.block)
        return [
            Sending("shards", chosen.size(blocks * chosen.block)),
            Sending("all_reduce", extra * itemsize),
        ]

    def begin(self) -> None:
        """The first round begins.

        Raises:
            RuntimeError: if the parameters are no longer those that the anchors started from.
        """
        for vector in self._anchors.values():
            if not vector.equals(self.replica.flat.params):
                raise RuntimeError(
                    "the parameters were changed after the optimizer was built, and "
                    f"{type(self).__name__} would pull them back to what they were: load weights "
                    "before building the optimizer, or load the state that belongs to them into it"
                )

    def before_step(self) -> None:  # noqa: B027 (most rules do nothing)
        """A local step within a round comes. What was due before it, and has failed, is owed."""

    def after_step(self) -> None:  # noqa: B027 (most rules do nothing)
        """A local step is done. No collective."""

    def adopt(self) -> None:  # noqa: B027 (most rules average nothing else)
        """Bring what is averaged with the parameters into their memory. No collective."""

    @abstractmethod
    def end_round(self) -> None:
        """End the round: the rule's equation. Collective."""

    def land(self) -> None:  # noqa: B027 (most rules leave nothing in flight)
        """Wait for the collective in flight, if any, and take what it brings. Launches none."""

    def poll(self) -> None:
        """Take note if what is in flight has arrived. No waiting."""
        if self._copied is not None:
            self._copied.poll()

    def drop(self) -> None:
        """Wait for what is in flight, if anything, and forget it."""
        if self._copied is not None:
            self._copied.drop()

    def enter_consensus(self) -> None:
        """Put into the parameters the model that should be evaluated. Collective."""
        self.land()
        self.in_place.mean_(Kind.CONSENSUS, ends_round=False)

    def finish(self) -> None:
        """Make all replicas equal to the consensus, with no collective left in flight."""
        self.land()
        is_open = self.replica.round.open
        believed = self.replicas_agree and not is_open
        self.in_place.mean_(Kind.FINISH, ends_round=is_open, believed_equal=believed)
        z = self._anchors.get("z")
        if z is not None and not z.equals(self.replica.flat.params):
            z.copy_(self.replica.flat.params)
        self.replicas_agree = True

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
