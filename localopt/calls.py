"""How a `LocalOptimizer` behaves as a torch optimizer: its calls, its hooks, its empty state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from .optimizer import LocalOptimizer


def one_at_a_time(call: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """``call``, of a ``name`` of its own or another, refused while another thread is in one."""

    name = name or call.__name__

    @functools.wraps(call)
    def guarded(self: LocalOptimizer, *args: Any, **kwargs: Any) -> Any:
        if not self._busy.acquire(blocking=False):
            self._refuse_thread(name)
        outer, self._caller = self._caller, name
        try:
            return call(self, *args, **kwargs)
        finally:
            self._caller = outer
            self._busy.release()

    return guarded


def with_own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` with the hooks that were registered on this optimizer.

    torch would put the global ones around it as well, and a mark for the profiler, which are
    around the inner optimizer's step already: once per step is enough.
    """

    @functools.wraps(step)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        for before in self._optimizer_step_pre_hooks.values():
            changed = before(self, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        result = step(*args, **kwargs)
        for after in self._optimizer_step_post_hooks.values():
            after(self, args, kwargs)
        return result

    hooked.hooked = True  # type: ignore[attr-defined]  # torch leaves it as it is
    return hooked


class EmptyState(MutableMapping):
    """The inner optimizer's state while there is none.

    It counts as something: ``torch.distributed.checkpoint`` makes a step with an optimizer whose
    state is nothing to look at what a step would make of it, and ours would begin a round.
    """

    def __init__(self, inner: Optimizer) -> None:
        self._inner = inner

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return repr(self._inner.state)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copy is of the state alone
        return self._inner.state.__reduce_ex__(protocol)

    def __getitem__(self, key: Any) -> Any:
        return self._inner.state[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._inner.state[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._inner.state[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._inner.state

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inner.state)

    def __len__(self) -> int:
        return len(self._inner.state)

    # MutableMapping's would make the entries that they look for.

    def get(self, key: Any, default: Any = None) -> Any:
        return self._inner.state.get(key, default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        return self._inner.state.setdefault(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        return self._inner.state.pop(key, *default)
