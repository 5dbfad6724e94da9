"""add_param_group: accepted on all ranks, or refused on all and nothing has happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from localopt import (
    EASGD,
    LSGD,
    Average,
    CoCoDSGD,
    Constant,
    DiLoCo,
    HierarchicalAverage,
    LayoutMismatchError,
    LocalOptimizer,
    OverlapLocalSGD,
    ReplicaMismatchError,
    Rule,
    Streaming,
)
from tests.support.contract import equal_on_all_ranks, same_bits, stacked
from tests.support.ranks import run

pytestmark = pytest.mark.slow

RULES: dict[str, Callable[[], Rule]] = {
    "average": Average,
    "moments": lambda: Average(state_fields=("exp_avg",)),
    "int8": lambda: Average(compress="int8"),
    "diloco": DiLoCo,
    "easgd": EASGD,
    "cocod": CoCoDSGD,
    "overlap": OverlapLocalSGD,
    "streaming": lambda: Streaming(3, overlap=True),
    "lsgd": LSGD,
    "hierarchical": lambda: HierarchicalAverage(2, 1),
}
AGREEING = ("average", "moments", "int8", "diloco", "hierarchical")


class Run:
    """A replica on its own problem, in several types, with a buffer."""

    def __init__(self, rank: int, rule: str = "average") -> None:
        torch.manual_seed(rank)
        self.rank, self.model = rank, nn.Module()
        self.params = {
            "wide": nn.Parameter(torch.randn(7, 3)),
            "conv": nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)),
            "double": nn.Parameter(torch.randn(5).double()),
            "bfloat": nn.Parameter(torch.randn(9).bfloat16()),
        }
        for name, p in self.params.items():
            self.model.register_parameter(f"p_{name}", p)
        self.model.register_buffer("seen", torch.full((3,), float(rank)))
        inner = torch.optim.AdamW(self.params.values(), lr=0.1)
        self.optimizer = LocalOptimizer(
            inner, Constant(2), RULES[rule](), model=self.model, buffers="average"
        )
        with torch.no_grad():
            self.model.seen.fill_(rank)

    def train(self, steps: int) -> None:
        for step in range(steps):
            params = [p for g in self.optimizer.param_groups for p in g["params"]]
            for p in params:
                p.grad = p.detach() - 2 * self.rank
            self.optimizer.record_loss(float(self.rank + step))
            self.optimizer.step()

    def everything(self) -> list[Tensor]:
        state = [t for s in self.optimizer.state.values() for t in s.values()]
        return [t.detach().clone() for t in (*self.params.values(), self.model.seen, *state)]

    def figures(self) -> list[Any]:
        """What else a refusal must leave as it is."""
        groups = self.optimizer.param_groups
        own = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        ids = [[id(p) for p in group["params"]] for group in groups]
        places = [(p.data_ptr(), p.stride()) for p in self.params.values()]
        o = self.optimizer
        return [own, ids, places, o.round, o.h, o.synced, id(o._replica.flat), len(o.state)]


# Refused.


def strided(run_: Run) -> Any:
    return {"params": [nn.Parameter(torch.randn(3)), nn.Parameter(torch.zeros(8)[::2])]}


def wrong_type(run_: Run) -> Any:
    return {"params": [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]}


def duplicate(run_: Run) -> Any:
    return {"params": [nn.Parameter(torch.zeros(3)), run_.params["conv"]]}


def overlapping(run_: Run) -> Any:
    return {"params": [nn.Parameter(run_.params["wide"].data[0])]}


def equal_names(run_: Run) -> Any:
    return {"params": [("x", nn.Parameter(torch.ones(2))), ("x", nn.Parameter(torch.ones(2)))]}


REFUSED: dict[str, tuple[Callable[[Run], Any], type[Exception], str]] = {
    "strided": (strided, ValueError, r"strides \(2,\) overlaps itself or has holes"),
    "wrong type": (wrong_type, ValueError, "is torch.complex64: only 16, 32 and 64-bit"),
    "duplicate": (duplicate, ValueError, "more than one parameter group"),
    "overlapping": (overlapping, ValueError, "are distinct but share storage"),
    "not a tensor": (lambda r: {"params": [3]}, TypeError, "can only optimize Tensors"),
    "not a leaf": (
        lambda r: {"params": [r.params["wide"] * 2]}, ValueError, "can't optimize a non-leaf",
    ),
    "a set": (lambda r: {"params": {nn.Parameter(torch.ones(2))}}, TypeError, "sets"),
    "no params": (lambda r: {"lr": 0.1}, KeyError, "params"),
    "not a group": (lambda r: [nn.Parameter(torch.ones(2))], TypeError, "must be a dict"),
    "names": (equal_names, ValueError, "names"),
}  # fmt: skip


def refused(rank: int, m: int, rule: str, which: str) -> None:
    """By all ranks."""
    make, error, text = REFUSED[which]
    replica, twin = Run(rank, rule), Run(rank, rule)
    for each in (replica, twin):
        each.train(4)
    before, figures = replica.everything(), replica.figures()
    with pytest.raises(error, match=text):
        replica.optimizer.add_param_group(make(replica))
    assert same_bits(before, replica.everything()) and figures == replica.figures()
    for each in (replica, twin):
        each.train(5)
        each.optimizer.finish()
    assert same_bits(replica.everything(), twin.everything())


def all_refused(rank: int, m: int) -> int:
    pairs = [(rule, "strided") for rule in RULES] + [("average", which) for which in REFUSED]
    for rule, which in pairs:
        refused(rank, m, rule, which)
    return len(pairs)


def test_a_refused_group_has_never_been_there() -> None:
    """"Where it is refused, the optimizer is as it was": also memory, and all that follows."""
    assert run(all_refused, 2) == [len(RULES) + len(REFUSED)] * 2


def fit(run_: Run) -> Any:
    return {"params": [nn.Parameter(torch.full((6,), 1.0 + run_.rank))], "lr": 0.3}


ODD: dict[str, Callable[[Run], Any]] = {
    **{name: make for name, (make, *_) in REFUSED.items()},
    "another shape": lambda r: {"params": [nn.Parameter(torch.ones(7))]},
    "another type": lambda r: {"params": [nn.Parameter(torch.ones(6).double())]},
    "two": lambda r: {"params": [nn.Parameter(torch.ones(6)) for _ in range(2)]},
}


def refused_on_one(rank: int, m: int, rules: list[str]) -> list[str]:
    """Rank 1 brings something else; what is said."""
    texts = []
    for rule in rules:
        for name, odd in ODD.items() if rule == "average" else [("strided", strided)]:
            replica, twin = Run(rank, rule), Run(rank, rule)
            for each in (replica, twin):
                each.train(2)
            before, figures = replica.everything(), replica.figures()
            group = odd(replica) if rank == 1 else fit(replica)
            with pytest.raises(LayoutMismatchError) as caught:
                replica.optimizer.add_param_group(group)
            texts.append(str(caught.value))
            assert same_bits(before, replica.everything()), name
            assert figures == replica.figures(), name
            if isinstance(group, dict) and rank != 1:
                assert float(group["params"][0].detach().sum()) == 6 * (1 + rank)
            for each in (replica, twin):
                each.train(3)
                each.optimizer.finish()
            assert same_bits(replica.everything(), twin.everything()), name
    return texts


@pytest.mark.parametrize("m", [2, 4])
def test_a_group_that_one_rank_refuses(m: int) -> None:
    """"LayoutMismatchError: if another rank adds another group", alike on all; nothing changes."""
    ranks = run(refused_on_one, m, list(RULES) if m == 2 else ["diloco", "hierarchical"])
    assert all(texts == ranks[0] for texts in ranks)
    assert all(f"rank 1 of {m} differs from rank 0: rank 1 has" in text for text in ranks[0])
    for name, text in zip(ODD if m == 2 else [], ranks[0], strict=False):
        if name in REFUSED and name != "names":
            assert "where rank 0 has [a group that is fit]" in text, name


# By one rank alone.


def by_one_alone(rank: int, m: int) -> dict[str, tuple[str, float]]:
    """Rank 1 adds a group, the others train on: what is said on each, after how long."""
    told = {}
    for rule in RULES:
        replica = Run(rank, rule)
        replica.train(4)
        before = replica.everything()
        started = time.monotonic()
        with pytest.raises(ReplicaMismatchError) as caught:
            if rank == 1:
                replica.optimizer.add_param_group(fit(replica))
            else:
                replica.train(6)
        told[rule] = str(caught.value), time.monotonic() - started
        if rank == 1:
            assert len(replica.optimizer.param_groups) == 1 and replica.optimizer.synced
            assert same_bits(before, replica.everything())
        else:
            assert all(bool(t.isfinite().all()) for t in replica.params.values())
        dist.barrier()
    return told


def test_called_by_one_rank_alone() -> None:
    """"ReplicaMismatchError: if another rank makes another call", soon and on both."""
    zero, one = run(by_one_alone, 2)
    for rule in RULES:
        for text, seconds in (zero[rule], one[rule]):
            assert "rank 1 at step 4 with H 2 (add_group)" in text, text
            assert "rank 0 at step 6 with H 2 (sync)" in text or rule == "streaming", text
            assert seconds < 20, f"{rule}: after {seconds:.0f} s"


def with_another_optimizer(rank: int, m: int) -> str:
    """Two optimizers, and a group for the wrong one."""
    one, two = Run(rank), Run(rank)
    with pytest.raises(ReplicaMismatchError) as caught:
        (one, two)[rank].optimizer.add_param_group(fit(one))
    for replica in (one, two):
        replica.train(3)
        replica.optimizer.finish()
        assert equal_on_all_ranks(replica.params["wide"].detach())
    return str(caught.value)


def test_a_group_for_another_optimizer() -> None:
    zero, one = run(with_another_optimizer, 2)
    assert zero == one and "different optimizers have met" in zero


# Accepted, and too early.


def accepted(rank: int, m: int) -> list[str]:
    """For every rule: the new ones start as rank 0's, train and are averaged; the old stay."""
    done = []
    for rule in RULES:
        replica = Run(rank, rule)
        replica.train(4)
        assert equal_on_all_ranks(replica.params["wide"].detach()) == (rule in AGREEING), rule
        replica.optimizer.state_dict()  # waits for what is in flight
        before = [p.detach().clone() for p in replica.params.values()]
        seen, moments = replica.model.seen.clone(), len(replica.optimizer.state)
        new = [nn.Parameter(torch.randn(4).to(t)) for t in (torch.float32, torch.bfloat16)]
        new += [nn.Parameter(torch.tensor(float(rank))), nn.Parameter(torch.randn(2, 3).half().t())]
        values = [p.detach().clone() for p in new]
        replica.optimizer.add_param_group({"params": new, "lr": 0.05})
        assert same_bits(before, list(replica.params.values())), f"{rule}: the old ones"
        assert torch.equal(seen, replica.model.seen) and moments == len(replica.optimizer.state)
        assert [g["lr"] for g in replica.optimizer.param_groups] == [0.1, 0.05]
        for p, value in zip(new, values, strict=True):
            assert torch.equal(p.detach(), stacked(value)[0]) and p.stride() == value.stride()
            assert p.untyped_storage().nbytes() == p.nbytes
        replica.train(1)
        assert not torch.equal(*stacked(new[0].detach())), "trains"
        replica.train(1)
        assert equal_on_all_ranks(new[0].detach()) == (rule in AGREEING), rule
        replica.train(3)
        replica.optimizer.finish()
        assert all(equal_on_all_ranks(p.detach()) for p in [*replica.params.values(), *new]), rule
        done.append(rule)
    return done


def test_an_accepted_group_trains_and_is_averaged() -> None:
    assert run(accepted, 2) == [list(RULES)] * 2


def in_mid_round(rank: int, m: int) -> None:
    for rule in RULES:
        replica, twin = Run(rank, rule), Run(rank, rule)
        for each in (replica, twin):
            each.train(3)
        figures = replica.figures()
        with pytest.raises(RuntimeError, match=r"at step 3, 1 steps before the round ends: add"):
            replica.optimizer.add_param_group(fit(replica))
        assert figures == replica.figures()
        for each in (replica, twin):
            each.train(1)
            each.optimizer.finish()
            each.optimizer.add_param_group(fit(each))
            each.train(2)
        assert same_bits(replica.everything(), twin.everything()), rule


def test_in_mid_round_it_is_refused() -> None:
    """On all ranks, without a collective; finish() first, and it is taken."""
    run(in_mid_round, 2)
