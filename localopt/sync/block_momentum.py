"""Block momentum (BMUF, SlowMo, DiLoCo): an outer optimizer on what a round has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ..compression import ChangeMean, Codec, codec
from ..flat import square_norm
from .rule import Rule, Sending, check_outer_lr, check_outer_momentum, sends_compressed


@dataclass(eq=False, repr=False)
class BlockMomentum(Rule):
    """Step with an outer optimizer on the pseudo-gradient Δ = z - x̄; every replica gets the result.

    z ← outer step on Δ;  x_i ← z

    z is the model at the round's start, the same on all replicas. With an outer SGD of rate ζ and
    momentum η this is v ← η v + ζ (x̄ - z), z ← z + v; with η = 0 and ζ = 1 it is averaging. With
    ``normalize_by_lr``, Δ = (z - x̄)/γ and the outer rate is multiplied by γ, the mean learning
    rate over the round: the same while γ is constant, and under a schedule v keeps the scale of
    gradients.

    A fixed outer momentum, and the division by γ, suppose rounds of one length. Where H grows, as
    with QSR, Δ grows with it, and v mixes rounds of all lengths: nothing is refused, but neither is
    the published method any more; try a smaller momentum. The outer optimizer steps on all
    parameters, also on those that do not require gradients, so an outer weight decay shrinks these
    as well.

    Args:
        outer: makes the outer optimizer from a list of parameters, such as
            ``functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)``.
        normalize_by_lr: divide Δ by γ and multiply the outer rate by it.
        heuristic_momentum: set the outer momentum to 1 - 1/m, for m replicas.
        compress: None, "bf16" or "int8": send Δ in half or a quarter of the bytes, with error
            feedback, as `Average` does; or a codec of `localopt.compression`.

    Attributes:
        outer_optimizer: what ``outer`` has made, once a `LocalOptimizer` has this rule; its
            ``param_groups`` may be scheduled, on all ranks alike.

    Raises:
        TypeError: if ``outer`` does not make a torch optimizer.
        ValueError: if the outer optimizer needs a closure, or is SGD with settings that diverge;
            at a synchronisation, if γ is 0 and should be divided by.

    Source: Chen & Huo 2016 (BMUF); Wang et al., arXiv 1910.00643 (SlowMo); Douillard et al., arXiv
    2311.08105 (DiLoCo).
    """

    outer: Callable[[list[nn.Parameter]], Optimizer]
    normalize_by_lr: bool = False
    heuristic_momentum: bool = False
    compress: str | Codec | None = None

    def __post_init__(self) -> None:
        self._codec = codec(self.compress)
        p = nn.Parameter(torch.zeros(2, 2))
        p.grad = torch.zeros_like(p)
        trial = self.outer([p])
        if not isinstance(trial, Optimizer):
            raise TypeError(
                f"outer must make a torch.optim.Optimizer from parameters; it made {trial!r}"
            )
        try:
            trial.step()
        except TypeError:
            raise ValueError(
                f"outer makes {type(trial).__name__}, which needs a closure: the pseudo-gradient "
                "has none"
            ) from None
        except (AssertionError, RuntimeError):
            pass  # one that wants another device (capturable), which the parameters may be on
        if self.normalize_by_lr and "lr" not in trial.param_groups[0]:
            raise ValueError(f"normalize_by_lr: {type(trial).__name__} has no learning rate")
        if self.heuristic_momentum and not isinstance(trial, SGD):
            raise ValueError("heuristic_momentum sets the momentum of an outer SGD")
        for group in trial.param_groups:
            _refuse_divergent(trial, group, self.heuristic_momentum)
        self._described = " ".join(repr(trial).split())

    def __repr__(self) -> str:
        return (
            f"BlockMomentum({self._described}, normalize_by_lr={self.normalize_by_lr}, "
            f"heuristic_momentum={self.heuristic_momentum}, compress={self.compress!r})"
        )

    def sends(self, parameters: int, beside: int, itemsize: int) -> list[Sending]:
        if self._codec is None:
            return super().sends(parameters, beside, itemsize)
        return sends_compressed(self._codec, parameters, beside, itemsize)

    def attach(self, replica: Any) -> None:
        super().attach(replica)
        self.z = self.anchor("z")
        self._changes = None
        if self._codec is not None:
            self._changes = ChangeMean(replica, self._codec, self.z, self.momentum("lost"))
        self._params = {name: nn.Parameter(view) for name, view in self.z.views.items()}
        self.outer_optimizer = self.outer(list(self._params.values()))
        self._outer_type = type(self.outer_optimizer).__name__
        self._set_momentum()

    def _set_momentum(self) -> None:
        if self.heuristic_momentum:
            for group in self.outer_optimizer.param_groups:
                group["momentum"] = 1 - 1 / self.replica.collective.world_size

    @torch.no_grad()
    def end_round(self) -> None:
        flat, gamma = self.replica.flat, self.replica.lr
        groups = self.outer_optimizer.param_groups
        told = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        settings = gamma if self.normalize_by_lr else None, told
        with self._mean_change(settings, gamma):
            self._outer_step(gamma)
            for z, x in zip(self.z.data, flat.params, strict=True):
                x.copy_(z)
        self.replicas_agree = True

    @contextmanager
    def _mean_change(self, settings: object, gamma: float) -> Iterator[None]:
        """In here the parameters are the mean of Δ over the replicas."""
        if self._changes is not None:
            with self._changes.mean_(settings, check=lambda: self._check_rate(gamma)):
                yield
            return
        replica, x = self.replica, self.replica.flat.params
        replica.gather_buffers()
        norm = square_norm(self._change(x)) if replica.track_drift else None
        (headers,) = replica.meet(settings=settings, square_norm=norm)
        self._check_rate(gamma)
        with replica.changing():
            self._change(x, out=x)
            replica.sum_(headers)
            yield

    def _change(self, x: Sequence[Tensor], out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Δ_i = z - x_i. It is averaged rather than x_i: what no replica has changed is then
        exactly 0, and an adaptive outer optimizer leaves it alone."""
        outs = [None] * len(x) if out is None else out
        return [
            torch.sub(z.to(mine.dtype), mine, out=o)
            for z, mine, o in zip(self.z.data, x, outs, strict=True)
        ]

    def _check_rate(self, gamma: float) -> None:
        if self.normalize_by_lr and not gamma > 0:
            raise ValueError(
                f"the mean learning rate of the round that ended at step {self.replica.step} is "
                f"{gamma}, and normalize_by_lr (SlowMo) divides by it: keep the rate above zero"
            )

    def _outer_step(self, gamma: float) -> None:
        flat, groups = self.replica.flat, self.outer_optimizer.param_groups
        for name, p in self._params.items():
            p.grad = flat.views[name].to(p.dtype)
            if self.normalize_by_lr:
                p.grad.div_(gamma)
        rates = [group.get("lr") for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                if self.normalize_by_lr:
                    group["lr"] = rate * gamma
            self.outer_optimizer.step()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                if self.normalize_by_lr:
                    group["lr"] = rate
        self.outer_optimizer.zero_grad()

    def finish(self) -> None:
        """End an open round at x̄, without an outer step; the next goes on from there."""
        mid_round = self.replica.open
        super().finish()
        if mid_round:
            self.z.copy_(self.replica.flat.params)

    def relayout(self) -> None:
        super().relayout()
        for name, view in self.z.views.items():
            if name in self._params:
                self._params[name].data = view
            else:
                self._params[name] = nn.Parameter(view)
                self.outer_optimizer.add_param_group({"params": [self._params[name]]})
        self._set_momentum()

    def start_over(self) -> None:
        super().start_over()
        self.outer_optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        outer = copy.deepcopy(self.outer_optimizer.state_dict())
        return {**super().state_dict(), "outer": outer, "outer_type": self._outer_type}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["outer_type"] != self._outer_type:
            raise ValueError(
                f"the state to load has the outer optimizer {state['outer_type']}, this rule "
                f"{self._outer_type}"
            )
        saved = len(state["outer"]["param_groups"])
        mine = len(self.outer_optimizer.param_groups)
        if saved != mine:
            raise ValueError(
                f"the state to load has {saved} parameter groups, this optimizer {mine}: build it "
                "with one, and add_param_group() the others as they were added"
            )
        super().load_state_dict(state)
        self.outer_optimizer.load_state_dict(copy.deepcopy(state["outer"]))
        self._set_momentum()  # this number of replicas decides, not the saved one


def BMUF(
    momentum: float | None = None,
    lr: float = 1.0,
    nesterov: bool = False,
    compress: str | None = None,
) -> BlockMomentum:
    """Blockwise model-update filtering: `BlockMomentum` with SGD.

    v ← η v + ζ (x̄ - z);  z ← z + v, or with Nesterov momentum z ← z + ζ (x̄ - z) + η v

    Args:
        momentum: η, in [0, 1); None for 1 - 1/m.
        lr: ζ.
        nesterov: the textbook's Nesterov form.
        compress: as for `BlockMomentum`.

    Source: Chen & Huo, ICASSP 2016.
    """
    initial = 0.5 if momentum is None else momentum
    outer = partial(SGD, lr=lr, momentum=initial, nesterov=nesterov and initial > 0)
    return BlockMomentum(outer, heuristic_momentum=momentum is None, compress=compress)


def SlowMo(beta: float, lr: float = 1.0, compress: str | None = None) -> BlockMomentum:
    """Slow momentum: `BlockMomentum` with SGD, normalised by the learning rate γ.

    v ← β v + (z - x̄)/γ;  z ← z - ζ γ v

    Args:
        beta: β, in [0, 1).
        lr: ζ, the slow learning rate.
        compress: as for `BlockMomentum`.

    Source: Wang et al., ICLR 2020, arXiv 1910.00643.
    """
    outer = partial(SGD, lr=lr, momentum=beta)
    return BlockMomentum(outer, normalize_by_lr=True, compress=compress)


def DiLoCo(lr: float = 0.7, momentum: float = 0.9, compress: str | None = None) -> BlockMomentum:
    """DiLoCo: `BlockMomentum` with SGD and Nesterov momentum; made for AdamW inside.

    Args:
        lr: outer learning rate.
        momentum: outer momentum, in [0, 1).
        compress: as for `BlockMomentum`.

    Source: Douillard et al., arXiv 2311.08105.
    """
    outer = partial(SGD, lr=lr, momentum=momentum, nesterov=momentum > 0)
    return BlockMomentum(outer, compress=compress)


def _refuse_divergent(outer: Optimizer, group: dict[str, Any], heuristic: bool) -> None:
    """Refuse an outer optimizer that climbs, and an SGD that diverges where rounds are long."""
    if group.get("maximize"):
        raise ValueError(f"outer makes {type(outer).__name__} with maximize: it would climb")
    if not isinstance(outer, SGD):
        return
    momentum, nesterov = float(group["momentum"]), bool(group["nesterov"])
    check_outer_momentum(momentum)
    if heuristic:
        momentum = 1.0 if nesterov else 0.0  # the tightest bound over all m
    check_outer_lr(float(group["lr"]), momentum, nesterov=nesterov)
