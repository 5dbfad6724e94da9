"""LocalOptimizer: a torch optimizer around any torch optimizer, with few synchronisations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .around import Around
from .boundary import Boundary
from .buffers import BufferPolicy
from .calls import Calls, one_at_a_time, with_own_hooks
from .checks import check_group, check_inner, check_modes
from .collective import Collective
from .consensus import Consensus
from .errors import Warnings
from .layout import Layout
from .replica import Replica
from .report import SyncReport
from .saved import add_own, check_own, check_whole, own_state, without_own
from .sync import Average, Rule
from .traffic import Traffic


class LocalOptimizer(Around):
    """H local steps of ``inner`` on every replica, then a synchronisation; again and again.

    x_i ← inner step on x_i's own gradients, H times; then the rule, by default x_i ← x̄.

    It is a `torch.optim.Optimizer`: parameter groups, state, hooks, learning-rate schedulers,
    closures, `state_dict` and ``torch.amp.GradScaler`` behave as with the inner optimizer.
    Building it is collective: all ranks compare their layouts, parameters move into flat
    buffers, and all replicas start from rank 0's parameters. Load per-replica weights after
    that, not before. Without torch.distributed, or with one replica, `Average` is the inner
    optimizer, bit for bit.

    Replicas know which parameter is which by its name. Give ``model`` (or named parameters):
    without names it is their order that counts, which must be the same on all ranks, and that of
    ``set`` is not.

    Args:
        inner: the optimizer that makes the local steps.
        period: when to synchronise: ``(step, lr) -> H``, asked at a round's first step with the
            learning rate of parameter group 0.
        sync: how to synchronise; `Average` by default. A rule belongs to one optimizer.
        model: the module, so that its buffers are cared for and errors name its parameters.
        buffers: what is done to the model's buffers whenever parameters are averaged in place (at
            every synchronisation, under rules whose replicas agree; else in `consensus` and
            `finish`): "keep" each replica's own, "average" the floating-point ones, or "broadcast"
            rank 0's.
        process_group: the replicas; the default group if None.
        auto: whether `step` calls `average` itself.
        track_drift: whether to measure `drift` (one read of the parameters before and after).
        check_finite: whether a synchronisation looks for NaN and infinity (one read).
        alone: to train this process by itself, whatever process groups there are.

    Raises:
        ValueError: for settings or parameters that cannot work.
        RuntimeError: if the launcher has started several processes (WORLD_SIZE), and
            torch.distributed is not initialised: replicas would never meet.
        LayoutMismatchError: if the ranks were built differently.
        AbsentRankError: if one does not arrive.
    """

    def __init__(
        self,
        inner: Optimizer,
        period: Callable[[int, float], int],
        sync: Rule | None = None,
        *,
        model: nn.Module | None = None,
        buffers: BufferPolicy = "keep",
        process_group: dist.ProcessGroup | None = None,
        auto: bool = True,
        track_drift: bool = False,
        check_finite: bool = True,
        alone: bool = False,
    ) -> None:
        if isinstance(inner, LocalOptimizer):
            raise ValueError("the inner optimizer is a LocalOptimizer already")
        check_inner(inner, period)
        check_group(process_group, alone=alone)
        super().__init__(inner)
        self.period = period
        self.sync = sync if sync is not None else Average()
        if not isinstance(self.sync, Rule):
            what = f"{self.sync!r}{': call it' * isinstance(self.sync, type)}"
            raise TypeError(f"sync must be a rule such as Average(), not {what}")
        self.auto = auto
        self._collective = Collective(process_group, alone=alone)
        check_modes(inner, self.sync, self._collective)
        self._calls = Calls(self._collective.rank)
        self._warnings = Warnings(self._collective.rank)
        looks = {"check_finite": check_finite, "track_drift": track_drift}
        self._layout = Layout(
            inner, period, self.sync, model, buffers, self._collective, {**looks, "auto": auto}
        )
        flat, buffers_ = self._layout.build(first=True)
        self._replica = Replica(
            flat, self._collective, buffers_, inner, levels=self.sync.levels(self._collective),
            name=self._layout.describe(type(self)), **looks,
        )  # fmt: skip
        self._replica.equalise()
        self.sync.attach(self._replica)
        self._boundary = Boundary(
            inner, self._layout, self._replica, self.sync, self._warnings
        )
        self._consensus = Consensus(self._replica, self.sync)

    @one_at_a_time
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, between rounds, on all ranks alike. Collective: the buffers are rebuilt.

        Where it is refused, the optimizer is as it was.

        Raises:
            RuntimeError: in the middle of a round.
            ValueError: if the parameters cannot live in flat buffers.
            ReplicaMismatchError: if another rank makes another call.
            LayoutMismatchError: if another rank adds another group.
        """
        self._refuse("add_param_group()")
        clock = self._replica.round
        if clock.open:
            raise RuntimeError(
                f"add_param_group at step {clock.step}, {clock.remaining} steps before the "
                "round ends: add groups between rounds (when .synced), or call finish() first"
            )
        self.sync.land()
        self._layout.add(self._replica, param_group)
        self.sync.relayout()

    # When: where the round is.

    @property
    def synced(self) -> bool:
        """Whether no round is open: under `Average`, whether all replicas are equal."""
        return not self._replica.round.open

    @property
    def h(self) -> int:
        """H of the open round, or of the last one."""
        return self._replica.round.h

    @property
    def round(self) -> int:
        """Rounds finished."""
        return self._replica.round.number

    @property
    def traffic(self) -> Traffic:
        """Synchronisations, bytes and seconds of this rank."""
        return self._replica.meeting.meter.traffic

    @property
    def report(self) -> SyncReport | None:
        """What the replicas reported at the last synchronisation; None before the first.

        Where the collective runs behind training, it is of the synchronisation before that, for
        that is the last one that has arrived.
        """
        return self._replica.meeting.reports.last

    @property
    def drift(self) -> float | None:
        """Spread of the replicas, as in `report`; None if not tracked.

        sqrt((1/m) Σ_i |x_i - x̄|²), in the units of the parameters, just before the
        synchronisation; where a rule pulls replicas first, after its pull. It is computed from
        norms: in float32 it cannot resolve a spread below about 1e-5 of the parameters' norm.
        """
        return None if self.report is None else self.report.drift

    @with_own_hooks
    @one_at_a_time
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one local step; if ``auto``, end the round when it is due.

        Args:
            closure: as for the inner optimizer.

        Returns:
            What the inner step returns (the closure's loss, or None).

        Raises:
            SyncError: when a round ends on replicas that do not fit; see `average`.
        """
        clock = self._replica.round
        if self._replica.lost is not None or self._consensus.inside:
            self._refuse("step()")
        if not clock.open:
            self._boundary.begin(self.period)
        elif not clock.remaining:
            clock.extend()
        self.sync.before_step()
        lr = self.inner.param_groups[0].get("lr", math.nan)
        self._boundary.check_rate(self.period, lr)
        loss = self._inner_step(closure)
        self._boundary.counts()
        clock.record_lr(lr)
        if _is_number(loss) and not clock.has_loss:
            self.record_loss(loss)
        if self.auto:
            self._average()
        return loss

    @one_at_a_time
    def average(self) -> bool:
        """Count one local step; end the round if it was the last. Collective then.

        `step` calls it, unless ``auto`` is off. Call it too where one replica skips a step that
        the others make (`GradScaler` does not: its skipped steps count by themselves).

        Where a synchronisation has failed, parameters are what they were before it (or NaN, if it
        had begun to overwrite them, and then no call goes on). It is owed: `average` makes it, also
        in a resumed run; otherwise the round is one step longer.

        Returns:
            Whether the round has ended.

        Raises:
            ReplicaMismatchError: if the ranks do not fit: other steps, H, learning rates,
                optimizers, or weights where they should have been equal.
            NonFiniteError: if a replica holds NaN or infinity.
            SyncError: if another rank has gone.
        """
        self._refuse("average()")
        if not self._replica.round.open:
            # The inner optimizer has stepped, behind this one's back.
            self._boundary.begin(self.period, stepped=True)
        self._boundary.counts()
        return self._average()

    def _average(self) -> bool:
        clock = self._replica.round
        if clock.remaining:
            self._boundary.check_loss()
            clock.count_step()
            self.sync.poll()
            self.sync.after_step()
        if clock.remaining > 0:
            return False
        self._boundary.end()
        return True

    def _refuse(self, call: str) -> None:
        self._replica.check_not_lost()
        if self._consensus.inside:
            raise RuntimeError(f"{call} inside consensus(): the model is not the replica's own now")

    def record_loss(self, loss: Tensor | float) -> None:
        """Take note of this step's training loss, one number, before `step` or `average` counts it.

        `step` does so itself with a closure's. Stays on the device: no host synchronisation. Its
        mean over the round is what `report` has of each replica, and what `LSGD` goes by.

        Raises:
            RuntimeError: if this step has one already.
        """
        clock = self._replica.round
        if clock.has_loss:
            raise RuntimeError(
                f"step {clock.step + 1} on rank {self._collective.rank} has a loss already: record "
                "one number for each step, the mean where a step accumulates gradients"
            )
        clock.record_loss(loss)

    def start_at(self, step: int) -> None:
        """Count steps from ``step``: for a run that starts inside a schedule, from given weights.

        The period sees these numbers. All ranks must say the same.

        Raises:
            RuntimeError: after the first step.
        """
        clock = self._replica.round
        if clock.number or clock.open:
            raise RuntimeError(f"start_at({step}) after {clock.step} steps: call it first")
        clock.start_at(step)

    # The model to evaluate, and the end.

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Within the context the model holds what should be evaluated. Collective.

        The mean of the replicas, which under `Average` they all are already between rounds; under
        `EASGD` the centre. On exit parameters and buffers are what they were, and an optimizer
        with two modes is in the one it was in (``train_mode``). Its traffic is counted apart
        (``traffic.other_bytes``).

        Raises:
            RuntimeError: if nested.
            ReplicaMismatchError: if another rank makes another call.
        """
        with ExitStack() as leaving:
            with self._calls.alone("consensus"):
                self._refuse("consensus()")
                self._consensus.enter(leaving)
            yield

    @one_at_a_time
    def finish(self) -> None:
        """End the open round now and wait for collectives in flight: the replicas agree.

        Collective; always makes one exchange, which shows whether every rank is here. Replicas
        that should have been equal and are not, for one has changed its weights since the last
        round, become equal all the same, with a warning.

        Raises:
            ReplicaMismatchError: if another rank is elsewhere, such as in its next round.
        """
        self._refuse("finish()")
        replica = self._replica
        self.sync.finish()
        if replica.round.open:
            replica.end_round()

    # Saving: one state per rank.

    @torch._disable_dynamo
    @one_at_a_time
    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's ``state`` and ``param_groups``, and what is this replica's own.

        Each rank has its own: save one file per rank, with that rank's model weights. That is
        in the first parameter group, so that it also passes through
        ``torch.distributed.checkpoint.state_dict``; ``torch.distributed.checkpoint.save`` keeps
        one rank's tensors only: see `localopt.integrations.dcp`.

        Raises:
            NonFiniteError: if this replica holds NaN or infinity (with ``check_finite``), so that
                it does not replace what was saved before.
            SyncError: if a collective that is in flight has failed.
            RuntimeError: inside `consensus`, where the model is not what belongs to this state.
        """
        self._refuse("state_dict()")
        self.sync.land()
        if self._replica.meeting.check_finite:
            self._replica.check_finite_here()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self.inner.state_dict()
        add_own(state, self._replica, self.sync)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = changed if changed is not None else state
        return state

    @torch._disable_dynamo
    @one_at_a_time
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that `state_dict` gave on this rank.

        A state of the bare inner optimizer is taken too; then the first round begins.

        Raises:
            ValueError: if the state is of another version, rule, or, in mid-round, of another
                rank or number of replicas; or if a part of it is missing.
        """
        if self._consensus.inside:
            self._refuse("load_state_dict()")
        state = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = changed if changed is not None else state
        own = own_state(state)
        if own is not None:
            check_own(own, self.sync, self._collective, self._warnings)
            self.sync.check_state(own["sync"])
        check_whole(state, own)
        self.inner.load_state_dict(without_own(state))
        self._replica.recover()
        self.sync.drop()  # what is in flight belongs to the run that is left
        if own is None:
            self._replica.start_over()
            self.sync.start_over()
        else:
            self._replica.load_state_dict(own["replica"])
            self.sync.load_state_dict(own["sync"])
            if own["world_size"] != self._collective.world_size:
                self._replica.meeting.forget_others()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r}, {self.period!r}, sync={self.sync!r})"


def _is_number(loss: Any) -> bool:
    """Whether a closure has returned one number, as a loss should be."""
    return loss.numel() == 1 if isinstance(loss, Tensor) else hasattr(loss, "__float__")
