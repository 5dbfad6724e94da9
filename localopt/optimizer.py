"""LocalOptimizer: a torch optimizer around any torch optimizer, with few synchronisations."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from . import control
from .buffers import BufferPolicy, Buffers
from .collective import Collective, Traffic
from .flat import Flat
from .replica import Replica, SyncReport
from .sync import Average, Rule

STATE_VERSION = 3


class LocalOptimizer(Optimizer):
    """H local steps of ``inner`` on every replica, then a synchronisation; again and again.

    x_i ← inner step on x_i's own gradients, H times; then the rule, by default x_i ← x̄.

    It is a `torch.optim.Optimizer`: parameter groups, state, hooks, learning-rate schedulers,
    closures, `state_dict` and ``torch.amp.GradScaler`` behave as with the inner optimizer.
    Building it is collective: all ranks compare their layouts, parameters move into flat
    buffers, and all replicas start from rank 0's parameters. Load per-replica weights after
    that, not before. Without torch.distributed, or with one replica, `Average` is the inner
    optimizer, bit for bit.

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

    Raises:
        ValueError: for settings or parameters that cannot work.
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
    ) -> None:
        _check_inner(inner, period)
        self.inner = inner
        self.period = period
        self.sync = sync if sync is not None else Average()
        if not isinstance(self.sync, Rule):
            raise TypeError(f"sync must be a rule such as Average(), not {self.sync!r}")
        self.auto = auto
        self._collective = Collective(process_group)
        self._model, self._policy = model, buffers
        self._options = {"check_finite": check_finite, "track_drift": track_drift}
        self._in_consensus = False
        self._init_hooks()
        self._replica = self._build()
        self.sync.attach(self._replica)

    def _init_hooks(self) -> None:
        # Optimizer.__init__ would make parameter groups of its own; ours are the inner one's.
        for name in (
            "step_pre",
            "step_post",
            "state_dict_pre",
            "state_dict_post",
            "load_state_dict_pre",
            "load_state_dict_post",
        ):
            setattr(self, f"_optimizer_{name}_hooks", OrderedDict())
        self._patch_step_function()

    def _build(self) -> Replica:
        """Compare layouts, move the parameters into flat buffers, start equal. Collective."""
        named = _named_parameters(self.inner, self._model)
        self._homes = _homes(self._model, {id(p) for _, p in named})
        buffers = Buffers(self._model, self._policy, [p for _, p in named])
        beside = [*self.sync.beside(named), *buffers.entries()]
        flat = Flat(named, beside, self._collective.world_size)
        settings = {**self._options, "buffers": self._policy, "auto": self.auto}
        lines = [
            f"rule {_describe(self.sync)}",
            f"period {_describe(self.period)}",
            f"inner optimizer {type(self.inner).__name__}",
            *(f"{key} {value}" for key, value in settings.items()),
            *map(str, flat.entries),
            *buffers.described(),
        ]
        control.agree(self._collective, lines, control.TIMEOUT)
        replica = Replica(flat, self._collective, buffers, self.inner, **self._options)
        replica.equalise()
        return replica

    # What a torch optimizer has: the inner one's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's parameter groups."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's per-parameter state."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.inner.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, between rounds, on all ranks alike. Collective: the buffers are rebuilt.

        Raises:
            RuntimeError: in the middle of a round.
        """
        self._refuse_in_consensus("add_param_group()")
        replica = self._replica
        if replica.remaining:
            raise RuntimeError(
                f"add_param_group at step {replica.step}, {replica.remaining} steps before the "
                "round ends: add groups between rounds (when .synced), or call finish() first"
            )
        self.sync.land()
        self.inner.add_param_group(param_group)
        own, buffers = replica.flat.views, replica.buffers.snapshot()
        new = self._build()
        with torch.no_grad():
            for name, p in new.flat.named:
                if name in own:  # replicas may differ: only the new parameters start as rank 0's
                    p.copy_(own[name])
            new.buffers.restore(buffers)
        replica.relayout(new.flat, new.buffers)
        self.sync.relayout()

    # When: the place in the round.

    @property
    def synced(self) -> bool:
        """Whether no round is open: under `Average`, whether all replicas are equal."""
        return self._replica.remaining == 0

    @property
    def h(self) -> int:
        """H of the open round, or of the last one."""
        return self._replica.h

    @property
    def round(self) -> int:
        """Rounds finished."""
        return self._replica.round

    @property
    def traffic(self) -> Traffic:
        """Synchronisations, bytes and seconds of this rank."""
        return self._replica.traffic

    @property
    def report(self) -> SyncReport | None:
        """What the replicas told each other at the last synchronisation; None before the first.

        Where the collective runs behind training, it is of the synchronisation before that, for
        that is the last one that has arrived.
        """
        return self._replica.report

    @property
    def drift(self) -> float | None:
        """Spread of the replicas, as in `report`; None if not tracked.

        sqrt((1/m) Σ_i |x_i - x̄|²), in the units of the parameters, just before the
        synchronisation; where a rule pulls replicas first, after its pull. It is computed from
        norms: in float32 it cannot resolve a spread below about 1e-5 of the parameters' norm.
        """
        return None if self._replica.report is None else self._replica.report.drift

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one local step; if ``auto``, end the round when it is due.

        Args:
            closure: as for the inner optimizer.

        Returns:
            What the inner step returns (the closure's loss, or None).

        Raises:
            SyncError: when a round ends on replicas that do not fit; see `average`.
        """
        self._refuse_in_consensus("step()")
        if self._replica.remaining == 0:
            self._begin_round()
        lr = self.inner.param_groups[0].get("lr", math.nan)
        loss = self._inner_step(closure)
        self._replica.record_lr(lr)
        if _is_number(loss) and not self._replica.has_loss:
            self.record_loss(loss)
        if self.auto:
            self.average()
        return loss

    def average(self) -> bool:
        """Count one local step; end the round if it was the last. Collective then.

        Returns:
            Whether the round has ended.

        Raises:
            ReplicaMismatchError: if the ranks are at different steps or have different H.
            NonFiniteError: if a replica holds NaN or infinity.
        """
        self._refuse_in_consensus("average()")
        replica = self._replica
        if replica.remaining == 0:
            self._begin_round()
        self._check_loss()
        replica.count_step()
        replica.poll()
        self.sync.after_step()
        if replica.remaining > 1:
            replica.remaining -= 1
            return False
        self.sync.end_round()
        replica.end_round()
        return True

    def _check_loss(self) -> None:
        replica = self._replica
        if self.sync.needs_loss and not replica.has_loss:
            raise RuntimeError(
                f"{type(self.sync).__name__} needs the training loss of every step, and step "
                f"{replica.step + 1} on rank {self._collective.rank} has none: call "
                "step(closure), or optimizer.record_loss(loss) before step()"
            )

    def _begin_round(self) -> None:
        replica = self._replica
        replica.flat.check_pointers()
        self._check_model()
        if replica.round == 0:
            self.sync.begin()
        h = self.period(replica.step, float(self.inner.param_groups[0].get("lr", math.nan)))
        if not isinstance(h, int) or not 1 <= h < 2**63:
            raise ValueError(f"period gave H = {h!r} at step {replica.step}: not a positive int")
        replica.begin_round(h)

    def _check_model(self) -> None:
        """Raise `RuntimeError` if the model has got other Parameters than the optimizer's."""
        for name, home, key, p in self._homes:
            if home.get(key) is not p:
                raise RuntimeError(
                    f"the model's parameter {name} is no longer the one that the optimizer has: "
                    "load_state_dict(assign=True) or an assignment replaced it. Do that before "
                    "building the optimizer"
                )

    def _refuse_in_consensus(self, call: str) -> None:
        if self._in_consensus:
            raise RuntimeError(f"{call} inside consensus(): the model is not the replica's own now")

    def record_loss(self, loss: Tensor | float) -> None:
        """Take note of this step's training loss, one number, before `step` or `average` counts it.

        `step` does so itself with a closure's. Stays on the device: no host synchronisation. Its
        mean over the round is what `report` tells of each replica, and what `LSGD` goes by.

        Raises:
            RuntimeError: if this step has one already.
        """
        self._replica.record_loss(loss)

    # GradScaler asks for this, and then calls step() even where it found infinities, so that a
    # skipped inner step still counts towards the round on every replica.
    _step_supports_amp_scaling = True

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return self.inner.step() if closure is None else self.inner.step(closure)
        if closure is not None:
            raise RuntimeError("GradScaler does not work with closures")
        if getattr(self.inner, "_step_supports_amp_scaling", False):
            return self._step_with_scale(found_inf)
        if float(found_inf):  # host sync, as GradScaler itself makes
            return None
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            self._unscale(1.0 / float(grad_scale))
        return self.inner.step()

    def _step_with_scale(self, found_inf: Tensor) -> Any:
        inner: Any = self.inner
        inner.found_inf, inner.grad_scale = found_inf, getattr(self, "grad_scale", None)
        try:
            return inner.step()
        finally:
            del inner.found_inf, inner.grad_scale

    def _unscale(self, factor: float) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        torch._foreach_mul_([g for g in grads if g is not None], factor)

    def start_at(self, step: int) -> None:
        """Count steps from ``step``: for a run that starts inside a schedule, from given weights.

        The period sees these numbers. All ranks must say the same.

        Raises:
            RuntimeError: after the first step.
        """
        if self._replica.round or self._replica.remaining:
            raise RuntimeError(f"start_at({step}) after {self._replica.step} steps: call it first")
        self._replica.step = step

    # The model to evaluate, and the end.

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Within the context the model holds what should be evaluated. Collective.

        The mean of the replicas, which under `Average` they all are already between rounds; under
        `EASGD` the centre. On exit parameters and buffers are what they were. Its traffic is
        counted apart (``traffic.other_bytes``).

        Raises:
            RuntimeError: if nested.
            ReplicaMismatchError: if another rank makes another call.
        """
        self._refuse_in_consensus("consensus()")
        replica = self._replica
        saved = None if self.synced and self.sync.replicas_agree else replica.snapshot()
        saved_buffers = replica.buffers.snapshot()
        self._in_consensus = True
        try:
            if saved is not None:
                self.sync.enter_consensus()
            yield
        finally:
            self._in_consensus = False
            if saved is not None:
                replica.restore(saved)
            with torch.no_grad():
                replica.buffers.restore(saved_buffers)

    def finish(self) -> None:
        """End the open round now and wait for collectives in flight: the replicas agree.

        Collective; always makes one exchange, which shows whether every rank is here.

        Raises:
            ReplicaMismatchError: if another rank is elsewhere, such as in its next round.
        """
        self._refuse_in_consensus("finish()")
        replica = self._replica
        self.sync.finish()
        if replica.remaining:
            replica.end_round()

    # Saving: one state per rank.

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's ``state`` and ``param_groups``, and this replica's place.

        Each rank has its own: save one file per rank, with that rank's model weights.

        Raises:
            NonFiniteError: if this replica holds NaN or infinity (with ``check_finite``), so that
                it does not replace what was saved before.
        """
        self.sync.land()
        if self._options["check_finite"]:
            self._replica.check_finite_here()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        replica = self._replica
        state = self.inner.state_dict()
        state["localopt"] = {
            "version": STATE_VERSION,
            "rule": type(self.sync).__name__,
            "rank": self._collective.rank,
            "world_size": self._collective.world_size,
            "replica": replica.state_dict(),
            "sync": self.sync.state_dict(),
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state)
            state = changed if changed is not None else state
        return state

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state that `state_dict` gave on this rank.

        A state of the bare inner optimizer is taken too; then the first round begins.

        Raises:
            ValueError: if the state is of another version, rule, or, in mid-round, of another
                rank or number of replicas.
        """
        self._refuse_in_consensus("load_state_dict()")
        state = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state)
            state = changed if changed is not None else state
        place = state.pop("localopt", None)
        if place is not None:
            self._check_place(place)
        self.inner.load_state_dict(state)
        self._replica.drop()  # what is in flight belongs to the run that is left
        if place is None:
            self._replica.start_over()
            self.sync.start_over()
        else:
            self._replica.load_state_dict(place["replica"])
            self.sync.load_state_dict(place["sync"])
            if place["world_size"] != self._collective.world_size:
                self._replica.forget_others()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_place(self, place: dict[str, Any]) -> None:
        mine = {
            "rule": type(self.sync).__name__,
            "rank": self._collective.rank,
            "world_size": self._collective.world_size,
        }
        if place["version"] != STATE_VERSION:
            raise ValueError(
                f"the state to load has version {place['version']!r}, this localopt writes and "
                f"reads {STATE_VERSION}"
            )
        agreed = place["sync"]["replicas_agree"] and place["replica"]["remaining"] == 0
        wanted = ("rule",) if agreed else mine
        for key in wanted:
            if place[key] != mine[key]:
                raise ValueError(
                    f"rank {mine['rank']}: the state to load has {key} {place[key]!r}, this "
                    f"optimizer {mine[key]!r}"
                )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"a {type(self).__name__} can be neither copied nor pickled, for parameters live in "
            "its buffers and other ranks wait for it: save its state_dict() and build a new one"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r}, {self.period!r}, sync={self.sync!r})"


_LOCAL = ("sync", "model", "buffers", "process_group", "auto", "track_drift", "check_finite")


class LocalSGD(LocalOptimizer):
    """`LocalOptimizer` around `torch.optim.SGD`: Local SGD.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate.
        period: when to synchronise.
        **options: `torch.optim.SGD`'s (momentum, weight_decay, nesterov, …) and
            `LocalOptimizer`'s (sync, model, buffers, …).

    Source: Stich 2018, arXiv 1805.09767.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, period: Callable[[int, float], int], **options: Any
    ) -> None:
        local = {key: options.pop(key) for key in _LOCAL if key in options}
        super().__init__(SGD(params, lr=lr, **options), period, **local)


