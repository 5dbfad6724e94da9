"""A case of a rule whose synchronisations fail, and what it held before that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from localopt import Constant, LocalOptimizer, SyncError, collective
from localopt.transport import Copied
from tests.support import oracle
from tests.support.contract import Model, local_optimizer
from tests.support.entries import Entries, held

H = 2


class One:
    """A model, its optimizer, and what it held when it last began to synchronise."""

    def __init__(self, case: Any, dtype: torch.dtype = torch.float64, h: int = H) -> None:
        self.case, self.model = case, Model(dtype)
        options = {"track_drift": case[1] % 2 == 0}
        self.optimizer = local_optimizer(*case, self.model, Constant(h), **options)
        self.entries = Entries(self.optimizer)

    def step(self, rank: int) -> None:
        """One local step; the gradients are those of the weights that it begins from."""

        def closure() -> float:
            for i, p in enumerate(self.model.weights):
                p.grad = (p.detach() - (1.0 + rank)) * (0.5 + i)
            return 1.0 + rank

        self.optimizer.step(closure)

    def until_they_meet(self, rank: int, m: int) -> None:
        """Up to the last step but one of a round that all ranks end together."""
        settings = oracle.CASES[self.case[0]][self.case[1]].settings_for(m)
        for _ in range(H * (2 * settings.get("global_every", 1) - 1) + 1):
            self.step(rank)

    def goes_on(self, rank: int) -> list[Tensor]:
        """All that is held two rounds and a half later, and after finish()."""
        for _ in range(2 * H + 1):
            self.step(rank)
        seen = held(self.optimizer)
        self.optimizer.finish()
        return seen + held(self.optimizer)

    def fails(self, rank: int, error: type[Exception] = SyncError) -> str:
        """What is told at the next synchronisation, or a round later, with all as it was."""
        with pytest.raises(error) as caught:
            for _ in range(1 + 2 * H):
                self.step(rank)
        assert self.entries.unchanged(), (self.case, str(caught.value))
        return f"{type(caught.value).__name__}: {caught.value}"

    def calls(self, rank: int) -> list[Callable[[], Any]]:
        optimizer = self.optimizer
        return [
            lambda: self.step(rank), optimizer.average, optimizer.finish,
            lambda: evaluate(optimizer), optimizer.state_dict,
        ]  # fmt: skip


def evaluate(optimizer: LocalOptimizer) -> None:
    with optimizer.consensus():
        pass


def closed() -> Any:
    raise RuntimeError("Connection closed by peer")


class Broken:
    """Lets collectives fail on all ranks, half-way, while ``what`` says which: "headers" or what
    follows them, the "payload"."""

    def __init__(self) -> None:
        self.what = ""
        for name in (
            "sum_", "broadcast_", "start_exchange_shards", "start_gather_shards_", "start_sum_",
            "start_rows_",
        ):  # fmt: skip
            self._break(name)
        wait = collective.Pending.wait

        def waiting(pending: collective.Pending) -> None:
            if self.what == getattr(pending, "what", None):
                closed()
            wait(pending)

        collective.Pending.wait = waiting
        launch = Copied.launch

        def launching(copied: Copied, *args: Any, **options: Any) -> None:
            if self.what == "headers":
                with copied._replica.meeting.explained():
                    closed()
            launch(copied, *args, **options)

        Copied.launch = launching

    def _break(self, name: str) -> None:
        original = getattr(collective.Collective, name)

        def call(this: collective.Collective, tensors: Any, *args: Any, **options: Any) -> Any:
            what = "headers" if name == "start_rows_" else "payload"
            late = name in ("start_gather_shards_", "start_sum_")
            if what == self.what == "headers":
                return collective.Pending([closed], 0)  # nobody sends any: none is left over
            if self.what == what and this.world_size > 1 and not late:
                for x in tensors if isinstance(tensors, list) else ():
                    x.view(-1)[::2] = 1e30  # it had begun
                closed()
            result = original(this, tensors, *args, **options)
            if late:  # it fails when it is waited for
                result.what = what
            return result

        setattr(collective.Collective, name, call)
