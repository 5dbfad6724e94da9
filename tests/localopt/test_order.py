"""Parameters in another order on some rank: found where it can be, before anything is moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from localopt import (
    EASGD,
    Average,
    Constant,
    DiLoCo,
    LayoutMismatchError,
    LocalAdamW,
    LocalOptimizer,
    LocalSGD,
    Streaming,
)
from tests.support.contract import equal_on_all_ranks, stacked
from tests.support.ranks import run

pytestmark = pytest.mark.slow

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


class Net(nn.Module):
    """Parameters of one shape, so that their order is all that can differ."""

    def __init__(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 1
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name in "abcd":
            p = nn.Parameter(1 + spread * torch.randn(3, 2).to(dtype))
            self.register_parameter(name, p)

    def step(self, optimizer: LocalOptimizer) -> None:
        for i, p in enumerate(self.parameters()):
            p.grad = p.detach() - i
        optimizer.step()


def reverse(params: list[Any], rank: int) -> list[Any]:
    return params[::-1] if rank == 1 else params


def swap(params: list[Any], rank: int) -> list[Any]:
    return [*params[:2], params[3], params[2]] if rank == 1 else params


def rotate(params: list[Any], rank: int) -> list[Any]:
    """Another order on every rank."""
    return params[rank:] + params[:rank]


def refused(rank: int, m: int, order: Callable[[list[Any], int], list[Any]]) -> list[str]:
    """What is said, for all types and several rules; the parameters stay where they are."""
    texts = []
    for dtype in DTYPES:
        for rule in (Average, DiLoCo, EASGD, lambda: Streaming(2)):
            model = Net(dtype=dtype)
            params = order(list(model.parameters()), rank)
            places = [p.data_ptr() for p in params]
            groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.2}]
            for given in (params, groups):
                with pytest.raises(LayoutMismatchError) as caught:
                    LocalSGD(given, 0.1, period=Constant(2), sync=rule())
                texts.append(str(caught.value))
            assert [p.data_ptr() for p in params] == places
        right = list(Net(dtype=dtype).parameters())
        optimizer = LocalSGD(right, 0.1, period=Constant(1))
        for p in right:
            p.grad = torch.full_like(p, float(rank))
        optimizer.step()
        assert equal_on_all_ranks(right[0].detach())
    return texts


@pytest.mark.parametrize(
    ("order", "m", "odd"),
    [(reverse, 2, "rank 1 of 2"), (swap, 3, "rank 1 of 3"), (rotate, 4, "ranks 1, 2, 3 of 4")],
    ids=["reversed", "two swapped", "rotated"],
)
def test_another_order_shows_in_the_values(order: Any, m: int, odd: str) -> None:
    """"Without names it is their order that counts, which must be the same on all ranks": all are
    told who is odd and what to do, and can build it rightly afterwards."""
    ranks = run(refused, m, order)
    for texts in ranks:
        assert texts == ranks[0] and len(texts) == len(DTYPES) * 8
        for text in texts:
            assert text == (
                f"{odd} gave the parameters in another order than rank 0: their initial values are "
                "the same, in another order. Give model=, or the parameters in one order"
            )


def with_few_that_differ(rank: int, m: int) -> list[str]:
    """A transformer's like: most start as ones or zeros; and some are equal, empty, 0-dim."""
    texts = []
    for kind in (LocalSGD, LocalAdamW):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
        params += [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.empty(0))]
        params += [nn.Parameter(torch.tensor(x)) for x in (0.5, -0.5)]
        if rank == 1:
            params[-1], params[-2] = params[-2], params[-1]
        with pytest.raises(LayoutMismatchError) as caught:
            kind(params, 0.1, period=Constant(2))
        texts.append(str(caught.value))
    return texts


def test_one_pair_is_enough() -> None:
    for texts in run(with_few_that_differ, 2):
        assert all(text.startswith("rank 1 of 2 gave the parameters in another") for text in texts)


def accepted(rank: int, m: int) -> None:
    """No order shows in these."""
    for dtype in DTYPES:
        model = Net(dtype=dtype, spread=0)
        optimizer = LocalSGD(reverse(list(model.parameters()), rank), 0.1, period=Constant(2))
        for _ in range(4):
            model.step(optimizer)
        optimizer.finish()
        first = reverse(list(model.parameters()), rank)[0]
        assert equal_on_all_ranks(first.detach()) and optimizer.round == 2

        model = Net(seed=rank, dtype=dtype)
        rank0 = [stacked(p.detach().double())[0] for p in model.parameters()]
        optimizer = LocalSGD(model.parameters(), 0.1, period=Constant(2))
        for p, value in zip(model.parameters(), rank0, strict=True):
            assert torch.equal(p.detach().double(), value), "all start as rank 0"
        for _ in range(3):
            model.step(optimizer)


def test_what_shows_no_order_is_accepted() -> None:
    """Equal constants at any places, which is not noticed; other seeds on each rank."""
    run(accepted, 3)


def by_name(rank: int, m: int) -> list[str]:
    """With names from the model, or with the parameters: also where all values are equal."""
    texts = []
    for spread in (0, 1):
        for seed in (0, rank):
            model = Net(seed, spread=spread)
            named, bare = list(model.named_parameters()), list(model.parameters())
            ways = ((bare, {"model": model}), (named, {}))
            for given, options in ways:
                with pytest.raises(LayoutMismatchError) as caught:
                    LocalSGD(reverse(given, rank), 0.1, period=Constant(2), **options)
                texts.append(str(caught.value))
            for given, options in ways:
                optimizer = LocalSGD(given, 0.1, period=Constant(1), **options)
                model.step(optimizer)
                assert all(equal_on_all_ranks(p.detach()) for p in bare)
    return texts


def test_names_show_it_whatever_the_values() -> None:
    """"Replicas know which parameter is which by its name": the first that differs is told."""
    for texts in run(by_name, 2):
        assert len(texts) == 8
        for text in texts:
            assert "rank 1 of 2 differs from rank 0: rank 1 has [d: shape (3, 2)" in text
            assert "where rank 0 has [a: shape (3, 2)" in text


class Wrapper(nn.Module):
    """Names of its own on each rank would not fit."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.register_module("net" if rank == 0 else "_orig_mod", Net())


def wrapped(rank: int, m: int) -> str:
    model = Wrapper(rank)
    with pytest.raises(LayoutMismatchError) as caught:
        LocalSGD(model.parameters(), 0.1, period=Constant(2), model=model)
    return str(caught.value)


def test_other_names_are_told() -> None:
    """As of a model that one rank alone has compiled."""
    zero, one = run(wrapped, 2)
    assert zero == one and "[_orig_mod.a: shape" in zero and "rank 0 has [net.a: shape" in zero
