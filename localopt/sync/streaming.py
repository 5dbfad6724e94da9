"""Streaming: a fragment of the parameters at a time, each at its own step of the round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from ..compression import Codec, codec
from ..flat import pull_
from ..outer import Maker, Outer
from ..replica import Replica
from ..traffic import Sending
from .rule import Rule


@dataclass(eq=False)
class Streaming(Rule):
    """Synchronise K fragments of the parameters one after another, evenly spread over the round.

    Fragment k is due after local step ⌈(k + 1) H / K⌉ of a round; of it alone, Δ = z - x̄:
        v ← μ v + Δ;  z ← z - ζ (Δ + μ v);  x_i ← (1 - α) x_i + α z.

    Each sends 1/K of what a round sends, so that is all that the link has to carry at once.
    With a ``delay`` of τ steps x̄ is that of τ steps before, and has travelled behind training
    since; where a fragment's turn is not longer than that, it is launched in the turn's first step.
    With ``overlap`` it is launched when the fragment is due, and used when the next one is. α < 1
    keeps a part of what replica i did in between.

    Fragments are cut to equal size in the order of the parameters, across layers where need be.
    With ζ = 1 and μ = 0 this is averaging by fragments; K = 1 without delay is `DiLoCo`. Replicas
    never agree, except so; what is evaluated is their mean. Where H < K several fragments are due
    at one step. Momentum supposes rounds of one length, as `BlockMomentum` explains.

    Args:
        fragments: K, how many.
        outer_lr: ζ, the outer learning rate.
        outer_momentum: μ, Nesterov's, in [0, 1).
        overlap: whether a fragment travels until the next one is due.
        alpha: α, in (0, 1]; None for 1, or 0.5 where fragments travel behind training.
        delay: τ, local steps between a fragment's launch and its use.
        outer: another outer step: makes the optimizer, as for `BlockMomentum`.
        compress: None, "bf16" or "int8": send Δ in half or a quarter of the bytes, with error
            feedback, as `Average` does; or a codec of `localopt.compression`. It is waited for.

    Attributes:
        outer_optimizer: what makes the outer step, once a `LocalOptimizer` has this rule; None
            where that is averaging.

    Raises:
        ValueError: for settings outside these, or that diverge where rounds are long.

    Source: Douillard et al., arXiv 2501.18512 (Streaming DiLoCo); there α is the other weight.
    """

    agrees = False

    fragments: int
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    overlap: bool = False
    alpha: float | None = None
    delay: int = 0
    outer: Maker | None = None
    compress: str | Codec | None = None

    def __post_init__(self) -> None:
        for name, least in (("fragments", 1), ("delay", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"Streaming: {name} is {value!r}: it must be an integer")
            if value < least:
                raise ValueError(f"Streaming: {name} is {value}: there must be at least {least}")
        if self.overlap and self.delay:
            raise ValueError(f"Streaming: overlap and delay {self.delay} exclude each other")
        if codec(self.compress) and self.overlaps:
            raise ValueError("Streaming: what is compressed cannot travel behind training")
        if self.alpha is None:
            self.alpha = 0.5 if self.overlaps else 1.0
        if not 0 < self.alpha <= 1:
            raise ValueError(f"Streaming: alpha is {self.alpha}: it must lie in (0, 1]")
        plain = (self.outer_lr, self.outer_momentum) == (1.0, 0.0)
        if self.outer is not None and not plain:
            raise ValueError("Streaming: outer has settings of its own: no outer_lr, no momentum")
        mu = self.outer_momentum
        nesterov = partial(SGD, lr=self.outer_lr, momentum=mu, nesterov=mu > 0)
        # None: z ← x̄ to the last bit, which z - Δ is not.
        averages = plain and self.outer is None and self.compress is None
        self._step = None if averages else Outer(self.outer or nesterov)

    @property
    def overlaps(self) -> bool:  # type: ignore[override]
        return self.overlap or self.delay > 0

    def sends(self, parameters: int, extra: int, itemsize: int) -> list[Sending]:
        return super().sends(parameters, 0, itemsize)  # in all: K fragments

    def attach(self, replica: Replica) -> None:
        super().attach(replica)
        self.z = self.anchor("z")
        start = None if self._step is None else self.z
        self.mean = self.mean_of_copies(self.fragments, start=start)
        self.outer_optimizer = None if self._step is None else self.outer_step(self._step)
        self._sent = 0  # fragments of this round
        self._flying = 0  # the fragment that was launched last
        self._moved: int | None = None  # whose z has moved, but x not yet
        self._settings: list[dict[str, Any]] | None = None  # the outer step's, at that launch

    def stepped(self) -> dict[str, Tensor]:
        """z, by fragment and parameter."""
        pieces = [self.mean.pieces(self.z.data, k) for k in range(self.fragments)]
        return {name: piece for some in pieces for name, piece in some.items()}

    def before_step(self) -> None:
        self._stream()

    def after_step(self) -> None:
        if self.replica.round.remaining:
            self._stream()

    def end_round(self) -> None:
        self._stream()
        self._sent = 0
        self.replicas_agree = self.fragments == 1 and not self.overlap and self.alpha == 1

    def _stream(self) -> None:
        """Launch the fragments whose time has come, and use those that are due."""
        done, last = self.replica.round.done, self.fragments - 1
        while self._sent <= last and self._launched_after(self._sent) <= done:
            self._use()
            k = self._sent
            # Those of now: whoever looks at the state lets a fragment land earlier.
            self._settings = None if self._step is None else self._step.groups()
            self.mean.launch(self._settings, fragment=k, ends_round=k == last)
            self._flying = k
            if not self.overlaps:
                self._use()
            self._sent = k + 1  # where what is waited for has failed it is owed
        if self.delay and self._sent and self._due_after(self._sent - 1) <= done:
            self._use()

    def _due_after(self, k: int) -> int:
        """Local steps of the round after which fragment k is due."""
        return -(-(k + 1) * self.replica.round.h // self.fragments)

    def _launched_after(self, k: int) -> int:
        due = self._due_after(k)
        return max(due - self.delay, min(self._due_after(k - 1) + 1, due))

    def _use(self) -> None:
        """What has been launched moves z, and x_i."""
        self.land()
        if self._moved is not None:
            k, self._moved = self._moved, None
            x, z = self.replica.flat.params, self.z.data
            assert self.alpha is not None
            with torch.no_grad():
                pull_(self.mean.of(x, k), self.mean.of(z, k), self.alpha)

    @torch.no_grad()
    def land(self) -> None:
        mean, k = self.mean.land(), self._flying
        if mean is None:
            return
        if self._step is not None:
            self._step.step(self.mean.landed_pieces(k), groups=self._settings)
        else:
            for z, average in zip(self.mean.of(self.z.data, k), mean, strict=True):
                z.copy_(average)
        self._moved = k

    def finish(self) -> None:
        """Make the replicas equal to their mean; the anchor goes on from there."""
        super().finish()
        self._moved, self._sent = None, 0

    def start_over(self) -> None:
        super().start_over()
        self._moved, self._sent = None, 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "moved": self._moved, "sent": self._sent}

    def check_state(self, state: Mapping[str, Any]) -> None:
        if self._step is not None and "outer" not in state:  # version 4 or less
            self._step.check_momentum()
            state = {**state, **self._step.state_dict()}
        super().check_state(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._step is not None and "outer" not in state:  # version 4 or less
            state = {**state, **self._outer_state(state["vectors"].get("v"))}
        super().load_state_dict(state)
        # Replicas that agree, as those of a merged state do, are where z is.
        self._moved = None if state["replicas_agree"] else state["moved"]
        clock = self.replica.round
        done = clock.done * self.fragments // max(1, clock.h)
        sent = state.get("sent", done)  # not in version 3
        self._sent = sent if clock.open else 0

    def _outer_state(self, momentum: Mapping[str, Tensor] | None) -> dict[str, Any]:
        """The outer step's state, from the momentum of each parameter."""
        assert self._step is not None
        self._step.start_over()
        if momentum is not None:
            v = self.replica.flat.vector(wide=True)
            v.load_state_dict(momentum)
            pieces = [self.mean.pieces(v.data, k) for k in range(self.fragments)]
            self._step.set_momentum({n: piece for some in pieces for n, piece in some.items()})
        return self._step.state_dict()
