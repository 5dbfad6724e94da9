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
from torch.distributed import distributed_c10d

import localopt.sync
from localopt import (
    QSR,
    Constant,
    LocalOptimizer,
    NonFiniteError,
    ReplicaMismatchError,
    Rule,
)
from tests.support import oracle
from tests.support.ranks import run

pytestmark = pytest.mark.slow

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


def meeting_cases(name: str, m: int) -> list[tuple[int, str]]:
    """Those in which all replicas meet at every synchronisation, not in groups."""
    settings = [case.settings_for(m) for case in oracle.CASES[name]]
    return [(i, inner) for i, inner in cases(name) if settings[i].get("group_size", m) == m]


WITH_GROUPS = {name for name in RULES if any(callable(c.settings) for c in oracle.CASES[name])}


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


def evaluate(optimizer: LocalOptimizer) -> None:
    with optimizer.consensus():
        pass


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def equal_on_all_ranks(tensor: Tensor) -> bool:
    """Bitwise; a collective of the test's own, around the library."""
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor)
    return all(torch.equal(others[0], other) for other in others)


def test_every_rule_has_an_oracle() -> None:
    """A new file in localopt/sync/ is tested without being named here, once it has an oracle."""
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
        double = dtype == torch.float64
        optimizer = local_optimizer(
            name, index, inner, model, PERIODS[period][0], track_drift=double
        )
        xs, consensus, ends, hs, drifts = [], [], [], [], []
        for step in range(len(LRS)):
            fresh = optimizer.synced
            local_step(optimizer, model, problem, rank, step)
            if fresh:
                hs.append(optimizer.h)
            xs.append(model.vector().double().numpy().copy())
            if optimizer.synced:
                ends.append(step + 1)
                drifts.append(optimizer.drift)
            if double and step % 4 == 1:
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
            "drifts": drifts,
            "finished": model.vector().double().numpy().copy(),
        }
    return seen


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Relative in the norm of each vector; NaN fails."""
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.all(error <= tolerance), f"{what}: relative error {error.max():.2e} > {tolerance}"


@pytest.mark.parametrize("m", [0, 1, 2, 4])
@every_rule
def test_matches_its_oracle(name: str, m: int) -> None:
    """Every rank, step and consensus against the oracle, relative in the norm. Replicas that should
    be equal after a round are so bitwise; after finish() all are.

    0: one replica, without torch.distributed.
    """
    problem = oracle.Quadratics.make(m or 1, SIZE, seed=m)
    ranks = run(follow, m, name, problem, timeout=100) if m else [follow(0, 1, name, problem)]
    for (index, inner), period, dtype in itertools.product(cases(name), PERIODS, TOLERANCE):
        case = oracle.CASES[name][index]
        expected = oracle.simulate(case, inner, PERIODS[period][1], problem, LRS)
        assert len(expected.ends) >= 8 and expected.ends[-1] < len(LRS), "finish() in mid-round"
        seen = [everything_seen[index, inner, period, dtype] for everything_seen in ranks]
        what = f"case {index} {inner} {period} {dtype}"
        coarse = case.coarse if dtype == torch.float32 else 0.0
        compare(seen, expected, max(TOLERANCE[dtype], coarse), what)
        if dtype == torch.float64:
            drifts = np.array(expected.drifts)[: len(expected.ends) - case.delay]
            for rank, of_rank in enumerate(seen):
                consensus = expected.consensus[1::4]
                assert_close(of_rank["consensus"], consensus, TOLERANCE[dtype], what)
                assert of_rank["drifts"][: case.delay] == [None] * case.delay, what
                arrived = np.array(of_rank["drifts"][case.delay :], dtype=float)  # None is NaN
                assert np.allclose(arrived, drifts[:, rank], rtol=1e-8, atol=1e-6), what


def compare(
    ranks: list[dict[str, Any]], expected: oracle.Trajectory, tolerance: float, what: str
) -> None:
    """What every rank saw, with its oracle; and bits between the ranks."""
    for rank, seen in enumerate(ranks):
        where = f"{what} rank {rank}"
        assert (seen["ends"], seen["hs"]) == (expected.ends, expected.hs), where
        assert_close(seen["x"], expected.x[:, rank], tolerance, where)
        assert_close(seen["finished"], expected.finished, tolerance, f"{where} finished")
        assert np.array_equal(seen["finished"], ranks[0]["finished"]), where
        assert np.array_equal(seen["consensus"], ranks[0]["consensus"]), where
    for end in expected.ends:
        for i, j in expected.agreeing(end):
            same = np.array_equal(ranks[i]["x"][end - 1], ranks[j]["x"][end - 1])
            assert same, f"{what}: ranks {i} and {j} differ after {end} steps"


def test_oracles_show_what_they_should() -> None:
    """A leader that never changes, replicas that never differ: nothing would be compared."""
    for m in (2, 4):
        problem = oracle.Quadratics.make(m, SIZE, seed=m)
        for case, (_, period) in itertools.product(oracle.CASES["LSGD"], PERIODS.values()):
            run_ = oracle.simulate(case, case.inners[0], period, problem, LRS)
            rule = run_.rule
            assert isinstance(rule, oracle.Leader)
            assert len({*rule.lowest}) > 1, f"one leader throughout: {rule.lowest}"
            assert rule.lowest != rule.lowest_last, "by the last loss as well as by the mean"
        for name, cases_ in oracle.CASES.items():
            for case in cases_:
                run_ = oracle.simulate(case, case.inners[0], PERIODS["qsr"][1], problem, LRS)
                assert max(np.max(run_.drifts, axis=0)) > 0.1, name


# 2. No collective inside a round.


def count_collectives(rank: int, m: int, name: str) -> list[dict[str, list[int]]]:
    """Collectives launched by each step, consensus and finish, at two levels.

    The sequence numbers of the process groups count whatever is launched, by any way and thread;
    the functions of torch.distributed are wrapped to name it.
    """
    called: list[str] = []
    for function in dir(dist):
        original = getattr(dist, function)
        if inspect.isfunction(original) and not function.startswith(("is_", "get_", "_")):
            setattr(dist, function, counting(original, called))

    def launched(action: Any) -> int:
        called.clear()
        groups = list(distributed_c10d._world.pg_map)
        before = [group._get_sequence_number_for_group() for group in groups]
        action()
        assert list(distributed_c10d._world.pg_map) == groups, "groups are made at construction"
        after = [group._get_sequence_number_for_group() for group in groups]
        number = sum(after) - sum(before)
        messages = called.count("isend")
        assert called.count("irecv") == messages, called
        assert len(called) == number, called
        return number - 2 * messages + messages // (m - 1)  # one to each other: one collective

    ones = torch.ones(1)
    assert launched(lambda: dist.all_reduce(ones)) == 1, "the counters are blind"
    later = []
    assert launched(lambda: later.append(dist.all_reduce(ones, async_op=True))) == 1
    assert launched(later[0].wait) == 0, "counted where it is launched"
    return [count_case(rank, m, name, index, inner, launched) for index, inner in cases(name)]


def count_case(
    rank: int, m: int, name: str, index: int, inner: str, launched: Callable[[Any], int]
) -> dict[str, list[int]]:
    problem = oracle.Quadratics.make(m, SIZE)
    model = Model(torch.float32)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))  # a second type
    model.register_parameter("extra", extra)
    optimizer = local_optimizer(name, index, inner, model, Constant(3))
    counts: dict[str, list[int]] = {"step": [], "mid": [], "boundary": [], "finish": []}
    for step in range(18):
        extra.grad = torch.full_like(extra, rank + 1.0)
        counts["step"].append(
            launched(lambda step=step: local_step(optimizer, model, problem, rank, step))
        )
        if step >= 6:  # the first two rounds show that nothing else happens
            place = "boundary" if optimizer.synced else "mid"
            counts[place].append(launched(lambda: evaluate(optimizer)))
    counts["finish"].append(launched(optimizer.finish))
    local_step(optimizer, model, problem, rank, 18)
    counts["finish"].append(launched(optimizer.finish))
    return counts


def counting(function: Any, called: list[str]) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        called.append(function.__name__)
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("name", "m"), [*((name, 2) for name in sorted(RULES)), *((n, 4) for n in sorted(WITH_GROUPS))]
)
def test_no_collective_inside_a_round(name: str, m: int) -> None:
    """No collective but at a round's end: one per type and synchronisation, and for consensus()
    where replicas differ, unless the rule's case says otherwise."""
    dtypes = 2
    problem = oracle.Quadratics.make(m, SIZE)

    def number(launches: tuple[int, int]) -> int:
        return launches[0] + launches[1] * dtypes

    for rank_counts in run(count_collectives, m, name):
        for (index, inner), counts in zip(cases(name), rank_counts, strict=True):
            case = oracle.CASES[name][index]
            expected = oracle.simulate(case, inner, oracle.constant_h(3), problem, LRS[:18])
            launches = case.launches_for(m)
            syncs = itertools.islice(itertools.cycle(launches.syncs), 6)
            agree = [len(expected.agreeing(end)) == m * (m - 1) // 2 for end in (9, 12, 15, 18)]
            consensus = number(launches.consensus)
            assert counts == {
                "step": [number(n) for sync in syncs for n in (*launches.steps, sync)],
                "mid": [consensus] * 8,
                "boundary": [number(launches.agreeing) if a else consensus for a in agree],
                "finish": [number(launches.finish)] * 2,
            }, (index, inner)


# 5. Save at any step, resume.


def resume_anywhere(rank: int, m: int, name: str) -> int:
    """Save after each of the first three rounds' steps; return how many were tried."""
    problem = oracle.Quadratics.make(m, SIZE, seed=3)
    period = QSR(alpha=0.16, base=3)
    steps, tried = 20, 0
    for index, inner in cases(name):

        def new(seed: int, case: tuple = (index, inner)) -> tuple[Model, LocalOptimizer]:
            model = Model(seed=seed)
            return model, local_optimizer(name, *case, model, period, track_drift=True)

        def end(model: Model, optimizer: LocalOptimizer) -> list[Any]:
            """All there is after the last step, and after finish()."""
            last = [everything(optimizer, model), figures(optimizer)]
            optimizer.finish()
            return [*last, everything(optimizer, model), figures(optimizer), optimizer.drift]

        model, optimizer = new(0)
        saved = []
        for step in range(steps):
            local_step(optimizer, model, problem, rank, step)
            if optimizer.round < 3 or optimizer.synced:
                file = io.BytesIO()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, file)
                saved.append((step + 1, file))
        assert optimizer.round >= 4 and not optimizer.synced
        final = end(model, optimizer)

        model, optimizer = new(0)
        for step in range(steps):
            local_step(optimizer, model, problem, rank, step)
        assert same(final, end(model, optimizer)), f"case {index}: saving has changed the run"

        for start, file in saved:
            file.seek(0)
            state = torch.load(file, weights_only=True)
            model, optimizer = new(7)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for step in range(start, steps):
                local_step(optimizer, model, problem, rank, step)
            assert same(final, end(model, optimizer)), f"case {index}: resumed at step {start}"
            tried += 1
    return tried


