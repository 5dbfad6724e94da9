"""The contract of every rule in localopt/sync/, where a run is cut: saved and resumed, on as many
replicas or others, or going on after finish().
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from localopt import QSR, BlockMomentum, Constant, LocalOptimizer
from tests.support import oracle
from tests.support.contract import (
    LRS,
    RULES,
    SIZE,
    Model,
    cases,
    compare,
    every_rule,
    everything,
    local_optimizer,
    local_step,
    same_bits,
    stacked,
)
from tests.support.ranks import run

pytestmark = pytest.mark.slow


# Saved at any step, and resumed.


def resume_anywhere(rank: int, m: int, name: str) -> int:
    """Save after each of the first three rounds' steps; return how many were tried: of the first
    case all, of the others every second one."""
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

        for start, file in saved if index == 0 else saved[index % 2 :: 2]:
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
    assert min(run(resume_anywhere, 2, name)) >= 9 + 4 * (len(cases(name)) - 1)


# Saved on some replicas, loaded on another number of them.


def saved_between_rounds(rank: int, m: int) -> dict[Any, tuple[bool, dict, dict]]:
    """Of every case: whether replicas agree, the state then, and the state after finish()."""
    problem = oracle.Quadratics.make(m, SIZE)
    seen = {}
    for name in sorted(RULES):
        for index, inner in cases(name):
            model = Model()
            optimizer = local_optimizer(name, index, inner, model, Constant(2))
            for step in range(6):
                local_step(optimizer, model, problem, rank, step)
            agree, state = optimizer.sync.replicas_agree, optimizer.state_dict()
            rows = stacked(model.vector())
            assert torch.equal(rows[0], rows[1]) or not agree
            optimizer.finish()
            seen[name, index, inner] = agree, state, optimizer.state_dict()
    return seen


@pytest.fixture(scope="module")
def saved_on_two() -> dict[Any, tuple[bool, dict, dict]]:
    return run(saved_between_rounds, 2)[1]


def test_other_numbers_of_replicas(saved_on_two: dict[Any, tuple[bool, dict, dict]]) -> None:
    """A state of replicas that agree loads into any number of them; one of replicas that differ
    belongs to its rank, and says so."""
    for (name, index, inner), (agree, state, finished) in saved_on_two.items():
        model = Model()
        optimizer = local_optimizer(name, index, inner, model, Constant(2))
        if not agree:
            with pytest.raises(ValueError, match=r"state to load has (rank 1|world_size 2)"):
                optimizer.load_state_dict(state)
        for loadable in [state, finished] if agree else [finished]:
            optimizer.load_state_dict(loadable)
            assert optimizer.round == 3


def test_heuristic_momentum_of_other_numbers_of_replicas(
    saved_on_two: dict[Any, tuple[bool, dict, dict]],
) -> None:
    """1 - 1/m is of the replicas there are, not of those there were."""
    optimizer = local_optimizer("BlockMomentum", 0, "SGD", Model(), Constant(2))
    optimizer.load_state_dict(saved_on_two["BlockMomentum", 0, "SGD"][1])
    rule = optimizer.sync
    assert isinstance(rule, BlockMomentum) and rule.heuristic_momentum
    assert rule.outer_optimizer.param_groups[0]["momentum"] == 0.0


# After finish(), and with parameters that come later.


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
