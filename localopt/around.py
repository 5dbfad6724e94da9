"""A torch optimizer that passes for the one it is around: groups, state, hooks, GradScaler."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .calls import EmptyState


class Around(Optimizer):
    """Parameter groups, state and defaults are those of ``inner``; hooks are its own.

    Args:
        inner: the optimizer that makes the steps.
    """

    def __init__(self, inner: Optimizer) -> None:
        # Optimizer.__init__ would make parameter groups of its own; ours are the inner one's.
        self.inner = inner
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

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's parameter groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's per-parameter state."""
        return self.inner.state or EmptyState(self.inner)

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # torch never sets it anew
        """The inner optimizer's defaults."""
        return self.inner.defaults

    def __getattr__(self, name: str) -> Any:
        if name in ("train", "eval") and "inner" in vars(self):  # an optimizer with two modes
            return getattr(self.inner, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.inner.zero_grad(set_to_none=set_to_none)

    # GradScaler asks for this, and then calls step() even where it found infinities, so that a
    # skipped inner step still counts towards the round on every replica.
    _step_supports_amp_scaling = True

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        found_inf = self.__dict__.get("found_inf")  # set by GradScaler
        if found_inf is None:
            return self.inner.step() if closure is None else self.inner.step(closure)
        self._tell_accelerate(found_inf)
        if closure is not None:
            raise RuntimeError("GradScaler does not work with closures")
        if getattr(self.inner, "_step_supports_amp_scaling", False):
            return self._step_with_scale(found_inf)
        if float(found_inf):  # host sync, as GradScaler itself makes
            return None
        grad_scale = self.__dict__.get("grad_scale")
        if grad_scale is not None:
            self._unscale(1.0 / float(grad_scale))
        return self.inner.step()

    def _tell_accelerate(self, found_inf: Tensor) -> None:
        """Accelerate takes a step that was called for one that was made; this one may not be.

        It looks at a flag that its own wrapper of ``step`` sets, ``step_was_skipped``.
        """
        cells = getattr(vars(self).get("step"), "__closure__", None) or ()
        for cell in cells:
            if hasattr(cell.cell_contents, "_accelerate_step_called") and float(found_inf):
                cell.cell_contents._accelerate_step_called = False

    def _step_with_scale(self, found_inf: Tensor) -> Any:
        inner: Any = self.inner
        inner.found_inf, inner.grad_scale = found_inf, self.__dict__.get("grad_scale")
        try:
            return inner.step()
        finally:
            del inner.found_inf, inner.grad_scale

    def _unscale(self, factor: float) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        torch._foreach_mul_([g for g in grads if g is not None], factor)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"a {type(self).__name__} can be neither copied nor pickled, for parameters live in "
            "its buffers and other ranks wait for it: save its state_dict() and build a new one"
        )