def figures(optimizer: LocalOptimizer) -> list[Any]:
    traffic = optimizer.traffic
    return [optimizer.round, optimizer.h, optimizer.synced, traffic.syncs, traffic.bytes]


def same(a: list[Any], b: list[Any]) -> bool:
    return same_bits(a[0], b[0]) and same_bits(a[2], b[2]) and (a[1], a[3:]) == (b[1], b[3:])


@every_rule
def test_resume_at_any_step(name: str) -> None:
    """Resumed from any step, with or without a collective in flight, a run ends with the bits of
    one that was not interrupted; also of one never saved, though saving waits for the flight."""
    assert min(run(resume_anywhere, 2, name, timeout=100)) >= 9 * len(cases(name))


# The run goes on: after finish(), with parameters that come later, and with one rule.


def go_on(rank: int, m: int, name: str, problem: oracle.Quadratics) -> dict:
    seen = {}
    for index, inner in cases(name):
        model = Model()
        model.set_vector(torch.as_tensor(problem.x0))
        optimizer = local_optimizer(name, index, inner, model, Constant(6))
        later: list[nn.Parameter] = []
        xs, ends, hs, finished = [], [], [], []
        for step in range(len(LRS)):
            if step in LATER:
                assert optimizer.synced
                later.append(nn.Parameter(torch.full((3,), 1.0 + rank, dtype=LATER[step])))
                # No gradient moves it, and no decay: only an anchor that is not its own would.
                optimizer.add_param_group({"params": [later[-1]], "weight_decay": 0.0})
            if optimizer.synced:
                hs.append(6)
            for p in later:
                p.grad = torch.zeros_like(p)
            local_step(optimizer, model, problem, rank, step)
            xs.append(model.vector().numpy().copy())
            if optimizer.synced:
                ends.append(step + 1)
            if step + 1 in FINISHES:
                optimizer.finish()
                assert optimizer.synced
                finished.append(model.vector().numpy().copy())
            for p in later:
                assert torch.allclose(p, torch.ones_like(p), rtol=1e-6), (step, p)
        optimizer.finish()
        finished.append(model.vector().numpy().copy())
        seen[index, inner] = {
            "x": np.stack(xs),
            "consensus": np.zeros(0),
            "ends": ends,
            "hs": hs,
            "finished": np.stack(finished),
        }
    return seen


