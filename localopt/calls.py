"""How a `LocalOptimizer` behaves as a torch optimizer: its calls, its hooks, its empty state."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from .optimizer import LocalOptimizer


class Calls:
    """The call that is being made; while it is, other threads may make none.

    Args:
        rank: of this process, for errors.
    """

    def __init__(self, rank: int) -> None:
        self._rank, self._lock, self._name = rank, threading.RLock(), ""

    def begin(self, name: str) -> str:
        """Begin the call ``name``; return the one that it is made in.

        Raises:
            RuntimeError: if another thread is in a call.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"{name}() on rank {self._rank}, while another thread is in {self._name}(): call "
                "it from the thread that trains, between steps"
            )
        outer, self._name = self._name, name
        return outer

    def end(self, outer: str) -> None:
        """End a call; ``outer`` is what `begin` returned."""
        self._name = outer
        self._lock.release()

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """In here the call ``name`` is being made."""
        outer = self.begin(name)
        try:
            yield
        finally:
            self.end(outer)


def one_at_a_time(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, refused while another thread is in one."""

    @functools.wraps(call)
    def guarded(self: LocalOptimizer, *args: Any, **kwargs: Any) -> Any:
        outer = self._calls.begin(call.__name__)
        try:
            return call(self, *args, **kwargs)
        finally:
            self._calls.end(outer)

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


class EmptyState(MutableMapping[Any, Any]):
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
