"""Weights that one rank has changed where all replicas should be equal are noticed, and named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localopt import BMUF, Average, Constant, DiLoCo, LocalOptimizer, LocalSGD, ReplicaMismatchError
from tests.support import oracle
from tests.support.contract import (
    Model,
    equal_on_all_ranks,
    every_case,
    local_optimizer,
    same_bits,
)
from tests.support.entries import Entries, held
from tests.support.ranks import run
from tests.support.small_network import backward, network, vector

pytestmark = pytest.mark.slow

H = 2


def meets_all(case: tuple[str, int, str], m: int) -> bool:
    """Whether all ranks meet at every synchronisation of this case."""
    return oracle.CASES[case[0]][case[1]].settings_for(m).get("group_size", m) == m


def built(case: tuple[str, int, str], **options: Any) -> tuple[Model, LocalOptimizer]:
    model = Model()
    return model, local_optimizer(*case, model, Constant(H), **options)


def steps(optimizer: LocalOptimizer, rank: int, count: int) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = (p.detach() - (1.0 + rank)) * (0.5 + i)
        optimizer.record_loss(1.0 + rank)
        optimizer.step()


def evaluate(optimizer: LocalOptimizer) -> None:
    with optimizer.consensus():
        pass


# One rank edits.


def in_place(model: Model) -> None:
    with torch.no_grad():
        for p in model.weights:
            p.mul_(0.5).add_(0.25)


def through_data(model: Model) -> None:
    for p in model.weights:
        p.data.copy_(p.data + 1e-6)


def loaded(model: Model) -> None:
    model.load_state_dict(Model(seed=5).state_dict())


def one_layer(model: Model) -> None:
    with torch.no_grad():
        model.weights[3].copy_(torch.linspace(0, 1, 33))


def one_number(model: Model) -> None:
    model.weights[1].data.neg_()


EDITS = [in_place, through_data, loaded, one_layer, one_number]


def told_of(call: Callable[[], Any]) -> str:
    """What replicas that do not fit are told; nothing where they fit."""
    try:
        call()
    except ReplicaMismatchError as error:
        return str(error)
    return ""


def edited(rank: int, m: int, ranks: set[int], finished: bool) -> dict[Any, list[str]]:
    """What is told after an edit between rounds, where replicas agree by themselves or have been
    made to: by consensus() then and within the round, and by the synchronisation that follows."""
    told = {}
    for case in every_case():
        for number, edit in enumerate(EDITS):
            if (number + case[1]) % (4 if finished else 2):
                continue  # that is tried with another case
            model, optimizer = built(case)
            steps(optimizer, rank, 3 * H)
            if finished:
                optimizer.finish()
            if not optimizer.sync.replicas_agree or not meets_all(case, m):
                continue
            if rank in ranks:
                edit(model)
            entries, before = Entries(optimizer), held(optimizer)
            texts = [told_of(lambda o=optimizer: evaluate(o))]
            assert same_bits(before, held(optimizer)), (case, edit)
            first = told_of(lambda o=optimizer: steps(o, rank, 1))  # where fragments are sent
            weights = model.vector()
            texts.append(told_of(lambda o=optimizer: evaluate(o)))
            assert torch.equal(weights, model.vector()), (case, edit)
            texts.append(first or told_of(lambda o=optimizer: steps(o, rank, 2 * H)))
            assert not texts[-1] or entries.unchanged(), (case, edit)
            if not any(texts):
                optimizer.finish()
                assert equal_on_all_ranks(model.vector()), (case, edit)
            told[case, edit.__name__] = texts
    return told


@pytest.mark.parametrize(("odd", "finished"), [(0, False), (1, True)])
def test_one_rank_edits(odd: int, finished: bool) -> None:
    """Named on all ranks, wherever replicas should be equal; nothing has been averaged."""
    zero, one = run(edited, 2, {odd}, finished)
    assert zero == one
    assert {name for (name, *_), _ in zero} >= {"Average", "BlockMomentum"}
    assert len({name for (name, *_), _ in zero}) >= (7 if finished else 3)
    for what, (between, within, at_the_end) in zero.items():
        assert "the replicas hold different weights at step 6, where all" in between, what
        for text in (within, at_the_end):
            assert "the weights of rank 0 and rank 1 differed at the start of" in text, what
        assert all("Load on all ranks alike" in t for t in (between, within, at_the_end)), what


@pytest.mark.parametrize("finished", [False, True])
def test_all_ranks_edit_alike(finished: bool) -> None:
    for told in run(edited, 2, {0, 1}, finished):
        assert told and all(texts == ["", "", ""] for texts in told.values())


def in_groups(rank: int, m: int, odd: int) -> str:
    """Groups of two, that all average together every second round."""
    case = next(c for c in every_case() if c[0] == "HierarchicalAverage" and meets_all(c, 2))
    model, optimizer = built(case)
    steps(optimizer, rank, H * oracle.CASES[case[0]][case[1]].settings_for(m)["global_every"])
    assert optimizer.sync.replicas_agree
    if rank == odd:
        one_layer(model)
    return told_of(lambda: evaluate(optimizer)) + told_of(lambda: steps(optimizer, rank, H))


def test_one_rank_of_a_group_edits() -> None:
    """All learn of it from consensus(); from the next synchronisation those that make it."""
    ranks = run(in_groups, 4, 2)
    assert all("the replicas hold different weights at step" in told for told in ranks)
    assert ["weights of rank 2 and rank 3 differed" in told for told in ranks] == [0, 0, 1, 1]


def finishes(rank: int, m: int) -> dict[Any, list[str]]:
    told = {}
    for number, case in enumerate(every_case()):
        model, optimizer = built(case)
        steps(optimizer, rank, 12)
        if not optimizer.sync.replicas_agree:
            continue
        if rank == 1:
            EDITS[number % len(EDITS)](model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.finish()
            assert equal_on_all_ranks(model.vector()), case
            told[case] = [str(w.message) for w in caught]
            optimizer.finish()
            evaluate(optimizer)
            steps(optimizer, rank, 2 * H + 1)  # nothing more is told of it
            assert len(caught) == len(told[case]), case
    return told


def test_finish_warns_and_makes_equal() -> None:
    for rank, told in enumerate(run(finishes, 2)):
        assert len({name for name, *_ in told}) >= 3
        for warned in told.values():
            assert len(warned) == 1
            assert warned[0].startswith(f"rank {rank}: the replicas held different weights at step")


# No false alarm.


def quiet(rank: int, m: int, what: str) -> Tensor:
    """Four rounds and a half of training, with what all ranks do alike."""
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(what)
    model = network().to(half or torch.float32)
    rule = {"outer": lambda: DiLoCo(0.7, 0.9), "int8": lambda: BMUF(0.5, compress="int8")}
    make: Any = rule.get(what, Average)
    buffers = what if what in ("average", "broadcast") else "keep"
    optimizer = LocalSGD(
        model.parameters(), 0.01, momentum=0.9, period=Constant(2), sync=make(), model=model,
        buffers=buffers, auto=what != "behind its back",
    )  # fmt: skip
    if what == "first round" and rank == 1:
        model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    for step in range(9):
        optimizer.zero_grad()
        if half:
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1 * rank + step)
        else:
            backward(model, 10 * rank + step)
        if what == "behind its back":
            optimizer.inner.step()
            optimizer.average()
            with torch.no_grad():
                model[0].bias.add_(1e-3 * rank)  # no round has begun
        else:
            optimizer.step()
        if what == "clamp":
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.2, 0.2)
        if what == "loaded" and step in (3, 4):
            state = model.state_dict(), optimizer.state_dict()
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        if what == "scaled" and step == 3:
            with torch.no_grad():
                model[0].weight.mul_(0.9)
        if what == "group" and step == 3:
            optimizer.add_param_group({"params": [nn.Parameter(torch.full((3,), 1.0 + rank))]})
        if what == "back" and step == 5:
            model.load_state_dict(kept)  # noqa: F821 (of step 3)
        if what == "back" and step == 3:
            kept = {name: x.clone() for name, x in model.state_dict().items()}  # noqa: F841
        if not half and what != "behind its back" and step != 6:
            evaluate(optimizer)
    optimizer.finish()
    return vector(model)


ALIKE = [
    "clamp", "average", "broadcast", "bfloat16", "float16", "group", "loaded", "first round",
    "scaled", "back", "outer", "int8", "behind its back",
]  # fmt: skip


def all_quiet(rank: int, m: int) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [quiet(rank, m, what) for what in ALIKE]


def test_no_false_alarm() -> None:
    ranks = run(all_quiet, 2)
    for what, one, other in zip(ALIKE, *ranks, strict=True):
        assert torch.equal(one, other) and torch.isfinite(one).all(), what
