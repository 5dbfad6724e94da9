"""The outer step, which DiLoCo, SlowMo, BMUF and streaming share: an optimizer on the anchor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

Maker = Callable[[list[nn.Parameter]], Optimizer]


class Outer:
    """z ← outer step on the pseudo-gradient Δ = z - x̄.

    With an outer SGD of rate ζ and momentum η:
        v ← η v + Δ;  z ← z - ζ v, or with Nesterov momentum z ← z - ζ (Δ + η v).

    Normalised by γ, the mean learning rate of the round, it is a step on Δ/γ with γ times the outer
    rate: the same while γ is constant, and under a schedule v keeps the scale of gradients.

    Args:
        make: makes the optimizer from a list of parameters.
        normalize_by_lr: whether to divide Δ by γ.
        heuristic_momentum: set the outer momentum to 1 - 1/m, for m replicas.

    Attributes:
        optimizer: what was made, once `attach` was called.

    Raises:
        TypeError: if ``make`` does not make a torch optimizer.
        ValueError: if the optimizer needs a closure, or is SGD with settings that diverge.
    """

    def __init__(
        self, make: Maker, *, normalize_by_lr: bool = False, heuristic_momentum: bool = False
    ) -> None:
        self._make = make
        self._normalize, self._heuristic = normalize_by_lr, heuristic_momentum
        trial = _trial(make)
        if normalize_by_lr and "lr" not in trial.param_groups[0]:
            raise ValueError(f"normalize_by_lr: {type(trial).__name__} has no learning rate")
        if heuristic_momentum and not isinstance(trial, SGD):
            raise ValueError("heuristic_momentum sets the momentum of an outer SGD")
        for group in trial.param_groups:
            _refuse_divergent(trial, group, heuristic_momentum)
        self._type, self._described = type(trial).__name__, " ".join(repr(trial).split())

    def __repr__(self) -> str:
        return self._described

    def attach(self, z: Mapping[str, Tensor], world_size: int) -> None:
        """Make the optimizer.

        Args:
            z: by name, what it steps on, in place.
            world_size: m.
        """
        self._world_size = world_size
        self._params = {name: nn.Parameter(view) for name, view in z.items()}
        self.optimizer = self._make(list(self._params.values()))
        self._set_momentum()

    def _set_momentum(self) -> None:
        if self._heuristic:
            for group in self.optimizer.param_groups:
                group["momentum"] = 1 - 1 / self._world_size

    def settings(self, gamma: float = 1.0) -> object:
        """What this step goes by, to be the same on all ranks."""
        return gamma if self._normalize else None, self.groups()

    def check_rate(self, gamma: float, step: int) -> None:
        """Raise `ValueError` if γ of the round that ended at ``step`` cannot be divided by."""
        if self._normalize and not gamma > 0:
            raise ValueError(
                f"the mean learning rate of the round that ended at step {step} is {gamma}, and "
                "normalize_by_lr (SlowMo) divides by it: keep the rate above zero"
            )

    def groups(self) -> list[dict[str, Any]]:
        """The settings of the parameter groups, as they are now."""
        groups = self.optimizer.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def step(
        self,
        delta: Mapping[str, Tensor],
        gamma: float = 1.0,
        groups: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """z ← outer step.

        Args:
            delta: Δ, by name; what is not there stays as it is.
            gamma: γ.
            groups: settings to step with, if not those of now.
        """
        for name, p in self._params.items():
            if name in delta:
                p.grad = delta[name].to(p.dtype)
                if self._normalize:
                    p.grad.div_(gamma)
        now = self.groups()
        try:
            for group, used in zip(self.optimizer.param_groups, groups or now, strict=True):
                group.update(used)
                if self._normalize:
                    group["lr"] = used["lr"] * gamma
            self.optimizer.step()
        finally:
            for group, mine in zip(self.optimizer.param_groups, now, strict=True):
                group.update(mine)
        self.optimizer.zero_grad()

    def relayout(self, z: Mapping[str, Tensor]) -> None:
        """Step on other memory from now on, and on names that are new."""
        for name, view in z.items():
            if name in self._params:
                self._params[name].data = view
            else:
                self._params[name] = nn.Parameter(view)
                self.optimizer.add_param_group({"params": [self._params[name]]})
        self._set_momentum()

    def set_momentum(self, v: Mapping[str, Tensor]) -> None:
        """Go on from the momentum v of an outer SGD, by name."""
        for name, buffer in v.items():
            self.optimizer.state[self._params[name]]["momentum_buffer"] = buffer

    def check_momentum(self) -> None:
        """Raise `ValueError` unless this is an SGD, as in states of version 4."""
        if self._type != "SGD":
            raise ValueError(
                f"the state to load has the momentum of an outer SGD, this rule {self._type}"
            )

    def start_over(self) -> None:
        """Forget all steps."""
        self.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and of which type it is."""
        return {
            "outer": copy.deepcopy(self.optimizer.state_dict()),
            "outer_type": self._type,
            "outer_shapes": self._shapes(),
        }

    def _shapes(self) -> list[tuple[str, list[int]]]:
        return [(name, list(p.shape)) for name, p in self._params.items()]

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` if a state is that of another optimizer, or of other groups."""
        if state["outer_type"] != self._type:
            raise ValueError(
                f"the state to load has the outer optimizer {state['outer_type']}, this rule "
                f"{self._type}"
            )
        saved, mine = len(state["outer"]["param_groups"]), len(self.optimizer.param_groups)
        if saved != mine:
            raise ValueError(
                f"the state to load has {saved} parameter groups, this optimizer {mine}: build it "
                "with one, and add_param_group() the others as they were added"
            )
        shapes = state.get("outer_shapes")  # not in version 4
        odd = [] if shapes is None else [a for a in map(_pair, shapes) if a not in self._shapes()]
        if odd or (shapes is not None and len(shapes) != len(self._params)):
            name, shape = odd[0] if odd else self._shapes()[-1]
            raise ValueError(
                f"the state to load has other parameters or fragments: {name} of shape "
                f"{tuple(shape)} is not in both"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(copy.deepcopy(state["outer"]))
        self._set_momentum()  # this number of replicas decides, not the saved one


def _pair(named: Sequence[Any]) -> tuple[str, list[int]]:
    """A name and a shape, as `torch.load` or JSON gives them."""
    return named[0], list(named[1])


def _trial(make: Maker) -> Optimizer:
    """The optimizer, after a step on parameters of no importance."""
    if not callable(make):
        raise TypeError(f"outer must be a function that makes an optimizer, not {make!r}")
    p = nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.zeros_like(p)
    trial = make([p])
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
    return trial


def _refuse_divergent(outer: Optimizer, group: dict[str, Any], heuristic: bool) -> None:
    """Refuse an outer optimizer that climbs, and an SGD that diverges where rounds are long."""
    if group.get("maximize"):
        raise ValueError(f"outer makes {type(outer).__name__} with maximize: it would climb")
    if not isinstance(outer, SGD):
        return
    momentum, nesterov = float(group["momentum"]), bool(group["nesterov"])
    if not 0 <= momentum < 1:
        raise ValueError(f"the outer momentum is {momentum}: it must lie in [0, 1), or it diverges")
    if heuristic:
        momentum = 1.0 if nesterov else 0.0  # the tightest bound over all m
    _check_rate(float(group["lr"]), momentum, nesterov=nesterov)


def _check_rate(zeta: float, eta: float, *, nesterov: bool) -> None:
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