class LocalAdamW(LocalOptimizer):
    """`LocalOptimizer` around `torch.optim.AdamW`: Local AdamW. Moments stay local.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate.
        period: when to synchronise.
        **options: `torch.optim.AdamW`'s (betas, eps, weight_decay, …) and `LocalOptimizer`'s
            (sync, model, buffers, …).

    Source: Gu et al., ICLR 2024, arXiv 2310.14423.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, *, period: Callable[[int, float], int], **options: Any
    ) -> None:
        local = {key: options.pop(key) for key in _LOCAL if key in options}
        super().__init__(AdamW(params, lr=lr, **options), period, **local)


def _check_inner(inner: Optimizer, period: Callable[[int, float], int]) -> None:
    if isinstance(inner, LocalOptimizer):
        raise ValueError("the inner optimizer is a LocalOptimizer already")
    if not isinstance(inner, Optimizer):
        raise TypeError(f"inner must be a torch.optim.Optimizer, not {type(inner).__name__}")
    if not callable(period):
        raise TypeError(f"period must be a callable (step, lr) -> H, not {period!r}")
    if getattr(period, "needs_lr", False):
        group = inner.param_groups[0]
        free = next((t.__name__ for t in type(inner).__mro__ if "ScheduleFree" in t.__name__), None)
        if "lr" not in group or free:
            raise ValueError(
                f"{type(period).__name__} follows the decay of the learning rate, and "
                f"{type(inner).__name__} has none: use Constant or PostLocal with it"
            )


def _named_parameters(inner: Optimizer, model: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters, each once, with the best names there are."""
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for g, group in enumerate(inner.param_groups):
        given = group.get("param_names") or [f"group{g}.{i}" for i in range(len(group["params"]))]
        for name, p in zip(given, group["params"], strict=True):
            named.setdefault(id(p), (names.get(id(p), name), p))
    return list(named.values())


def _homes(
    model: nn.Module | None, owned: set[int]
) -> list[tuple[str, dict[str, nn.Parameter | None], str, nn.Parameter]]:
    """Where the model keeps the parameters whose ids are ``owned``: looking there is cheap."""
    return [
        (f"{prefix}.{key}" if prefix else key, module._parameters, key, p)
        for prefix, module in (model.named_modules() if model is not None else ())
        for key, p in module._parameters.items()
        if p is not None and id(p) in owned
    ]


def _describe(what: object) -> str:
    """A text equal on all ranks for equal periods or rules: some print their address."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(what))


def _is_number(loss: Any) -> bool:
    """Whether a closure has returned one number, as a loss should be."""
    return loss.numel() == 1 if isinstance(loss, Tensor) else hasattr(loss, "__float__")
