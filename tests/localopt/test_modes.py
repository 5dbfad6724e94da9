"""An inner optimizer with two modes, as schedule-free ones: it trains other weights than it
evaluates, and replicas agree on both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from localopt import (
    EASGD,
    LSGD,
    Average,
    CoCoDSGD,
    Constant,
    DiLoCo,
    HierarchicalAverage,
    LocalOptimizer,
    ReplicaMismatchError,
    Rule,
)
from tests.support.contract import equal_on_all_ranks, stacked
from tests.support.ranks import run
from tests.support.schedule_free import BETA, RATE, ScheduleFree, Wrapped

STEPS = 11


class Problem:
    """A replica: parameters of several shapes, each pulled to a target of this rank's own."""

    def __init__(
        self, rank: int, sync: Rule | None = None, dtype: torch.dtype = torch.float64,
        kind: type[ScheduleFree] = ScheduleFree, **options: Any,
    ) -> None:  # fmt: skip
        self.params = [nn.Parameter(torch.ones(s, dtype=dtype)) for s in ((5,), (), (3, 4))]
        self.rank = rank
        sync = sync or Average(state_fields=("z",))
        self.optimizer = LocalOptimizer(kind(self.params), Constant(4), sync, **options)
        self.optimizer.train()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for p in self.params:
                p.grad = p.detach() - 3 * self.rank
            self.optimizer.record_loss(0.0)
            self.optimizer.step()

    def vector(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def z(self) -> Tensor:
        return torch.cat([self.optimizer.state[p]["z"].reshape(-1) for p in self.params])

    def held(self) -> list[Any]:
        """All that evaluation must leave as it is."""
        flags = [group["train_mode"] for group in self.optimizer.param_groups]
        flags.append(getattr(self.optimizer.inner, "train_mode", None))
        state = self.optimizer.state
        zs = [state[p]["z"].clone() if "z" in state.get(p, {}) else None for p in self.params]
        return [*(p.detach().clone() for p in self.params), *zs, flags]


def same(a: list[Any], b: list[Any]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


# One process.


def test_modes_are_passed_on() -> None:
    """`train` and `eval` are the inner optimizer's, and there are none where it has none."""
    replica = Problem(0)
    optimizer = replica.optimizer
    assert optimizer.param_groups[0]["train_mode"]
    replica.step(3)
    y = replica.vector()
    optimizer.eval()
    x = replica.vector()
    assert not optimizer.param_groups[0]["train_mode"] and not torch.equal(x, y)
    assert torch.allclose(y, (1 - BETA) * replica.z() + BETA * x)
    optimizer.train()
    assert torch.allclose(replica.vector(), y)
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        bare = LocalOptimizer(kind(replica.params, lr=0.1), Constant(2))
        for name in ("train", "eval"):
            assert not hasattr(bare, name)
            with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
                getattr(bare, name)
    with pytest.raises(AttributeError, match="'LocalOptimizer' object has no attribute 'other'"):
        optimizer.other()


RULES: dict[str, Callable[[], Rule]] = {
    "nothing": Average,
    "reset": lambda: Average(reset_fields=("z",)),
    "int8": lambda: Average(compress="int8"),
    "diloco": DiLoCo,
    "easgd": EASGD,
    "cocod": CoCoDSGD,
    "lsgd": LSGD,
    "hierarchical": lambda: HierarchicalAverage(1, 2),
}


@pytest.mark.parametrize("kind", [ScheduleFree, Wrapped])
def test_alone_it_is_the_bare_optimizer(kind: type[ScheduleFree]) -> None:
    """Any rule with one replica; `Average` bit for bit, evaluated or not."""
    for make in RULES.values():
        Problem(0, make(), kind=kind).step(5)
    replica = Problem(1, kind=kind)
    twin = [nn.Parameter(torch.ones_like(p)) for p in replica.params]
    bare = kind(twin)
    bare.train()
    for _ in range(STEPS):
        replica.step()
        with replica.optimizer.consensus():
            replica.optimizer.eval()
        for p in twin:
            p.grad = p.detach() - 3
        bare.step()
        assert all(torch.equal(p, q) for p, q in zip(replica.params, twin, strict=True))


# Several.


def refused(rank: int, m: int) -> list[str]:
    texts = []
    for make in RULES.values():
        with pytest.raises(ValueError, match="evaluates other weights than it trains") as caught:
            Problem(rank, make())
        texts.append(str(caught.value))
        Problem(rank, make(), alone=True).step(5)
    return texts


@pytest.mark.slow
def test_other_rules_are_refused() -> None:
    """"replicas that agree in train() would not in eval()": and what to do instead."""
    for texts in run(refused, 2):
        for text in texts:
            assert text.startswith("ScheduleFree ") and 'Average(state_fields=("z",))' in text


def trajectory(rank: int, m: int) -> np.ndarray:
    """After every step y, and at the end x, from the library: (STEPS + 1,)."""
    replica, seen = Problem(rank), []
    for _ in range(STEPS):
        replica.step()
        seen.append(float(replica.vector()[0]))
    replica.optimizer.finish()
    replica.optimizer.eval()
    return np.array([*seen, float(replica.vector()[0])])


@pytest.mark.slow
def test_local_schedule_free() -> None:
    """x and z are averaged, and so is y: the equations, on stacked replicas in NumPy."""
    m = 2
    x = z = np.ones(m)
    ys = []
    for t in range(1, STEPS + 1):
        z = z - RATE * ((1 - BETA) * z + BETA * x - 3 * np.arange(m))
        x = (1 - 1 / t) * x + z / t
        if t % 4 == 0 or t == STEPS:
            final = x.mean()
        if t % 4 == 0:
            x, z = np.full(m, x.mean()), np.full(m, z.mean())
        ys.append((1 - BETA) * z + BETA * x)
    for rank, seen in enumerate(run(trajectory, m)):
        np.testing.assert_allclose(seen[:-1], np.stack(ys)[:, rank], rtol=1e-12)
        assert seen[-1] == pytest.approx(final, rel=1e-12)


KINDS = [(torch.float64, ScheduleFree), (torch.float32, Wrapped), (torch.bfloat16, ScheduleFree)]


def finished(rank: int, m: int) -> None:
    for dtype, kind in KINDS:
        for steps in (0, 1, 3, 4, 6, 8):
            for mode in ("train", "eval"):
                replica = Problem(rank, dtype=dtype, kind=kind)
                optimizer = replica.optimizer
                replica.step(steps)
                getattr(optimizer, mode)()
                assert equal_on_all_ranks(replica.vector()) == optimizer.synced
                optimizer.finish()
                for _ in range(2):
                    for turn in (lambda: None, optimizer.eval, optimizer.train):
                        turn()
                        assert equal_on_all_ranks(replica.vector()), (dtype, steps, mode)
                if steps:
                    assert equal_on_all_ranks(replica.z())
                replica.step(4)
                assert optimizer.synced and equal_on_all_ranks(replica.vector())


@pytest.mark.slow
def test_replicas_agree_in_both_modes_after_finish() -> None:
    """In mid-round, the first one too, and at a round's end; from either mode."""
    run(finished, 2)


def loaded_and_finished(rank: int, m: int) -> None:
    replica, other = Problem(rank), Problem(rank, alone=True)
    replica.step(4)
    other.step(3)
    replica.optimizer.load_state_dict(other.optimizer.inner.state_dict())
    with torch.no_grad():
        for p, q in zip(replica.params, other.params, strict=True):
            p.copy_(q)
    assert not equal_on_all_ranks(replica.z())
    replica.optimizer.finish()
    for turn in (replica.optimizer.eval, replica.optimizer.train):
        turn()
        assert equal_on_all_ranks(replica.vector())


@pytest.mark.slow
def test_finish_where_a_state_was_loaded() -> None:
    """Loading gives the optimizer other tensors: those are averaged as well."""
    run(loaded_and_finished, 2)


def evaluated(rank: int, m: int) -> int:
    """After every step, from either mode: the mean of all x and of all y is there, and after it
    all is as it was, so that the run is that of a replica which never evaluated."""
    tried = 0
    for dtype, kind in KINDS:
        replica, unseen = (Problem(rank, dtype=dtype, kind=kind) for _ in range(2))
        optimizer = replica.optimizer
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        for step in range(STEPS):
            for leave in ("train", "eval"):
                before = replica.held()
                ys, zs = stacked(replica.vector()), stacked(replica.z()) if step else None
                with pytest.raises(KeyError), optimizer.consensus():
                    assert equal_on_all_ranks(replica.vector())
                    assert torch.allclose(replica.vector(), ys.mean(0), rtol=tolerance)
                    optimizer.eval()
                    assert equal_on_all_ranks(replica.vector()), f"step {step}: x differs"
                    if zs is not None:
                        xs = (ys - (1 - BETA) * zs) / BETA
                        assert torch.allclose(replica.vector(), xs.mean(0), rtol=2 * tolerance)
                    optimizer.train()
                    assert equal_on_all_ranks(replica.vector())
                    getattr(optimizer, leave)()
                    raise KeyError
                assert same(before, replica.held()), f"step {step}, left in {leave}()"
                tried += 1
            optimizer.eval()
            before = replica.held()
            with optimizer.consensus():
                assert equal_on_all_ranks(replica.vector()), f"step {step}, in eval()"
                optimizer.train()
                assert equal_on_all_ranks(replica.vector())
            assert same(before, replica.held())
            optimizer.train()
            for p, q in zip(replica.params, unseen.params, strict=True):
                assert torch.allclose(p, q, rtol=2 * tolerance), "but for the optimizer's rounding"
                p.data.copy_(q)
            replica.step()
            unseen.step()
        assert same(replica.held(), unseen.held())
        assert replica.optimizer.round == unseen.optimizer.round == 2
    return tried


@pytest.mark.slow
def test_evaluation_in_both_modes() -> None:
    """In the first round too, where the state is not yet where it is averaged."""
    assert run(evaluated, 2) == [2 * STEPS * len(KINDS)] * 2


def in_different_modes(rank: int, m: int) -> list[str]:
    """Rank 1 evaluates by itself."""
    texts = []
    for kind in (ScheduleFree, Wrapped):
        for steps in (2, 4):
            replica = Problem(rank, kind=kind)
            optimizer = replica.optimizer
            replica.step(steps)
            if rank == 1:
                optimizer.eval()
            before = replica.held()
            for call in (optimizer.finish, optimizer.consensus().__enter__):
                with pytest.raises(ReplicaMismatchError) as caught:
                    call()
                texts.append(str(caught.value))
            assert same(before, replica.held())
            optimizer.train()
            optimizer.finish()
            assert equal_on_all_ranks(replica.vector())
    return texts


@pytest.mark.slow
def test_different_modes_are_named() -> None:
    """The mean of one rank's x and another's y is nothing."""
    zero, one = run(in_different_modes, 2)
    assert zero == one and len(zero) == 8
    for text in zero:
        assert "of rank 0 and rank 1 differ" in text and "train() or eval()" in text
