"""What a synchronisation rule is: the end of a round, and what it keeps between rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..flat import Entry

if TYPE_CHECKING:
    from ..replica import Replica


class Rule(ABC):
    """Base of the rules. A subclass is one file in this folder.

    A rule sees its replica's flat memory and its collectives, and nothing of periods. It is
    attached once, when all replicas hold the same parameters.
    """

    replica: Replica

    # Whether all replicas hold the same parameters when a round has ended.
    replicas_agree = True

    def attach(self, replica: Replica) -> None:
        """Allocate what the rule keeps. Called once, by the optimizer."""
        if hasattr(self, "replica"):
            raise ValueError(
                f"this {type(self).__name__}() already belongs to an optimizer: make a new one"
            )
        self.replica = replica

    def beside(self, params: Sequence[tuple[str, nn.Parameter]]) -> list[Entry]:
        """What the rule wants averaged in the parameters' collective; entries of the layout."""
        return []

    def record_loss(self, loss: Tensor) -> None:  # noqa: B027 (most rules need no loss)
        """Take note of a step's training loss. No host synchronisation."""

    @abstractmethod
    def end_round(self) -> None:
        """End the round: the rule's equation. Collective."""

    def enter_consensus(self) -> None:
        """Put into the parameters the model that should be evaluated. Collective."""
        self.replica.average_for_consensus()

    def finish(self) -> None:
        """Make all replicas equal to the consensus, with no collective left in flight."""
        self.replica.finish_at_mean()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in types that ``torch.load(weights_only=True)`` reads."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `state_dict` gave."""