FINISHES = (8, 20)  # in mid-round, and at its end
LATER = {14: torch.float64, 32: torch.float32}


@every_rule
def test_goes_on_after_finish_and_add_param_group(name: str) -> None:
    """After finish() training goes on from equal replicas. Parameters added between rounds change
    nothing for the others: what the rule keeps of them survives, and so does their trajectory."""
    m = 2
    problem = oracle.Quadratics.make(m, SIZE, seed=5)
    ranks = run(go_on, m, name, problem)
    for index, inner in cases(name):
        case, period = oracle.CASES[name][index], oracle.constant_h(6)
        expected = oracle.simulate(case, inner, period, problem, LRS, FINISHES)
        assert set(LATER) < {*expected.ends}
        seen = [everything_seen[index, inner] for everything_seen in ranks]
        compare(seen, expected, 1e-12, f"case {index} {inner}")
        if len(expected.agreeing(20)) == 1:  # they were equal: finish() has nothing to change
            assert np.array_equal(seen[0]["finished"][1], seen[0]["x"][19])


@every_rule
def test_a_rule_has_one_optimizer(name: str) -> None:
    """"A rule belongs to one optimizer": a second one would mix their anchors."""
    for index, inner in cases(name):
        optimizer = local_optimizer(name, index, inner, Model(), Constant(2))
        parameters = Model().parameters()
        with pytest.raises(ValueError, match="already belongs to an optimizer"):
            LocalOptimizer(torch.optim.SGD(parameters, 0.1), Constant(2), optimizer.sync)


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
        optimizer.record_loss(torch.tensor(2.0 - rank))  # rank 1 leads
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
    """Whatever the parameters, they keep their strides, start at multiples of 64 bytes, and are
    averaged whether or not a replica has a gradient for them."""
    run(odd_parameters, 2, name)


