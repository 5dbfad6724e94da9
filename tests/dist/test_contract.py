"""The contract of every rule in localopt/sync/, on 1, 2 and 4 real processes.

Rules are found in the folder, not named here. What a rule should do is its entry in
`oracle.CASES`; a rule without one fails `test_every_rule_has_an_oracle`.
"""

from __future__ import annotations

import importlib
import inspect
import io
import itertools
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import localopt.sync
from localopt import (
    QSR,
    Constant,
    LocalOptimizer,
    NonFiniteError,
    ReplicaMismatchError,
    Rule,
)
from tests.dist import oracle
from tests.dist.ranks import run

SHAPES = [(7,), (), (3, 5), (33,)]  # 0-dim, and sizes that are no multiples of 16
SIZE = 7 + 1 + 15 + 33
LRS = [0.12 * 0.955**step for step in range(50)]
PERIODS = {
    "constant": (Constant(6), oracle.constant_h(6)),
    "qsr": (QSR(alpha=0.16, base=2), oracle.qsr_h(0.16, 2)),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


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
    rule = oracle.CASES[name][index].rule(RULES[name])
    return LocalOptimizer(optimizer, period, rule, model=model, **options)


def local_step(
    optimizer: LocalOptimizer, model: Model, problem: oracle.Quadratics, rank: int, step: int
) -> None:
    """One local step on this rank's quadratic."""
    vector = model.vector()
    error = vector - torch.as_tensor(problem.b[rank]).to(vector)
    gradient = torch.as_tensor(problem.a[rank]).to(vector) @ error
    model.set_gradient(gradient)
    optimizer.param_groups[0]["lr"] = LRS[step]
    optimizer.record_loss(0.5 * error @ gradient)
    optimizer.step()


def everything(optimizer: LocalOptimizer, model: nn.Module) -> list[Tensor]:
    """Copies of all parameters, buffers and optimizer state, in a fixed order."""
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers(), *state)]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def equal_on_all_ranks(tensor: Tensor) -> bool:
    """Bitwise; a collective of the test's own, around the library."""
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor)
    return all(torch.equal(others[0], other) for other in others)


def test_every_rule_has_an_oracle() -> None:
    """"A rule = one file in localopt/sync/, covered by the contract test without being named"."""
    assert RULES, "no rule found in localopt/sync/"
    assert set(RULES) == set(oracle.CASES)
    assert all(oracle.CASES.values())


# 3. Matches its oracle.


