"""Where a round begins, and where it ends."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .elsewhere import warning_of
from .errors import Warnings
from .layout import Layout
from .replica import Replica
from .sync import Rule


class Boundary:
    """What is looked at before a round's first step, and done after its last.

    Args:
        inner: the optimizer that makes the local steps.
        layout, replica, sync: what they look at, and what ends the round.
        warnings: what gives them.
    """

    def __init__(
        self,
        inner: Optimizer,
        layout: Layout,
        replica: Replica,
        sync: Rule,
        warnings: Warnings,
    ) -> None:
        self._inner, self._layout, self._replica, self._sync = inner, layout, replica, sync
        self._warnings = warnings
        self._looks = 3
        self._asked = 0, math.nan  # step and rate at which H was asked for
        self._highest = math.nan  # rate of the round at which it has been asked for again
        self._uncounted = 0  # steps of the inner optimizer
        if replica.collective.world_size > 1 and hasattr(inner, "_optimizer_step_post_hooks"):
            this = weakref.ref(self)

            def stepped(*_: object) -> None:
                if (boundary := this()) is not None:
                    boundary._inner_stepped()

            inner.register_step_post_hook(stepped)

    def begin(self, period: Callable[[int, float], int], *, stepped: bool = False) -> None:
        """Choose H and begin a round; ``stepped``: its first step has been made already."""
        clock, flat = self._replica.round, self._replica.flat
        flat.check_pointers()
        self._layout.check_model()
        if clock.number == 0:
            self._sync.begin()
        lr = float(self._inner.param_groups[0].get("lr", math.nan))
        h = period(clock.step, lr)
        if not isinstance(h, int) or not 1 <= h < 2**63:
            raise ValueError(f"period gave H = {h!r} at step {clock.step}: not a positive int")
        several = self._replica.collective.world_size > 1
        self._asked, self._highest = (clock.step, lr), lr if several else math.nan
        total = getattr(period, "total_steps", None)
        if several and total is not None and clock.step >= total:
            self._warnings.once(
                "past the end",
                f"step {clock.step} is past the end that the period was given, total_steps = "
                f"{total}: every step is a round now. It counts optimizer steps, of all epochs",
            )
        # An optimizer with two modes changes weights between rounds, and back.
        same = not stepped and not hasattr(self._inner, "eval")
        equal = same and self._sync.replicas_agree and several
        clock.begin(h, start=flat.sample() if equal else 0)

    def check_rate(self, period: Callable[[int, float], int], lr: Any) -> None:
        """Warn where H was chosen at a rate that was still rising: a warm-up gives no long round.

        Args:
            period: what chose H.
            lr: the rate of the step that is about to be made.
        """
        # A tensor of a GPU is not read for this; of a rate that has doubled H is asked for again.
        if isinstance(lr, Tensor) or not lr > 2 * self._highest:
            return
        clock, (began, first) = self._replica.round, self._asked
        self._highest = lr
        if 2 * (h := period(began, lr)) <= clock.h:
            self._warnings.once(
                "rising rate",
                f"the learning rate has risen from {first:.3g} to {lr:.3g} by step {clock.step}, "
                f"in the middle of a round of {clock.h} steps; begun at the rate of now it would "
                f"have had {h}. Give the period warmup_steps, the steps of the warm-up, in which "
                "rounds are short; where rates rise later, h_max",
            )

    def end(self) -> None:
        """Let the rule end the round. Collective."""
        replica, clock, meeting = self._replica, self._replica.round, self._replica.meeting
        replica.flat.check_pointers()  # before the rule pulls what lives there no more
        self._sync.end_round()
        meeting.reports.show_landed()
        replica.end_round(next_loss=True)  # recorded before what was owed
        if meeting.uneven:
            self._warnings.once(
                "uneven",
                f"in the {clock.h} steps of the round that ended at step {clock.step} replicas "
                f"have made different numbers of backward passes, by rank {meeting.uneven}. Where "
                "a step is skipped, as by a guard against NaN or DeepSpeed's check for overflow, "
                "call average() in its place, so that it counts",
            )
        if meeting.alike and self._looks:
            self._looks -= 1  # it costs tens of milliseconds
            self._look_elsewhere()

    def counts(self) -> None:
        """The step that the inner optimizer has made counts; it may make the next one."""
        self._uncounted = 0

    def _inner_stepped(self) -> None:
        """Warn of an inner optimizer that steps by itself."""
        self._uncounted += 1
        if self._uncounted == 2:
            self._warnings.once(
                "uncounted",
                f"the inner optimizer, {type(self._inner).__name__}, has made two steps that do "
                "not count, so replicas never meet: call step() of the optimizer around it, or "
                "that one's average() after each step",
            )

    def check_loss(self) -> None:
        """Raise `RuntimeError` if a step that is counted lacks the loss that the rule needs."""
        clock = self._replica.round
        if self._sync.needs_loss and not clock.has_loss:
            raise RuntimeError(
                f"{type(self._sync).__name__} needs the training loss of every step, and step "
                f"{clock.step + 1} on rank {self._replica.collective.rank} has none: call "
                "step(closure), or optimizer.record_loss(loss) before step()"
            )

    def _look_elsewhere(self) -> None:
        """Warn if somebody else averages the gradients, so that replicas never part."""
        clock, last = self._replica.round, self._replica.meeting.reports.last
        params = [p for _, p in self._replica.flat.named]
        losses = [] if last is None else last.losses
        if clock.last_lr > 0 and (text := warning_of(params, losses, clock.h, clock.step)):
            self._warnings.once("elsewhere", text)
