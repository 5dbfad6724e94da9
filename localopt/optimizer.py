"""LocalOptimizer: a torch optimizer around any torch optimizer, with few synchronisations."""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .around import Around
from .buffers import BufferPolicy, Buffers
from .calls import one_at_a_time, with_own_hooks
from .checks import (
    check_group,
    check_inner,
    check_modes,
    check_order,
    described,
    homes_of,
    named_parameters,
)  # fmt: skip
from .collective import Collective
from .elsewhere import warning_of
from .faults import control
from .flat import Flat, entries_of
from .header import Kind
from .meeting import modes_of
from .replica import Replica
from .report import SyncReport
from .saved import KEY, STATE_VERSION, check_own, check_whole, has_state, own_state, without_own
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
            raise TypeError(f"sync must be a rule such as Average(), not {self.sync!r}")
        self.auto = auto
        self._collective = Collective(process_group, alone=alone)
        check_modes(inner, self.sync, self._collective)
        self._busy, self._caller = threading.RLock(), ""
        self._told: set[str] = set()
        self._looks = 3
        self._model, self._policy = model, buffers
        self._options = {"check_finite": check_finite, "track_drift": track_drift}
        self._in_consensus = False
        flat, buffers_ = self._build(first=True)
        self._replica = Replica(
            flat, self._collective, buffers_, inner, levels=self.sync.levels(self._collective),
            name=self._name(), **self._options,
        )  # fmt: skip
        self._replica.equalise()
        self.sync.attach(self._replica)

    def _build(self, *, first: bool = False) -> tuple[Flat, Buffers]:
        """Compare layouts, and move the parameters into flat buffers. Collective."""
        named = named_parameters(self.inner, self._model)
        buffers = Buffers(self._model, self._policy, [p for _, p in named])
        extra = [*self.sync.extra(named), *buffers.entries()]
        settings = {**self._options, "buffers": self._policy, "auto": self.auto}
        lines = [
            f"rule {described(self.sync)}",
            f"period {described(self.period)}",
            f"inner optimizer {type(self.inner).__name__}",
            *(f"{key} {value}" for key, value in settings.items()),
            *map(str, entries_of(named, extra)),
            *map(str, extra),
            *buffers.described(),
        ]
        control.agree(self._collective, lines, control.TIMEOUT)
        if first and self._model is None:
            check_order(self._collective, self.inner, named)
        # Nothing has been changed up to here.
        self._homes = homes_of(self._model, {id(p) for _, p in named})
        return Flat(named, extra, self._collective.world_size), buffers

    def _name(self) -> str:
        named = named_parameters(self.inner, self._model)
        numbers = sum(p.numel() for _, p in named)
        return f"{type(self).__name__} of {numbers} parameters, the first of them {named[0][0]}"

    def _refuse_thread(self, call: str) -> None:
        raise RuntimeError(
            f"{call}() on rank {self._collective.rank}, while another thread is in "
            f"{self._caller}(): call it from the thread that trains, between steps"
        )

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._told:
            self._told.add(about)
            warnings.warn(f"rank {self._collective.rank}: {text}", stacklevel=3)

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
        replica = self._replica
        clock = replica.round
        if clock.open:
            raise RuntimeError(
                f"add_param_group at step {clock.step}, {clock.remaining} steps before the "
                "round ends: add groups between rounds (when .synced), or call finish() first"
            )
        self.sync.land()
        groups, homes = len(self.inner.param_groups), self._homes
        own, buffers = replica.flat, replica.buffers.snapshot()
        try:
            problem = self._problem_with(param_group)
            replica.meet(Kind.ADD_GROUP, count="other")
            control.agree(
                self._collective, [f"a group that is {problem or 'fit'}"], control.TIMEOUT
            )
            if problem is not None:
                raise problem
            new, new_buffers = self._build()
            replica.equalise(new, new_buffers)
        except BaseException:
            del self.inner.param_groups[groups:]
            self._homes = homes
            own.take_back()
            raise
        with torch.no_grad():
            for name, p in new.named:
                if name in own.views:  # replicas may differ: only new ones start as rank 0's
                    p.copy_(own.views[name])
            new_buffers.restore(buffers)
        replica.relayout(new, new_buffers)
        self.sync.relayout()

    def _problem_with(self, param_group: dict[str, Any]) -> Exception | None:
        """Add the group to the inner optimizer; why it cannot be, if so."""
        try:
            self.inner.add_param_group(param_group)
            named = named_parameters(self.inner, self._model)
            entries_of(named, self.sync.extra(named))
        except Exception as error:  # whatever the inner optimizer objects to
            return error
        return None

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
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one local step; if ``auto``, end the round when it is due.

        Args:
            closure: as for the inner optimizer.

        Returns:
            What the inner step returns (the closure's loss, or None).

        Raises:
            SyncError: when a round ends on replicas that do not fit; see `average`.
        """
        clock = self._replica.round
        if self._replica.lost is not None or self._in_consensus:
            self._refuse("step()")
        if not clock.open:
            self._begin_round()
        elif not clock.remaining:
            clock.extend()
        self.sync.before_step()
        lr = self.inner.param_groups[0].get("lr", math.nan)
        loss = self._inner_step(closure)
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
            self._begin_round(stepped=True)  # by the inner optimizer, behind this one's back
        return self._average()

    def _average(self) -> bool:
        clock = self._replica.round
        if clock.remaining:
            self._check_loss()
            clock.count_step()
            self.sync.poll()
            self.sync.after_step()
        if clock.remaining > 0:
            return False
        self._end_round()
        return True

    def _end_round(self) -> None:
        replica, clock, meeting = self._replica, self._replica.round, self._replica.meeting
        replica.flat.check_pointers()  # before the rule pulls what lives there no more
        self.sync.end_round()
        meeting.reports.show_landed()
        replica.end_round(next_loss=True)  # recorded before what was owed
        if meeting.uneven:
            self._warn_once(
                "uneven",
                f"in the {clock.h} steps of the round that ended at step {clock.step} replicas "
                f"have made different numbers of backward passes, by rank {meeting.uneven}. Where "
                "a step is skipped, as by a guard against NaN or DeepSpeed's check for overflow, "
                "call average() in its place, so that it counts",
            )
        if meeting.alike and self._looks:
            self._looks -= 1  # it costs tens of milliseconds
            self._look_elsewhere()

    def _look_elsewhere(self) -> None:
        """Warn if somebody else averages the gradients, so that replicas never part."""
        clock, params = self._replica.round, [p for _, p in self._replica.flat.named]
        losses = [] if self.report is None else self.report.losses
        if clock.last_lr > 0 and (text := warning_of(params, losses, clock.h, clock.step)):
            self._warn_once("elsewhere", text)

    def _check_loss(self) -> None:
        clock = self._replica.round
        if self.sync.needs_loss and not clock.has_loss:
            raise RuntimeError(
                f"{type(self.sync).__name__} needs the training loss of every step, and step "
                f"{clock.step + 1} on rank {self._collective.rank} has none: call "
                "step(closure), or optimizer.record_loss(loss) before step()"
            )

    def _begin_round(self, *, stepped: bool = False) -> None:
        clock, flat = self._replica.round, self._replica.flat
        flat.check_pointers()
        self._check_model()
        if clock.number == 0:
            self.sync.begin()
        h = self.period(clock.step, float(self.inner.param_groups[0].get("lr", math.nan)))
        if not isinstance(h, int) or not 1 <= h < 2**63:
            raise ValueError(f"period gave H = {h!r} at step {clock.step}: not a positive int")
        # An optimizer with two modes changes weights between rounds, and back.
        same = not stepped and not hasattr(self.inner, "eval")
        equal = same and self.sync.replicas_agree and self._collective.world_size > 1
        clock.begin(h, start=flat.sample() if equal else 0)

    def _check_model(self) -> None:
        """Raise `RuntimeError` if the model has got other Parameters than the optimizer's."""
        for name, home, key, p in self._homes:
            if home.get(key) is not p:
                raise RuntimeError(
                    f"the model's parameter {name} is no longer the one that the optimizer has: "
                    "load_state_dict(assign=True) or an assignment replaced it. Do that before "
                    "building the optimizer"
                )

    def _refuse(self, call: str) -> None:
        self._replica.check_not_lost()
        if self._in_consensus:
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
            self._enter_consensus(leaving)
            yield

    @functools.partial(one_at_a_time, name="consensus")
    def _enter_consensus(self, leaving: ExitStack) -> None:
        self._refuse("consensus()")
        replica = self._replica
        agreed, modes = self.synced and self.sync.replicas_agree, modes_of(self.inner)
        if not agreed:
            self.sync.adopt()
        saved = None if agreed and not modes else replica.snapshot()
        leaving.callback(self._leave_consensus, saved, replica.buffers.snapshot(), modes)
        self._in_consensus = True
        if agreed:
            replica.check_equal()
        else:
            self.sync.enter_consensus()

    def _leave_consensus(
        self,
        saved: list[Tensor] | None,
        buffers: dict[str, Tensor],
        modes: list[tuple[dict[str, Any], Any]],
    ) -> None:
        self._in_consensus = False
        if saved is not None:
            self._replica.restore(saved)
        for home, mode in modes:  # the weights are those of that mode again
            home["train_mode"] = mode
        with torch.no_grad():
            self._replica.buffers.restore(buffers)

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
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's ``state`` and ``param_groups``, and what is this replica's own.

        Each rank has its own: save one file per rank, with that rank's model weights. That is
        in the first parameter group, so that it also passes through
        ``torch.distributed.checkpoint.state_dict``; ``torch.distributed.checkpoint.save`` keeps
        one rank's tensors only: see `localopt.integrations.dcp`.

        Raises:
            NonFiniteError: if this replica holds NaN or infinity (with ``check_finite``), so that
                it does not replace what was saved before.
            SyncError: if a collective that is in flight has failed.
        """
        self._replica.check_not_lost()
        self.sync.land()
        if self._options["check_finite"]:
            self._replica.check_finite_here()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        replica = self._replica
        state = self.inner.state_dict()
        state["param_groups"][0][KEY] = {
            "version": STATE_VERSION,
            "rule": type(self.sync).__name__,
            "rank": self._collective.rank,
            "world_size": self._collective.world_size,
            "has_state": has_state(state),
            "replica": replica.state_dict(),
            "sync": self.sync.state_dict(),
        }
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
        if self._in_consensus:
            self._refuse("load_state_dict()")
        state = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = changed if changed is not None else state
        own = own_state(state)
        if own is not None:
            self._check_own(own)
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

    def _check_own(self, own: Mapping[str, Any]) -> None:
        rank, name = self._collective.rank, type(self.sync).__name__
        check_own(own, name, self.sync.was_named, rank, self._collective.world_size)
        if own["rank"] is not None and own["rank"] != rank:
            self._warn_once(
                "other rank",
                f"the optimizer state that is loaded is that of rank {own['rank']}: momenta and "
                "the like are each replica's own. Save one state per rank, or merge them all "
                "(localopt.merged)",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r}, {self.period!r}, sync={self.sync!r})"


def _is_number(loss: Any) -> bool:
    """Whether a closure has returned one number, as a loss should be."""
    return loss.numel() == 1 if isinstance(loss, Tensor) else hasattr(loss, "__float__")