def follow(rank: int, m: int, name: str, problem: oracle.Quadratics) -> dict:
    """Every combination of case, inner optimizer, period and type; what this rank saw."""
    seen = {}
    for (index, inner), period, dtype in itertools.product(cases(name), PERIODS, TOLERANCE):
        model = Model(dtype)
        model.set_vector(torch.as_tensor(problem.x0) + rank)  # rank 0's must win
        optimizer = local_optimizer(name, index, inner, model, PERIODS[period][0])
        xs, consensus, ends, hs = [], [], [], []
        for step in range(len(LRS)):
            fresh = optimizer.synced
            local_step(optimizer, model, problem, rank, step)
            if fresh:
                hs.append(optimizer.h)
            xs.append(model.vector().double().numpy().copy())
            if optimizer.synced:
                ends.append(step + 1)
            if dtype == torch.float64 and step % 4 == 1:
                before = everything(optimizer, model)
                with optimizer.consensus():
                    consensus.append(model.vector().numpy().copy())
                assert same_bits(before, everything(optimizer, model)), f"not restored: {step}"
        rounds = optimizer.round
        optimizer.finish()
        assert optimizer.synced and optimizer.round == len(hs) and rounds == len(ends)
        seen[index, inner, period, dtype] = {
            "x": np.stack(xs),
            "consensus": np.array(consensus),
            "ends": ends,
            "hs": hs,
            "finished": model.vector().double().numpy().copy(),
        }
    return seen


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Relative in the norm of each vector; NaN fails."""
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.all(error <= tolerance), f"{what}: relative error {error.max():.2e} > {tolerance}"


@pytest.mark.parametrize("m", [1, 2, 4])
@every_rule
def test_matches_its_oracle(name: str, m: int) -> None:
    """"Matches its oracle … on heterogeneous quadratics over ≥ 8 rounds …: 1e-12 relative in the
    norm with float64 parameters, 1e-5 with float32; every rank compared; NaN fails". Where
    replicas agree after a round, they do bitwise; after finish() all do."""
    problem = oracle.Quadratics.make(m, SIZE, seed=m)
    ranks = run(follow, m, name, problem, timeout=100)
    for (index, inner), period, dtype in itertools.product(cases(name), PERIODS, TOLERANCE):
        case, tolerance = oracle.CASES[name][index], TOLERANCE[dtype]
        expected = oracle.simulate(case, inner, PERIODS[period][1], problem, LRS)
        assert len(expected.ends) >= 8 and expected.ends[-1] < len(LRS), "finish() in mid-round"
        first = ranks[0][index, inner, period, dtype]
        for rank, everything_seen in enumerate(ranks):
            seen = everything_seen[index, inner, period, dtype]
            what = f"case {index} {inner} {period} {dtype} rank {rank}"
            assert (seen["ends"], seen["hs"]) == (expected.ends, expected.hs), what
            assert_close(seen["x"], expected.x[:, rank], tolerance, what)
            assert_close(seen["finished"], expected.finished, tolerance, f"{what} finished")
            assert np.array_equal(seen["finished"], first["finished"]), what
            assert np.array_equal(seen["consensus"], first["consensus"]), what
            if RULES[name].replicas_agree:
                ends = np.array(expected.ends) - 1
                assert np.array_equal(seen["x"][ends], first["x"][ends]), what
            if dtype == torch.float64:
                wanted = expected.consensus[1::4]
                assert_close(seen["consensus"], wanted, tolerance, f"{what} consensus")


# 2. No collective inside a round.


def count_collectives(rank: int, m: int, name: str) -> list[dict[str, list[int]]]:
    """Collectives launched by each step, consensus and finish, at two levels.

    The process group's sequence number counts whatever is launched, by any way and thread; the
    functions of torch.distributed are wrapped to name it.
    """
    called: list[str] = []
    for function in dir(dist):
        original = getattr(dist, function)
        if inspect.isfunction(original) and not function.startswith(("is_", "get_", "_")):
            setattr(dist, function, counting(original, called))
    group = dist.group.WORLD

    def launched(action: Any) -> int:
        called.clear()
        before = group._get_sequence_number_for_group()
        action()
        number = group._get_sequence_number_for_group() - before
        assert len(called) == number, called
        return number

    assert launched(lambda: dist.all_reduce(torch.ones(1))) == 1, "the counters are blind"
    return [count_case(rank, name, index, inner, launched) for index, inner in cases(name)]


def count_case(
    rank: int, name: str, index: int, inner: str, launched: Callable[[Any], int]
) -> dict[str, list[int]]:
    model = Model(torch.float32)
    model.weights.append(nn.Parameter(torch.ones(3, dtype=torch.float64)))  # a second type
    optimizer = local_optimizer(name, index, inner, model, Constant(3))
    counts: dict[str, list[int]] = {"step": [], "mid": [], "boundary": [], "finish": []}

    def evaluate() -> None:
        with optimizer.consensus():
            pass

    for step in range(12):
        for p in model.parameters():
            p.grad = torch.full_like(p, rank + 1.0)
        optimizer.record_loss(torch.tensor(float(rank)))
        counts["step"].append(launched(optimizer.step))
        if step >= 6:  # the first two rounds show that nothing else happens
            counts["boundary" if optimizer.synced else "mid"].append(launched(evaluate))
    counts["finish"].append(launched(optimizer.finish))
    optimizer.step()
    counts["finish"].append(launched(optimizer.finish))
    return counts


def counting(function: Any, called: list[str]) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        called.append(function.__name__)
        return function(*args, **kwargs)

    return wrapped


@every_rule
def test_no_collective_inside_a_round(name: str) -> None:
    """"Zero collectives inside a round, counted"; one per type and synchronisation, and 0 at a
    boundary, 1 in mid-round, for consensus()."""
    dtypes = 2
    for rank_counts in run(count_collectives, 2, name):
        for (index, inner), counts in zip(cases(name), rank_counts, strict=True):
            case = oracle.CASES[name][index]
            at_boundary = 0 if RULES[name].replicas_agree else dtypes
            assert counts == {
                "step": [0, 0, case.collectives * dtypes] * 4,
                "mid": [dtypes] * 4,
                "boundary": [at_boundary] * 2,
                "finish": [case.finish_collectives * dtypes] * 2,
            }, (index, inner)


# 5. Save at any step, resume.


def resume_anywhere(rank: int, m: int, name: str) -> int:
    """Save after each of the first three rounds' steps; return how many were tried."""
    problem = oracle.Quadratics.make(m, SIZE, seed=3)
    period = QSR(alpha=0.16, base=3)
    steps, tried = 20, 0
    for index, inner in cases(name):
        saved, final, last = [], [], None
        model = Model()
        optimizer = local_optimizer(name, index, inner, model, period, track_drift=True)
        for step in range(steps):
            local_step(optimizer, model, problem, rank, step)
            if optimizer.round < 3 or optimizer.synced:
                file = io.BytesIO()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, file)
                saved.append((step + 1, file))
        final, last = everything(optimizer, model), optimizer
        assert last.round >= 4 and not last.synced
        for start, file in saved:
            file.seek(0)
            state = torch.load(file, weights_only=True)
            model = Model(seed=7)
            optimizer = local_optimizer(name, index, inner, model, period, track_drift=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for step in range(start, steps):
                local_step(optimizer, model, problem, rank, step)
            assert same_bits(final, everything(optimizer, model)), f"resumed at step {start}"
            for key in ("round", "h", "synced", "drift"):
                assert getattr(optimizer, key) == getattr(last, key), (key, start)
            for key in ("syncs", "bytes"):
                assert getattr(optimizer.traffic, key) == getattr(last.traffic, key), (key, start)
            tried += 1
    return tried


@every_rule
def test_resume_at_any_step(name: str) -> None:
    """"Save at any step (mid-round, collective in flight) and resume ≡ uninterrupted, bitwise"."""
    assert min(run(resume_anywhere, 2, name, timeout=100)) >= 9 * len(cases(name))


# 6. Parameters of every kind.


class Odd(nn.Module):
    """Frozen, tied, channels_last, 0-dim, empty, sometimes unused, and of four types."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.first = nn.Linear(5, 4)
        self.tied = nn.Linear(5, 4)
        self.tied.weight = self.first.weight
        self.conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
        self.transposed = nn.Parameter(torch.randn(4, 6).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.randn(9))
        self.low = nn.Parameter(torch.randn(13).bfloat16())
        self.sixteen = nn.Parameter(torch.randn(17).half())
        self.high = nn.Parameter(torch.randn(11).double())


def odd_parameters(rank: int, m: int, name: str) -> None:
    for index, inner in cases(name):
        odd_case(rank, name, index, inner)


def odd_case(rank: int, name: str, index: int, inner: str) -> None:
    model = Odd()
    strides = [p.stride() for p in model.parameters()]
    frozen = model.frozen.clone()
    optimizer = local_optimizer(name, index, inner, model, Constant(2))
    generator = torch.Generator().manual_seed(rank)
    for _ in range(6):
        for p in model.parameters():
            p.grad = None
            if p.requires_grad and not (p is model.unused and rank == 0):
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.record_loss(torch.tensor(1.0 + rank))
        optimizer.step()
    optimizer.finish()
    for p, stride in zip(model.parameters(), strides, strict=True):
        assert p.stride() == stride
        assert p.numel() == 0 or p.data_ptr() % 64 == 0
        assert torch.isfinite(p).all()
        assert equal_on_all_ranks(p.detach().contiguous())
    assert model.tied.weight is model.first.weight
    assert torch.allclose(model.frozen, frozen, rtol=1e-6)
    with torch.no_grad():
        model.unused -= torch.randn(9, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model.unused, Odd().unused), "the other replica has moved it"


@every_rule
def test_parameters_of_every_kind(name: str) -> None:
    """"Frozen, unused (grad None on some replicas), tied, channels_last, 0-dim, mixed-dtype
    parameters work … Each parameter is aligned to 64 bytes in its flat buffer." """
    run(odd_parameters, 2, name)


# 7, 8. Replicas that do not fit.


BATCHES = [(7, 8), (6, 9), (9, 8)]  # of rank 0 and rank 1, in rounds of 3
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


def one_batch_short(rank: int, m: int, name: str) -> list[str]:
    messages = []
    problem = oracle.Quadratics.make(m, SIZE)
    for (index, inner), batches in itertools.product(cases(name), BATCHES):
        model = Model()
        optimizer = local_optimizer(name, index, inner, model, Constant(3))
        with pytest.raises(ReplicaMismatchError) as caught:
            for step in range(batches[rank]):
                local_step(optimizer, model, problem, rank, step)
            optimizer.finish()
        messages.append(str(caught.value))
    return messages


@every_rule
def test_unequal_numbers_of_batches(name: str) -> None:
    """"Replicas that disagree on step or H are detected at the next boundary and named"."""
    messages, others = run(one_batch_short, 2, name)
    assert messages == others
    for message in messages:
        assert "rank 0 at step" in message and "rank 1 at step" in message
        assert "(finish)" in message


def one_goes_bad(rank: int, m: int, name: str) -> list[str]:
    messages = []
    problem = oracle.Quadratics.make(m, SIZE)
    for (index, inner), value in itertools.product(cases(name), NON_FINITE):
        model = Model(torch.float32)
        optimizer = local_optimizer(name, index, inner, model, Constant(2))
        with pytest.raises(NonFiniteError) as caught:
            for step in range(8):
                if step == 2 and rank == 1:
                    with torch.no_grad():
                        model.weights[2][1, 3] = value
                local_step(optimizer, model, problem, rank, step)
        messages.append(str(caught.value))
    return messages


@every_rule
def test_non_finite_replica_is_named(name: str) -> None:
    """"Non-finite parameters are detected at the boundary and named"."""
    messages, others = run(one_goes_bad, 2, name)
    assert messages == others
    for message in messages:
        assert message.startswith("rank 1 brought NaN or infinity")
        assert "weights.2" in message
