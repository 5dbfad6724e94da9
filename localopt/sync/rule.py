"""What a synchronisation rule is: the end of a round, and what it keeps between rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from ..flat import Entry, Vector
from ..header import Kind

if TYPE_CHECKING:
    from ..compression import Codec
    from ..replica import Replica

Collectives = Literal["all_reduce", "broadcast", "shards"]


@dataclass(frozen=True)
class Sending:
    """One collective at the ends of rounds, as a plan needs to know it.

    Args:
        how: "all_reduce"; "broadcast" from one rank; or "shards", of which each rank gets one from
            all others, and sends it to them again.
        bytes: payload, which is as large on every rank.
        group_size: consecutive ranks in a group, where groups do so at once; None: all ranks.
        across: between the groups instead of inside: an all-reduce of each member's own shard, and
            a broadcast of the shards inside.
        every: rounds from one to the next.

    Raises:
        ValueError: if a setting is out of range, or ``across`` has no groups.
    """

    how: Collectives
    bytes: int
    group_size: int | None = None
    across: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        if self.how not in get_args(Collectives):
            known = ", ".join(get_args(Collectives))
            raise ValueError(f"Sending: how is {self.how!r}: it must be one of {known}")
        for name, least in (("bytes", 0), ("group_size", 1), ("every", 1)):
            value = getattr(self, name)
            if not (value is None and name == "group_size") and value < least:
                raise ValueError(f"Sending: {name} is {value}: it must be at least {least}")
        if self.across and self.group_size is None:
            raise ValueError("Sending: across is about groups: it needs group_size")


class Rule(ABC):
    """Base of the rules. A subclass is one file, in this folder or of your own.

    A rule sees its replica's flat memory and its collectives, and nothing of periods. It is
    attached once, when all replicas hold the same parameters. What it keeps for each element of
    the parameters are vectors that it asks for with `anchor` and `momentum`: saving, loading and
    new parameter groups are then taken care of here.

    Attributes:
        agrees: whether rounds end, all or some, with all replicas equal.
        replicas_agree: whether all replicas are known to hold the same parameters, where no round
            is open. Before the first round they are not: weights may have been loaded since.
        needs_loss: whether the training loss must be recorded at every step.
        overlaps: whether what it sends travels behind training; else replicas wait for it.
        centre: name of the anchor that is the consensus; None: the replicas' mean is.
    """

    replica: Replica
    agrees = True
    replicas_agree = False
    needs_loss = False
    overlaps = False
    centre: str | None = None

    def attach(self, replica: Replica) -> None:
        """Allocate what the rule keeps. Called once, by the optimizer. Collective."""
        if hasattr(self, "replica"):
            raise ValueError(
                f"this {type(self).__name__} already belongs to an optimizer: make a new one"
            )
        self.replica = replica
        if self.overlaps:
            replica.use_own_group()
        self._anchors: dict[str, Vector] = {}
        self._momenta: dict[str, Vector] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __getstate__(self) -> dict[str, Any]:
        if hasattr(self, "replica"):
            raise TypeError(
                f"this {type(self).__name__} belongs to an optimizer and cannot be copied: make a "
                "new one"
            )
        return vars(self)

    def anchor(self, name: str, *, wide: bool = True) -> Vector:
        """A vector that starts as the parameters; ``wide``: in float32 for those of 16 bits."""
        self._anchors[name] = self.replica.flat.vector(wide=wide)
        self._anchors[name].copy_(self.replica.flat.params)
        return self._anchors[name]

    def momentum(self, name: str) -> Vector:
        """A vector that starts as zeros."""
        self._momenta[name] = self.replica.flat.vector(wide=True)
        return self._momenta[name]

    def beside(self, params: Sequence[tuple[str, nn.Parameter]]) -> list[Entry]:
        """What the rule wants averaged in the parameters' collective; entries of the layout."""
        return []

    def sends(self, parameters: int, beside: int, itemsize: int) -> list[Sending]:
        """What the ends of rounds send; asked before the rule is attached.

        Args:
            parameters: how many numbers the parameters are.
            beside: how many are averaged beside them: `beside` and buffers.
            itemsize: bytes of a number.
        """
        return [Sending("all_reduce", (parameters + beside) * itemsize)]

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

    def adopt(self) -> None:  # noqa: B027 (most rules average nothing beside)
        """Bring what is averaged beside the parameters into their memory. No collective."""

    @abstractmethod
    def end_round(self) -> None:
        """End the round: the rule's equation. Collective."""

    def land(self) -> None:  # noqa: B027 (most rules leave nothing in flight)
        """Wait for the collective in flight, if any, and take what it brings. Launches none."""

    def enter_consensus(self) -> None:
        """Put into the parameters the model that should be evaluated. Collective."""
        self.land()
        self.replica.mean_(Kind.CONSENSUS, ends_round=False)

    def finish(self) -> None:
        """Make all replicas equal to the consensus, with no collective left in flight."""
        self.land()
        replica = self.replica
        believed = self.replicas_agree and not replica.open
        replica.mean_(Kind.FINISH, ends_round=replica.open, believed_equal=believed)
        self.replicas_agree = True

    @torch.no_grad()
    def start_over(self) -> None:
        """Begin again from the parameters as they are now, with nothing in flight."""
        for vector in self._anchors.values():
            vector.copy_(self.replica.flat.params)
        for vector in self._momenta.values():
            vector.copy_([torch.zeros_like(x) for x in vector.data])
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

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in types that ``torch.load(weights_only=True)`` reads."""
        vectors = {**self._anchors, **self._momenta}
        return {
            "replicas_agree": self.replicas_agree,
            "anchors": list(self._anchors),
            "centre": self.centre,
            "vectors": {name: vector.state_dict() for name, vector in vectors.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.replicas_agree = state["replicas_agree"]
        for name, vector in {**self._anchors, **self._momenta}.items():
            vector.load_state_dict(state["vectors"][name])


def sends_compressed(codec: Codec, parameters: int, beside: int, itemsize: int) -> list[Sending]:
    """What a rule sends whose parameters travel as ``codec`` writes them, in whole blocks."""
    blocks = -(-parameters // codec.block)
    return [
        Sending("shards", codec.size(blocks * codec.block)),
        Sending("all_reduce", beside * itemsize),
    ]


def check_outer_momentum(eta: float) -> None:
    """Raise `ValueError` for an outer SGD whose momentum η diverges."""
    if not 0 <= eta < 1:
        raise ValueError(f"the outer momentum is {eta}: it must lie in [0, 1), or it diverges")


def check_outer_lr(zeta: float, eta: float, *, nesterov: bool) -> None:
    """Raise `ValueError` for an outer SGD of rate ζ and momentum η that diverges on long rounds.

    A long round reaches its optimum x*, and Δ = z - x*. Then z is stable for η < 1 and
    ζ < 2 (1 + η), with Nesterov momentum ζ < 2 (1 + η) / (1 + 2 η).
    """
    bound = 2 * (1 + eta) / (1 + 2 * eta) if nesterov else 2 * (1 + eta)
    if not 0 < zeta < bound:
        raise ValueError(
            f"the outer learning rate is {zeta}: with momentum {eta:g} it must lie between 0 and "
            f"{bound:.3g}, or long rounds diverge"
        )
