"""What a synchronisation rule is: what it declares, and what it does when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from ..collective import Across, Collective
from ..compression import codec
from ..entry import Entry
from ..header import Kind
from ..replica import Replica
from ..traffic import Sending
from ..transport import InPlace
from .parts import Parts


class Rule(Parts, ABC):
    """Base of the rules. A subclass is one file, in this folder or of your own.

    A rule sees its replica, and nothing of periods. It is attached once, when all replicas hold the
    same parameters. What it keeps and what it sends are parts that it asks for when it is attached
    (`anchor`, `zeros`, `outer_step`, `mean_of_copies`, `mean_change`): saving, loading and new
    parameter groups are then taken care of here.

    Attributes:
        agrees: whether rounds end, all or some, with all replicas equal.
        needs_loss: whether the training loss must be recorded at every step.
        was_named: by which other name states of this rule were saved.

    The others are those of `Parts`.
    """

    agrees = True
    needs_loss = False
    was_named: str | None = None

    # What it declares; asked before it is attached.

    def levels(self, everyone: Collective) -> Sequence[Collective]:
        """Whom with headers are exchanged at a meeting, one after another."""
        return [everyone]

    def sums(self, everyone: Collective) -> Sequence[Collective | Across]:
        """The sums that one after another make the sum over all replicas."""
        return [everyone]

    def extra(self, params: Sequence[tuple[str, nn.Parameter]]) -> list[Entry]:
        """What the rule wants averaged in the parameters' collective; entries of the layout."""
        return []

    def sends(self, parameters: int, extra: int, itemsize: int) -> list[Sending]:
        """What the ends of rounds send.

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

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # What happens when.

    def attach(self, replica: Replica) -> None:
        """Allocate what the rule keeps. Called once, by the optimizer. Collective."""
        super().attach(replica)
        self.in_place = InPlace(replica, self.sums(replica.collective))

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

    def before_step(self) -> None:
        """A local step within a round comes. What was due before it, and has failed, is owed."""

    def after_step(self) -> None:
        """A local step is done. No collective."""

    def adopt(self) -> None:
        """Bring what is averaged with the parameters into their memory. No collective."""

    @abstractmethod
    def end_round(self) -> None:
        """End the round: the rule's equation. Collective."""

    def land(self) -> None:
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
