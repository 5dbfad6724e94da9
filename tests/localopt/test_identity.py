"""Several optimizers in one process: whose turn it is must be the same on all ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from localopt import (
    EASGD,
    Average,
    Constant,
    LocalAdamW,
    LocalOptimizer,
    LocalSGD,
    ReplicaMismatchError,
    Rule,
)
from tests.support import oracle
from tests.support.contract import Model, every_case, local_optimizer, new_rule, same_bits
from tests.support.entries import Entries, held
from tests.support.ranks import run
from tests.support.small_network import network, vector

pytestmark = pytest.mark.slow

H = 2
ALL = every_case()


class One:
    """An optimizer with a network of its own, and what may be asked of it."""

    def __init__(
        self, name: str, index: int, inner: str, *, seed: int = 0, wide: bool = False,
        group: Any = None,
    ) -> None:  # fmt: skip
        self.model = Model(seed=seed)
        if wide:
            self.model.first = nn.Parameter(torch.ones(29, dtype=torch.float64))
        self.optimizer = local_optimizer(
            name, index, inner, self.model, Constant(H), process_group=group
        )

    def call(self, act: str, rank: int) -> None:
        if act == "step":
            for p in self.model.parameters():
                p.grad = p.detach() - (1.0 + rank)
            self.optimizer.record_loss(float(rank))
            self.optimizer.step()
        elif act == "finish":
            self.optimizer.finish()
        else:
            with self.optimizer.consensus():
                pass


def until_they_meet(name: str, index: int, m: int) -> int:
    """Steps after which the round that ends next is one that all ranks end together."""
    every = oracle.CASES[name][index].settings_for(m).get("global_every", 1)
    return H * (2 * every - 1)


def swapped(ones: list[One], acts: tuple[str, str], rank: int, odd: int) -> str:
    """Both are called, in another order on rank ``odd``: what that rank is told, with all as it
    was. Where a mean runs behind training it is told when that lands."""
    turns = list(zip(ones, acts, strict=True))
    entries = {one: Entries(one.optimizer) for one in ones}
    if rank == odd:
        turns.reverse()
    for _ in range(1 + H + H):
        for one, act in turns:
            other = ones[0] if one is ones[1] else ones[1]
            rest = held(other.optimizer)
            try:
                one.call(act, rank)
            except ReplicaMismatchError as error:
                assert entries[one].unchanged(), (acts, str(error))
                assert same_bits(rest, held(other.optimizer)), acts
                return str(error)
    return f"{acts}: nothing"


ORDERS = [
    ("step", "step"), ("finish", "finish"), ("consensus", "consensus"),
    ("step", "finish"), ("consensus", "step"),
]  # fmt: skip


def every_order(rank: int, m: int, orders: list[tuple[str, str]]) -> dict[Any, str]:
    told = {}
    pairs = [
        (case, acts)
        for number, case in enumerate(ALL)
        for acts in (orders if case[1] == 0 else [orders[number % len(orders)]])
    ]
    for number, (case, acts) in enumerate(pairs):
        # Networks of the same and of different shapes, between rounds and within.
        wide, within = number % 2 == 0, number // 2 % 2
        group = dist.new_group()  # after an error nothing goes on in it
        ones = [One(*case, seed=i, wide=wide and i == 1, group=group) for i in (0, 1)]
        for _ in range(until_they_meet(*case[:2], m) + within):
            for one in ones:
                one.call("step", rank)
        told[case, acts, wide] = swapped(ones, acts, rank, odd=1)
    return told


def check_told(ranks: list[dict[Any, str]]) -> None:
    for case, text in ranks[0].items():
        assert all(told[case] == text for told in ranks), (case, [told[case] for told in ranks])
        assert text.startswith("different optimizers have met: "), (case, text)
        others = "ranks 0, 2, 3 with optimizer" if len(ranks) == 4 else "rank 0 with optimizer"
        assert others in text and "; rank 1 with optimizer" in text, (case, text)
        assert text.count(" parameters, the first of them ") == 2 and "56 parameters" in text


def test_another_order_is_named_on_all_ranks() -> None:
    """Every case of every rule, overlapped ones too, the first of each in all orders; nothing has
    been touched then."""
    ranks = run(every_order, 2, ORDERS)
    check_told(ranks)
    names = [text for (*_, wide), text in ranks[0].items() if wide]
    assert all("(LocalOptimizer of 85 parameters, the first of them first)" in t for t in names)


def test_another_order_is_named_where_groups_meet() -> None:
    """On four ranks, of which groups of two meet by themselves first."""
    check_told(run(every_order, 4, [("step", "step"), ("finish", "consensus")]))


# Rules of different kinds.


def different_kinds(rank: int, m: int) -> dict[Any, str]:
    told = {}
    partners = [("Average", 0, "SGD"), ("EASGD", 0, "SGD")]
    for number, (case, partner) in enumerate(itertools.product(ALL, partners)):
        if case[:2] == partner[:2]:
            continue
        acts = (("step", "step"), ("finish", "consensus"))[(number + number // 2) % 2]
        group = dist.new_group()
        ones = [One(*case, group=group), One(*partner, seed=1, group=group)]
        for _ in range(until_they_meet(*case[:2], m) + 1):
            for one in ones:
                one.call("step", rank)
        told[case, partner[0], acts] = swapped(ones, acts, rank, odd=1)
    return told


def test_rules_of_different_kinds() -> None:
    """Some wait for what they send and some do not: all tell each other in one place."""
    check_told(run(different_kinds, 2))


# In the right order.


def taking_turns(rank: int, m: int) -> None:
    """Two optimizers, as a GAN's, are what each is by itself, bit for bit."""
    for one_case, other_case in itertools.pairwise([*ALL, ALL[0]]):
        seen = []
        for together in (True, False):
            ones = One(*one_case), One(*other_case, seed=1)
            acts = ["step"] * 7 + ["consensus", "step", "finish", "consensus"] + ["step"] * 3
            if together:
                for act in acts:
                    for one in ones:
                        one.call(act, rank)
            else:
                for one in ones:
                    for act in acts:
                        one.call(act, rank)
            for one in ones:
                one.optimizer.finish()
            seen.append([held(one.optimizer) for one in ones])
        for a, b in zip(*seen, strict=True):
            assert same_bits(a, b), (one_case, other_case)


