"""After an error in a synchronisation a replica holds what it held before, or says it is lost.

Every case of every rule is tried; none is named.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from localopt import (
    LSGD,
    Average,
    BlockMomentum,
    CollectiveError,
    Constant,
    HierarchicalAverage,
    LocalSGD,
    NonFiniteError,
    ReplicaMismatchError,
    Streaming,
    SyncError,
    collective,
)
from tests.support import oracle
from tests.support.contract import every_case, same_bits
from tests.support.entries import Entries, held, same_or_nan
from tests.support.faulty import Broken, H, One, evaluate
from tests.support.ranks import outcomes_of, run

pytestmark = pytest.mark.slow

ALL = every_case()


# Another rank dies.


def dies_before(rank: int, m: int) -> int:
    """All are about to synchronise when rank 1 goes."""
    ones = [One(case) for case in ALL]
    for one in ones:
        one.until_they_meet(rank, m)
        one.optimizer.state_dict()  # nothing is in flight
    dist.barrier()
    if rank == 1:
        os._exit(1)
    exact = 0
    for one in ones:
        told = one.fails(rank, CollectiveError)
        assert "rank 0: the synchronisation at step" in told and "has died or hangs" in told
        assert all(torch.isfinite(p).all() for p in one.model.state_dict().values())
        *calls, state_dict = one.calls(rank)
        for call in calls:
            with pytest.raises(CollectiveError, match="has died or hangs"):
                call()
            assert one.entries.unchanged(), one.case
        try:
            state = state_dict()
        except CollectiveError as error:
            assert "has died or hangs" in str(error) and not one.optimizer.synced
            continue
        place = state["param_groups"][0]["localopt"]["replica"]
        assert place["open"], one.case
        exact += 1
    return exact


def test_another_rank_dies_before() -> None:
    (ok, exact), (lives, _) = outcomes_of(dies_before, 2)
    assert ok, exact
    assert not lives
    delayed = sum(oracle.CASES[name][index].behind for name, index, _ in ALL)
    assert exact == len(ALL) - delayed > 15, "what runs behind training cannot tell its state"


LAST_WORDS: dict[str, tuple[Callable[[], Any], str, int]] = {
    "average": (Average, "mean_", 2),
    "int8": (lambda: Average(compress="int8"), "start_exchange_shards", 2),
    "bf16, half-way": (lambda: Average(compress="bf16"), "start_gather_shards_", 2),
    "outer optimizer": (lambda: BlockMomentum(partial(torch.optim.SGD, lr=0.7)), "mean_", 2),
    "leader": (LSGD, "broadcast_", 2),
    "fragment": (lambda: Streaming(2), "start_sum_", 2),
    "groups": (lambda: HierarchicalAverage(2, 1), "mean_", 4),
}


def dies_within(rank: int, m: int, what: str) -> list[str]:
    """Rank 1 has told that it is here, and goes."""
    make, last, _ = LAST_WORDS[what]
    model = nn.Linear(500, 30)
    optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(H), sync=make(), model=model)
    entries = Entries(optimizer)

    def closure() -> float:
        for p in model.parameters():
            p.grad = p.detach() - rank
        return 1.0 - rank

    step = partial(optimizer.step, closure)

    for _ in range(2 * H):
        step()
    if rank == 1:
        original = optimizer._replica.meet

        def meet(*args: Any, **kwargs: Any) -> Any:
            headers = original(*args, **kwargs)
            setattr(collective.Collective, last, lambda *_, **__: os._exit(1))
            return headers

        optimizer._replica.meet = meet
    told = []
    calls = [step, step, step, optimizer.average, optimizer.finish, lambda: evaluate(optimizer)]
    for call in [*calls, optimizer.state_dict]:
        try:
            call()
        except SyncError as error:
            told.append(str(error))
    lost = all(bool(p.isnan().all()) for p in model.parameters())
    assert lost or entries.unchanged()
    assert len(told) >= 4 + (optimizer._replica.lost is not None)
    return [*told, f"lost {lost}"]


@pytest.mark.parametrize("what", LAST_WORDS)
def test_another_rank_dies_within(what: str) -> None:
    """Real deaths, in the midst of what is exchanged after the headers."""
    outcomes = outcomes_of(dies_within, LAST_WORDS[what][2], what)
    assert outcomes[1] == (False, "died without a word")
    for ok, told in outcomes[:1] + outcomes[2:]:
        assert ok, told
        *texts, lost = told
        assert all("has died or hangs" in text for text in texts), texts
        if lost == "lost True":
            assert all("which are NaN now. Go on from the newest checkpoint" in t for t in texts)
        else:
            assert what in ("leader", "fragment"), (what, texts)


def fails_within(rank: int, m: int) -> list[str]:
    broken, outcomes = Broken(), []
    for case in ALL:
        one, plain = One(case), One(case)
        plain.until_they_meet(rank, m)
        one.until_they_meet(rank, m)
        weights = [p.detach().clone() for p in one.model.weights]
        state = copy.deepcopy(one.optimizer.state_dict())
        broken.what = "payload"
        with pytest.raises(CollectiveError, match="Connection closed by peer"):
            for _ in range(1 + 2 * H):
                one.step(rank)
        lost = one.optimizer._replica.lost or ""
        if "which are NaN now" in lost:
            assert all(bool(p.isnan().all()) for p in one.model.weights), case
        else:
            size = len(weights) if "the parameters are what they were" in lost else None
            assert same_or_nan(one.entries.last[:size], held(one.optimizer)[:size]), case
        for call in one.calls(rank)[: None if lost else -1]:
            with pytest.raises(SyncError, match="Connection closed by peer"):
                call()
        broken.what = ""
        for call in one.calls(rank) if lost else ():
            with pytest.raises(SyncError, match="Go on from the newest checkpoint"):
                call()
        with torch.no_grad():
            for p, saved in zip(one.model.weights, weights, strict=True):
                p.copy_(saved)
        one.optimizer.load_state_dict(state)
        assert same_bits(one.goes_on(rank), plain.goes_on(rank)), case
        outcomes.append(lost)
    return outcomes


def test_what_follows_the_headers_fails() -> None:
    """Half-way, on all ranks: NaN, or what there was; and a state that is loaded goes on."""
    for outcomes in run(fails_within, 2):
        assert 10 < sum("NaN now" in lost for lost in outcomes) < len(outcomes)
        assert sum("the parameters are what they were" in lost for lost in outcomes) >= 2


# A consensus that fails.


def consensus_fails(rank: int, m: int) -> None:
    broken = Broken()
    for case in ALL:
        one, plain = One(case), One(case)
        for each in (one, plain):
            each.until_they_meet(rank, m)
            each.optimizer.state_dict()
        one.optimizer.record_loss(1.0)
        before = held(one.optimizer)
        for what in ("headers", "payload"):
            broken.what = what
            with pytest.raises(CollectiveError, match="Connection closed by peer") as caught:
                evaluate(one.optimizer)
            assert same_bits(before, held(one.optimizer)), (case, what)
            assert "NaN" not in str(caught.value)
        broken.what = ""
        with pytest.raises(ZeroDivisionError), one.optimizer.consensus():
            one.model.weights[0].data.fill_(1 / 0)
        assert same_bits(before, held(one.optimizer)), case
        with pytest.raises(ZeroDivisionError), one.optimizer.consensus():
            one.model.set_vector(one.model.vector() + 1)
            raise ZeroDivisionError
        assert same_bits(before, held(one.optimizer)), case
        one.optimizer._replica.round._step_loss = None
        assert same_bits(one.goes_on(rank), plain.goes_on(rank)), case


def test_a_consensus_that_fails_puts_the_weights_back() -> None:
    run(consensus_fails, 2)


# Replicas that do not fit.


def longer(one: One) -> None:
    one.optimizer.period = Constant(H + 1)
    one.optimizer._replica.round.h += 1
    one.optimizer._replica.round.remaining += 1


def later(one: One) -> None:
    one.optimizer._replica.round.step += 1


def slower(one: One) -> None:
    one.optimizer.param_groups[0]["lr"] *= 0.5


def nan(one: One) -> None:
    one.model.weights[2].data[1, 3] = math.nan


MISFITS: dict[str, tuple[Callable[[One], None], type[SyncError], str]] = {
    "H": (longer, ReplicaMismatchError, f"with H {H + 1} (sync)"),
    "step": (later, ReplicaMismatchError, "replicas are out of step: rank 0 at step"),
    "rate": (slower, ReplicaMismatchError, " of rank 0 and rank 1 differ: "),
    "NaN": (nan, NonFiniteError, "rank 1 brought NaN or infinity into the synchronisation at"),
}


def misfits(rank: int, m: int, dtype: torch.dtype) -> dict[Any, str]:
    told = {}
    for case in ALL:
        for what, (change, error, _) in MISFITS.items():
            one = One(case, dtype)
            one.until_they_meet(rank, m)
            if rank == 1:
                change(one)
            told[case, what] = one.fails(rank, error)
    return told


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replicas_that_do_not_fit(dtype: torch.dtype) -> None:
    zero, one = run(misfits, 2, dtype)
    assert zero == one
    for (case, what), text in zero.items():
        assert MISFITS[what][2] in text, (case, what, text)


def without_rate(rank: int, m: int) -> int:
    tried = 0
    for case in ALL:
        one = One(case)
        if not getattr(one.optimizer.sync, "normalize_by_lr", case[0] == "SlowMo"):
            continue
        for _ in range(2 * H):
            one.step(rank)
        one.optimizer.param_groups[0]["lr"] = 0.0
        for step in (6, 7):  # again, for it is owed
            told = one.fails(rank, ValueError)
            assert f"mean learning rate of the round that ended at step {step} is 0" in told
        tried += 1
    return tried


def test_a_rate_of_zero_leaves_the_weights() -> None:
    assert min(run(without_rate, 2)) >= 2


def unknown_field(rank: int, m: int) -> None:
    p = nn.Parameter(torch.ones(5))
    rule = Average(reset_fields=("exp_avg",))
    optimizer = LocalSGD([p], 0.1, momentum=0.9, period=Constant(1), sync=rule)
    entries = Entries(optimizer)
    p.grad = torch.full((5,), float(rank))
    for call in (optimizer.step, optimizer.average, optimizer.finish):
        with pytest.raises(ValueError, match="state has no field 'exp_avg'"):
            call()
        assert entries.unchanged()
    assert torch.equal(p.detach(), torch.full((5,), 1 - 0.1 * rank)), "one step, no mean"


def test_a_field_that_cannot_be_reset() -> None:
    run(unknown_field, 2)


class Stubborn(torch.optim.SGD):
    """An outer optimizer that cannot go on after its first step."""

    def step(self, closure: Any = None) -> None:
        super().step()
        if any("momentum_buffer" in s for s in self.state.values()) and self.defaults["nesterov"]:
            raise ZeroDivisionError("no more steps")


def outer_raises(rank: int, m: int) -> list[str]:
    p = nn.Parameter(torch.ones(5))
    rule = BlockMomentum(partial(Stubborn, lr=0.5, momentum=0.5))
    optimizer = LocalSGD([p], 0.1, period=Constant(1), sync=rule)
    for _ in range(2):
        p.grad = torch.ones(5)
        optimizer.step()
    rule.outer_optimizer.defaults["nesterov"] = True
    with pytest.raises(ZeroDivisionError, match="no more steps") as caught:
        optimizer.step()
    assert p.isnan().all()
    with pytest.raises(SyncError) as later:
        optimizer.step()
    return [*caught.value.__notes__, str(later.value)]


def test_an_outer_optimizer_that_raises() -> None:
    """Its own error, and what has become of the parameters."""
    for rank, (note, later) in enumerate(run(outer_raises, 2)):
        error = "failed: ZeroDivisionError('no more steps'); it had begun to overwrite the param"
        assert note == later
        assert note.startswith(f"rank {rank}: the synchronisation at step 3 {error}")
        assert note.endswith("which are NaN now. Go on from the newest checkpoint")
