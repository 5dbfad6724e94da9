"""Parameters as views of flat buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from localopt import Constant, LocalSGD
from localopt.entry import Entry
from localopt.flat import ALIGNMENT, Flat
from localopt.fragments import Fragments

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def finite(flat: Flat) -> bool:
    return bool(torch.isfinite(flat.total()))


def flat_of(*params: nn.Parameter, **settings: Any) -> Flat:
    return Flat([(f"p{i}", p) for i, p in enumerate(params)], **settings)


@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPES), st.randoms()),
        min_size=1,
        max_size=8,
    ),
    world_size=st.integers(1, 5),
)
@settings(max_examples=80, deadline=None)
def test_layout(shapes: list[Any], world_size: int) -> None:
    """Values, shapes and strides (of any permutation) survive; "each parameter is aligned to 64
    bytes", "looks like one with a storage of its own"; no two overlap; one buffer per type."""
    params = []
    for shape, dtype, random in shapes:
        order = random.sample(range(len(shape)), len(shape))
        params.append(nn.Parameter(torch.randn(shape).to(dtype).permute(order)))
    before = [(p.shape, p.stride(), p.detach().clone()) for p in params]
    flat = flat_of(*params, world_size=world_size)
    assert len(flat.buffers) == len({p.dtype for p in params})
    for i, (p, (shape, stride, value)) in enumerate(zip(params, before, strict=True)):
        assert (p.shape, p.stride()) == (shape, stride)
        assert torch.equal(p, value), "moved whole"
        assert p.is_leaf and p.requires_grad
        if p.numel():
            assert (p.data_ptr() - flat.buffers[0].data.data_ptr()) % p.element_size() == 0
            assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
            assert p.untyped_storage().data_ptr() == p.data_ptr()
            assert p.data_ptr() % ALIGNMENT == 0
        p.data.fill_(i + 2)
    for i, p in enumerate(params):
        assert (p == i + 2).all(), "overlaps another"
    held = sum(int((b.params != 0).sum()) for b in flat.buffers)
    assert held == sum(p.numel() for p in params), "gaps are zeros"
    assert all(torch.equal(b.params, b.averaged) for b in flat.buffers), "nothing lies beside"
    flat.check_pointers()


@pytest.mark.parametrize("size", [15, 16, 17, 32])
def test_all_that_lies_beside_is_there(size: int) -> None:
    """Also the last element, where what is beside the parameters fills its place to the end."""
    p = nn.Parameter(torch.ones(3))
    for from_rank0 in (False, True):
        entry = Entry.like("it", torch.zeros(size), from_rank0=from_rank0)
        flat = flat_of(p, extra=[entry], world_size=2)
        (buffer,) = flat.buffers
        buffer.extra.fill_(7)
        assert (flat.views["it"] == 7).all() and (p == 1).all()
        buffer.extra_averaged.fill_(8)
        assert (flat.views["it"] == (7 if from_rank0 else 8)).all()