def test_in_the_same_order_all_goes_well() -> None:
    run(taking_turns, 2)


def gan(rank: int, m: int) -> list[Tensor]:
    """A generator and its critic, of different rules and periods, in turns."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(3, 4), nn.Linear(4, 1)
    first = LocalSGD(generator.parameters(), 0.05, period=Constant(3), model=generator)
    second = LocalAdamW(
        critic.parameters(), 0.01, period=Constant(2), sync=EASGD(), model=critic
    )  # fmt: skip
    torch.manual_seed(rank)
    for _ in range(13):
        made = generator(torch.randn(8, 3))
        second.zero_grad()
        loss = critic(made.detach()).mean() - critic(torch.randn(8, 4)).mean()
        loss.backward()
        second.step()
        first.zero_grad()
        (-critic(generator(torch.randn(8, 3))).mean()).backward()
        first.step()
        with first.consensus(), second.consensus():
            assert torch.isfinite(critic(made)).all()
    first.finish()
    second.finish()
    return [*generator.parameters(), *critic.parameters()]


def test_a_generator_and_its_critic() -> None:
    one, other = run(gan, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# One optimizer for each parameter, stepped in the backward pass.


class Branches(nn.Module):
    """Two layers whose gradients come in the order in which they were not called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor, flipped: bool) -> Tensor:
        first, second = (self.b, self.a) if flipped else (self.a, self.b)
        y = first(x)
        return (y * second(x)).square().sum()


def sgd(params: Any, rule: Rule) -> LocalOptimizer:
    return LocalSGD(params, 0.01, momentum=0.9, period=Constant(2), sync=rule)


def in_hooks(rank: int, m: int, case: tuple[str, int] | None, flipped: bool) -> Any:
    """``case``: of the rule that each parameter has; None: one optimizer after the pass."""
    model = Branches()
    batches = torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(rank)).double()
    optimizers = []
    for p in model.parameters() if case else ():
        own = sgd([p], new_rule(*case))
        optimizers.append(own)

        def step(p: nn.Parameter, own: LocalOptimizer = own) -> None:
            own.record_loss(1.0)
            own.step()
            own.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    one = None if case else sgd(model.parameters(), Average())
    try:
        for x in batches:
            model(x, flipped and rank == 1).backward()
            if one is not None:
                one.step()
                one.zero_grad()
    except ReplicaMismatchError as error:
        return str(error)
    for optimizer in optimizers or [one]:
        optimizer.finish()
    return vector(model)


def test_an_optimizer_for_each_parameter() -> None:
    """Stepped in hooks, in the same order everywhere, they are one optimizer."""
    expected = run(in_hooks, 2, None, False)[0]
    for seen in run(in_hooks, 2, ("Average", 0), False):
        assert torch.allclose(seen, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", [("Average", 0), ("EASGD", 0), ("Streaming", 0), ("LSGD", 0)])
def test_an_optimizer_for_each_parameter_in_another_order(case: tuple[str, int]) -> None:
    """The order of the backward pass differs on one rank: the parameters are named."""
    assert isinstance(run(in_hooks, 2, case, False)[0], Tensor)
    for told in run(in_hooks, 2, case, True):
        assert isinstance(told, str) and told.startswith("different optimizers have met: rank 0")
        assert told.count("the first of them group0.0)") == 2


# What is shared, and what is not.


def built_for_some(rank: int, m: int) -> list[Tensor]:
    """Groups of ranks number their optimizers by themselves."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    if rank < 2:  # the others have one fewer
        LocalSGD(network().parameters(), period=Constant(1), process_group=mine)
    seen = []
    for group in (mine, None):
        model = network()
        optimizer = LocalSGD(
            model.parameters(), 0.1, period=Constant(2), model=model, process_group=group
        )
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.full_like(p, float(rank))
            optimizer.step()
        optimizer.finish()
        seen.append(vector(model))
    return seen


def test_groups_of_ranks_have_numbers_of_their_own() -> None:
    ranks = run(built_for_some, 4)
    assert torch.equal(ranks[0][0], ranks[1][0]) and torch.equal(ranks[2][0], ranks[3][0])
    assert not torch.equal(ranks[0][0], ranks[2][0])
    assert all(torch.equal(ranks[0][1], other) for _, other in ranks)