# 7, 8. Replicas that do not fit.


BATCHES = [(7, 8), (6, 9), (9, 8), (13, 8)]  # of rank 0 and rank 1, in rounds of 3
NON_FINITE = [float("nan"), float("inf"), -float("inf")]


def one_batch_short(rank: int, m: int, name: str) -> list[tuple[str, int]]:
    seen = []
    problem = oracle.Quadratics.make(m, SIZE)
    for (index, inner), batches in itertools.product(meeting_cases(name, m), BATCHES):
        model = Model()
        optimizer = local_optimizer(name, index, inner, model, Constant(3))
        done = 0
        with pytest.raises(ReplicaMismatchError) as caught:
            for step in range(batches[rank]):
                done = step + 1
                local_step(optimizer, model, problem, rank, step)
            optimizer.finish()
        seen.append((str(caught.value), done))
    return seen


@every_rule
def test_unequal_numbers_of_batches(name: str) -> None:
    """Named on every rank at the next boundary; one round late where the rule overlaps."""
    ranks = run(one_batch_short, 2, name)
    tried = itertools.product(meeting_cases(name, 2), BATCHES)
    for ((index, _), batches), zero, one in zip(tried, *ranks, strict=True):
        (message, step), (other, other_step) = zero, one
        assert message == other
        assert "rank 0 at step" in message and "rank 1 at step" in message
        assert "(finish)" in message
        if batches == (13, 8):
            assert (step, other_step) == (oracle.CASES[name][index].noticed_at()[0], 8)


def one_goes_bad(rank: int, m: int, name: str) -> list[tuple[str, int]]:
    seen = []
    problem = oracle.Quadratics.make(m, SIZE)
    for (index, inner), value in itertools.product(meeting_cases(name, m), NON_FINITE):
        model = Model(torch.float32)
        optimizer = local_optimizer(name, index, inner, model, Constant(2))
        done = 0
        with pytest.raises(NonFiniteError) as caught:
            for step in range(8):
                if step == 2 and rank == 1:
                    with torch.no_grad():
                        model.weights[2][1, 3] = value
                done = step + 1
                local_step(optimizer, model, problem, rank, step)
        seen.append((str(caught.value), done))
    return seen


@every_rule
def test_non_finite_replica_is_named(name: str) -> None:
    """Named on every rank at the next boundary; one round late where the rule overlaps."""
    ranks = run(one_goes_bad, 2, name)
    tried = itertools.product(meeting_cases(name, 2), NON_FINITE)
    for ((index, _), _), zero, one in zip(tried, *ranks, strict=True):
        assert zero == one
        message, step = zero
        assert step == oracle.CASES[name][index].noticed_at()[1]
        assert message.startswith("rank 1 brought NaN or infinity")
        assert "weights.2" in message
