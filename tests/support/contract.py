"""What the tests of every rule have in common: the rules and their cases, a model, a local step.

Rules are found in localopt/sync/, and what they are tried with in `oracle.CASES`: a new rule is
tested without being named.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import localopt.sync
from localopt import QSR, Constant, LocalOptimizer, Rule
from tests.support import oracle

SHAPES = [(7,), (), (3, 5), (33,)]  # 0-dim, and sizes that are no multiples of 16
SIZE = 7 + 1 + 15 + 33
LRS = [0.12 * 0.955**step for step in range(50)]
PERIODS = {
    "constant": (Constant(6), oracle.constant_h(6)),
    "qsr": (QSR(alpha=0.16, base=2), oracle.qsr_h(0.16, 2)),
}


def find_rules() -> dict[str, type[Rule]]:
    """The concrete rules defined in the files of localopt/sync/, by class name."""
    found: dict[str, type[Rule]] = {}
    for module in pkgutil.iter_modules(localopt.sync.__path__):
        contents = vars(importlib.import_module(f"localopt.sync.{module.name}"))
        for name, cls in contents.items():
            if isinstance(cls, type) and issubclass(cls, Rule) and not inspect.isabstract(cls):
                found[name] = cls
    return found


RULES = find_rules()
every_rule = pytest.mark.parametrize("name", sorted(RULES))


def cases(name: str) -> list[tuple[int, str]]:
    """Every (index of a case, inner optimizer) of a rule. One run of processes tries them all."""
    return [(i, inner) for i, case in enumerate(oracle.CASES[name]) for inner in case.inners]


def every_case() -> list[tuple[str, int, str]]:
    """(rule, index of a case, inner optimizer): every case of every rule once."""
    return [(n, i, case.inners[0]) for n in RULES for i, case in enumerate(oracle.CASES[n])]


class Model(nn.Module):
    """The parameters of a quadratic problem, of several shapes, and a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for shape in SHAPES
        )
        self.sizes = [p.numel() for p in self.weights]
        self.register_buffer("statistic", torch.randn(5, generator=generator))

    def vector(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.weights])

    def set_vector(self, vector: Tensor) -> None:
        with torch.no_grad():
            for p, part in zip(self.weights, vector.split(self.sizes), strict=True):
                p.copy_(part.view(p.shape))

    def set_gradient(self, gradient: Tensor) -> None:
        for p, part in zip(self.weights, gradient.split(self.sizes), strict=True):
            p.grad = part.view(p.shape).to(p.dtype)


def local_optimizer(
    name: str, index: int, inner: str, model: nn.Module, period: Any, **options: Any
) -> LocalOptimizer:
    settings = oracle.INNERS[inner][1]
    optimizer = getattr(torch.optim, inner)(model.parameters(), lr=LRS[0], **settings)
    rule = new_rule(name, index)
    return LocalOptimizer(optimizer, period, rule, model=model, **options)


def new_rule(name: str, index: int) -> Rule:
    m = dist.get_world_size() if dist.is_initialized() else 1
    return oracle.CASES[name][index].rule(RULES[name], m)


def local_step(
    optimizer: LocalOptimizer, model: Model, problem: oracle.Quadratics, rank: int, step: int
) -> None:
    """One local step on this rank's quadratic."""
    vector = model.vector()
    error = vector - torch.as_tensor(problem.b[rank]).to(vector)
    gradient = torch.as_tensor(problem.a[rank]).to(vector) @ error
    model.set_gradient(gradient)
    optimizer.param_groups[0]["lr"] = LRS[step]
    optimizer.record_loss(0.5 * error @ gradient + problem.noise[step % len(problem.noise), rank])
    optimizer.step()


def everything(optimizer: LocalOptimizer, model: nn.Module) -> list[Tensor]:
    """Copies of all parameters, buffers and optimizer state, in a fixed order."""
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers(), *state)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def stacked(tensor: Tensor) -> Tensor:
    """Every replica's, (m, d); a collective of the test's own."""
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return torch.stack(rows)


def equal_on_all_ranks(tensor: Tensor) -> bool:
    """Bitwise; a collective of the test's own, around the library."""
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor)
    return all(torch.equal(others[0], other) for other in others)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Relative in the norm of each vector; NaN fails."""
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.all(error <= tolerance), f"{what}: relative error {error.max():.2e} > {tolerance}"


def compare(
    ranks: list[dict[str, Any]], expected: oracle.Trajectory, tolerance: float, what: str
) -> None:
    """What every rank saw, with its oracle; and bits between the ranks."""
    for rank, seen in enumerate(ranks):
        where = f"{what} rank {rank}"
        told = f"{where}: rounds of {seen['hs']} end after {seen['ends']}"
        assert (seen["ends"], seen["hs"]) == (expected.ends, expected.hs), told
        assert_close(seen["x"], expected.x[:, rank], tolerance, where)
        assert_close(seen["finished"], expected.finished, tolerance, f"{where} finished")
        assert np.array_equal(seen["finished"], ranks[0]["finished"]), where
        assert np.array_equal(seen["consensus"], ranks[0]["consensus"]), where
    for end in expected.ends:
        for i, j in expected.agreeing(end):
            same = np.array_equal(ranks[i]["x"][end - 1], ranks[j]["x"][end - 1])
            assert same, f"{what}: ranks {i} and {j} differ after {end} steps"