def test_what_lies_beside_is_averaged_or_not() -> None:
    p = nn.Parameter(torch.ones(3))
    entries = [
        Entry.like("mean", torch.zeros(2, 2)),
        Entry.like("rank 0's", torch.zeros(5), from_rank0=True),
        Entry.like("other type", torch.zeros(5, dtype=torch.float64)),
    ]
    flat = flat_of(p, extra=entries, world_size=2)
    first, second = flat.buffers
    assert [b.data.dtype for b in flat.buffers] == [torch.float32, torch.float64]
    flat.views["mean"].fill_(1)
    flat.views["rank 0's"].fill_(float("nan"))
    flat.views["other type"].fill_(1)
    assert float(first.averaged.sum()) == 3 + 4 and float(first.params.sum()) == 3
    assert float(second.averaged.sum()) == 5 and second.params.numel() == 0
    assert finite(flat), "rank 0's are not looked at"
    assert flat.square_norm() == pytest.approx(3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finite_finds_one_bad_value(dtype: torch.dtype, value: float) -> None:
    """In any place of any parameter, whatever else is there."""
    full = 3 * ALIGNMENT // dtype.itemsize  # no gap after it: its last value is the buffer's
    params = [nn.Parameter(torch.randn(full).to(dtype)), nn.Parameter(torch.randn(5, 5).double())]
    flat = flat_of(*params)
    assert finite(flat) and flat.non_finite() == []
    for i, p in enumerate(params):
        for place in (*range(0, p.numel(), 9), p.numel() - 1):
            kept = p.data.view(-1)[place].clone()
            p.data.view(-1)[place] = value
            assert not finite(flat) and flat.non_finite() == [f"p{i}"]
            p.data.view(-1)[place] = kept
    params[0].data[:2] = torch.tensor([float("inf"), -float("inf")])
    assert not finite(flat)


# What is refused, and why.


def overlapping() -> list[nn.Parameter]:
    base = torch.zeros(10)
    return [nn.Parameter(base[:6]), nn.Parameter(base[5:])]


def nested() -> list[nn.Parameter]:
    base = torch.zeros(10)
    return [nn.Parameter(base), nn.Parameter(torch.zeros(3)), nn.Parameter(base[4:5])]


REFUSED = {
    "overlapping": (overlapping, "group0.0 and group0.1 are distinct but share storage"),
    "nested": (nested, "group0.0 and group0.2 are distinct but share storage"),
    "holes": (lambda: [nn.Parameter(torch.zeros(8)[::2])], r"strides \(2,\) overlaps itself or"),
    "expanded": (lambda: [nn.Parameter(torch.zeros(1).expand(4))], r"strides \(0,\) overlaps"),
    "meta": (lambda: [nn.Parameter(torch.zeros(2, device="meta"))], "is on the meta device"),
    "lazy": (lambda: list(nn.LazyLinear(2).parameters()), "has no shape yet"),
    "integer": (
        lambda: [nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)],
        "is torch.int64: only 16, 32 and 64-bit floating-point",
    ),
    "complex": (lambda: [nn.Parameter(torch.zeros(2, dtype=torch.complex64))], "is torch.compl"),
    "float8": (
        lambda: [nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)],
        "is torch.float8_e4m3fn",
    ),
    "sparse": (lambda: [nn.Parameter(torch.eye(2).to_sparse())], "layout torch.sparse_coo"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_parameters(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LocalSGD(make(), period=Constant(1))


def test_equal_names_are_refused() -> None:
    """Two parameters of one name would get one place."""
    groups = [{"params": [("w", nn.Parameter(torch.ones(2)))]} for _ in range(2)]
    with pytest.raises(ValueError, match="same name w"):
        LocalSGD(groups, period=Constant(1))


def test_slices_of_one_storage_are_fine() -> None:
    """As cuDNN lays an LSTM's weights out."""
    base = torch.arange(10.0)
    low, high = nn.Parameter(base[:4]), nn.Parameter(base[4:])
    LocalSGD([high, low], period=Constant(1))
    assert low.tolist() == [0, 1, 2, 3] and high.tolist() == [4, 5, 6, 7, 8, 9]


# Moved afterwards.


def reassign(model: nn.Module) -> None:
    model.weight.data = model.weight.data.clone()


def assign(model: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


MOVES = {
    "to(dtype)": lambda model: model.to(torch.float64),
    "half": lambda model: model.half(),
    "half and back": lambda model: model.half().float(),
    "data": reassign,
    "to(memory_format)": lambda model: model.to(memory_format=torch.channels_last),
    "assign": assign,
    "new Parameter": lambda model: setattr(model, "weight", nn.Parameter(model.weight.clone())),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moved_parameters_are_detected(move: Any) -> None:
    """Parameters moved out of their memory are found when the round ends or the next begins."""
    model = nn.Conv2d(2, 2, 3)
    optimizer = LocalSGD(model.parameters(), period=Constant(2), model=model)
    for _ in range(2):
        optimizer.step()
    move(model)
    with pytest.raises(RuntimeError, match=r"weight .*Do that before building the optimizer"):
        optimizer.step()


@pytest.mark.parametrize("move", [MOVES["half"], MOVES["data"]])
def test_moved_in_mid_round(move: Any) -> None:
    model = nn.Conv2d(2, 2, 3)
    optimizer = LocalSGD(model.parameters(), period=Constant(2))
    optimizer.step()
    move(model)
    with pytest.raises(RuntimeError, match="no longer lives in the optimizer's flat buffer"):
        optimizer.step()


def test_loading_in_place_is_fine() -> None:
    model, other = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
    optimizer = LocalSGD(model.parameters(), period=Constant(1), model=model)
    model.load_state_dict(other.state_dict())
    model.to(torch.float32)
    optimizer.step()
    assert torch.equal(model.weight, other.weight)


def cut(number: int, *sizes: int, before: Fragments | None = None) -> tuple[Flat, Fragments]:
    flat = Flat([(f"p{i}", nn.Parameter(torch.zeros(n))) for i, n in enumerate(sizes)], [], 2)
    for i, n in enumerate(sizes):
        flat.views[f"p{i}"].copy_(torch.arange(n) + 100 * (i + 1))
    return flat, Fragments(flat, number, before)


def elements(flat: Flat, fragments: Fragments, k: int) -> list[float]:
    """Of one fragment, without the gaps between parameters."""
    (part,) = fragments.of(flat.params, k)
    return [x for x in part.tolist() if x]


@pytest.mark.parametrize("number", [1, 2, 3, 7, 40])
def test_fragments_are_equal_and_make_up_the_whole(number: int) -> None:
    """Fragment k has the elements ⌊k n / K⌋ to ⌊(k + 1) n / K⌋, over parameters' ends and gaps."""
    flat, fragments = cut(number, 7, 1, 15, 0, 10)
    whole = [x for x in flat.params[0].tolist() if x]
    assert len(whole) == 33
    for k in range(number):
        expected = whole[k * 33 // number : (k + 1) * 33 // number]
        assert elements(flat, fragments, k) == expected
        assert fragments.mean(k)[0].shape == fragments.of(flat.params, k)[0].shape


def test_later_parameters_are_in_the_last_fragment() -> None:
    _, before = cut(3, 7, 1, 15, 0, 10)
    flat, fragments = cut(3, 7, 1, 15, 0, 10, 5, before=before)
    whole = [x for x in flat.params[0].tolist() if x]
    told = [elements(flat, fragments, k) for k in range(3)]
    assert told == [whole[:11], whole[11:22], whole[22:]]


def test_non_finite_fragments_are_named() -> None:
    flat, fragments = cut(3, 7, 1, 15, 0, 10)
    flat.views["p2"][4] = float("nan")  # the 13th of 33: in the second fragment
    for k, names in ((0, []), (1, ["p2"]), (2, [])):
        for mean, own in zip(fragments.mean(k), fragments.of(flat.params, k), strict=True):
            mean.copy_(own)
        assert fragments.non_finite(k) == names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 64, 1000, 300_000])
def test_a_fingerprint_is_of_values_and_places(size: int, dtype: torch.dtype) -> None:
    """What is changed, negated or moved has another; the bits that were have theirs again."""
    first, second = (nn.Parameter(torch.randn(size).to(dtype)) for _ in range(2))
    flat = flat_of(first, nn.Parameter(torch.ones(0)), second)
    saved = first.detach().clone(), second.detach().clone()
    known = [flat.fingerprint(), flat.sample()]
    for change in (
        lambda: first.neg_(),
        lambda: first[-1].mul_(-2),
        lambda: first[0].add_(1),
        lambda: (first.copy_(saved[1]), second.copy_(saved[0])),
        lambda: first.copy_(saved[0].flip(0)) if size > 1 else second.neg_(),
    ):
        with torch.no_grad():
            change()
            known.append(flat.fingerprint())
            first.copy_(saved[0])
            second.copy_(saved[1])
        assert [flat.fingerprint(), flat.sample()] == known[:2]
    assert len({*known}) == len(known) and all(-(2**63) <= x < 2**63 for x in known)
