"""A synchronisation that has failed is owed: average() makes it, and the run is what it was."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localopt import (
    LSGD,
    CollectiveError,
    Constant,
    LocalSGD,
    ReplicaMismatchError,
    SyncError,
)
from tests.support import oracle
from tests.support.contract import every_case, same_bits
from tests.support.entries import held
from tests.support.faulty import Broken, H, One
from tests.support.ranks import run

pytestmark = pytest.mark.slow

ALL = every_case()

STEPS = (4, 5)  # in rounds of three: also where fragments are due within one


def owed(rank: int, m: int, saved: list[dict[Any, Any]] | None) -> dict[Any, Any]:
    """What is held after 17 steps of a run in which all goes well, and of those in which the
    headers fail in the first synchronisation after so many steps; these go on, or where it is
    ``saved`` begin, from what there was then."""
    broken, seen = Broken(), {}

    def end(one: One) -> list[Tensor]:
        while one.optimizer._replica.round.step < 17:
            one.step(rank)
        return [*held(one.optimizer), torch.tensor(one.optimizer.traffic.syncs)]

    for case in ALL:
        if saved is None:
            seen[case] = end(One(case, h=3))
        for start in STEPS:
            one = One(case, h=3)
            if saved is None:
                for _ in range(start):
                    one.step(rank)
                broken.what = "headers"
                with pytest.raises(CollectiveError):
                    for _ in range(10):
                        one.step(rank)
                broken.what = ""
                file = io.BytesIO()
                torch.save((one.model.state_dict(), one.optimizer.state_dict()), file)
                seen[case, start, "file"] = file.getvalue()
            else:
                file = io.BytesIO(saved[rank][case, start, "file"])
                model, state = torch.load(file, weights_only=True)
                one.model.load_state_dict(model)
                one.optimizer.load_state_dict(state)
            if not one.optimizer._replica.round.remaining:
                assert one.optimizer.average()
            seen[case, start] = end(one)
    return seen


def test_what_is_owed_can_be_made() -> None:
    """Also by a run that begins from what was saved after the error: bit for bit, of all that is
    kept, a run without one. What is owed within a round comes before its next step."""
    first = run(owed, 2, None)
    files = [{key: seen[key] for key in seen if key[-1] == "file"} for seen in first]
    for ours, theirs in zip(first, run(owed, 2, files), strict=True):
        for case in ALL:
            for start in STEPS:
                assert same_bits(ours[case], ours[case, start]), (case, start)
                assert same_bits(ours[case], theirs[case, start]), (case, start)


def losses_recorded(rank: int, m: int, how: str) -> Tensor:
    """Leaders are who has the lowest losses."""
    broken = Broken()
    p = nn.Parameter(torch.ones(7, dtype=torch.float64))
    optimizer = LocalSGD([p], 0.1, momentum=0.9, period=Constant(H), sync=LSGD(c=0.5))
    for step in range(9):
        for part in how.split(", "):
            if part == "average" and step == 6:
                assert not optimizer.synced and optimizer.average()
            elif part == "loss":
                optimizer.record_loss(1.0 + (rank + step // H) % 2)
        p.grad = p.detach() - rank
        if "average" in how and step == 5:
            broken.what = "headers"
            with pytest.raises(CollectiveError):
                optimizer.step()
            broken.what = ""
        else:
            optimizer.step()
    return p.detach()


def test_a_loss_belongs_to_the_step_that_follows() -> None:
    """Also where it is recorded before average() has made what is owed."""
    well = run(losses_recorded, 2, "loss")
    for how in ("average, loss", "loss, average"):
        seen = run(losses_recorded, 2, how)
        assert all(torch.equal(a, b) for a, b in zip(well, seen, strict=True)), how


def moved(rank: int, m: int) -> None:
    """The memory of one parameter is another for a while: nothing is pulled or averaged then."""
    for case in ALL:
        one, plain = One(case), One(case)
        for each in (one, plain):
            each.until_they_meet(rank, m)
        p = one.model.weights[2]
        home = p.data
        p.data = home.clone()
        for call in (lambda o=one: o.step(rank), one.optimizer.average):
            with pytest.raises(RuntimeError, match=r"weights.2 no longer lives in the optimizer's"):
                call()
        with torch.no_grad():
            home.copy_(p)
        p.data = home
        if getattr(rule := one.optimizer.sync, "pull", 0) or getattr(rule, "p", 0):
            continue  # that has pulled what lived there no more, after the step
        plain.step(rank)
        assert one.optimizer.average()
        assert same_bits(one.goes_on(rank), plain.goes_on(rank)), case


def test_parameters_that_are_elsewhere_for_a_while() -> None:
    run(moved, 2)


# Going back after an error.


def goes_back(rank: int, m: int) -> int:
    """Rank 1 ends its run in mid-round, rank 0 goes on; then both load what they had saved."""
    answered = 0
    for case in ALL:
        one, plain = One(case), One(case)
        for each in (one, plain):
            each.until_they_meet(rank, m)
        weights, state = one.model.vector(), copy.deepcopy(one.optimizer.state_dict())
        with pytest.raises(ReplicaMismatchError, match=r"rank 1 at step \d+ with H 2 \(finish\)"):
            if rank == 1:
                one.optimizer.finish()
            for _ in range(1 + 2 * H):
                one.step(rank)
        one.model.set_vector(weights)
        one.optimizer.load_state_dict(state)
        if not oracle.CASES[case[0]][case[1]].behind:
            assert same_bits(one.goes_on(rank), plain.goes_on(rank)), case
            answered += 1
        elif rank == 0:  # a mean that the other has not launched: it would be answered by the next
            for call in one.calls(rank):
                with pytest.raises(SyncError, match="What was launched then is in flight still"):
                    call()
            assert torch.equal(one.model.vector(), weights)
    return answered


def test_going_back_after_an_error() -> None:
    """All goes on from there; not with means of other steps, where these were left in flight."""
    assert min(run(goes_back, 2)) > 15
