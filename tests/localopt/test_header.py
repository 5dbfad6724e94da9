"""The header: digits that no sum and no floating-point type can round."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localopt.header import (
    SLOT,
    Header,
    Kind,
    ReplicaMismatchError,
    check_in_step,
    read,
    spread,
    write,
)

headers = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    step=st.integers(0, 2**40) | st.integers(0, 2**63 - 1),
    h=st.integers(1, 2**40),
    busy=st.floats(allow_nan=False),
    square_norm=st.floats(min_value=0),
    loss=st.floats(allow_nan=False),
    finite=st.booleans(),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@given(brought=st.lists(headers, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_sum_carries_every_slot_exactly(dtype: torch.dtype, brought: list[Header]) -> None:
    """"64-bit integers and doubles arrive exactly, whatever the parameters' type"."""
    total = torch.zeros(len(brought), SLOT, dtype=dtype)
    for rank, header in enumerate(brought):
        slots = torch.full((len(brought), SLOT), 3.0, dtype=dtype)  # an older sum's remains
        write(slots, rank, header, torch.tensor(header.finite))
        total += slots
    arrived = read(total)
    assert arrived == dict(enumerate(brought))
    pairs = zip(arrived.values(), brought, strict=True)
    assert all(math.copysign(1, a.busy) == math.copysign(1, b.busy) for a, b in pairs)


def test_some_ranks_alone_can_be_read() -> None:
    """Slots that a sum has not covered are zeros, which are no header."""
    slots = torch.zeros(4, SLOT)
    write(slots, 2, Header(Kind.SYNC, 5, 3, 0.0, loss=0.25), None)
    headers = read(slots, [2])
    assert list(headers) == [2] and headers[2].loss == 0.25
    write(slots, 2, Header(Kind.SYNC, 5, 3, 0.0), None)
    assert math.isnan(read(slots, [2])[2].loss), "none recorded"


def test_not_looked_at_counts_as_finite() -> None:
    slots = torch.zeros(1, SLOT)
    write(slots, 0, Header(Kind.SYNC, 1, 1, 0.0, 0.0), None)
    assert read(slots)[0].finite


def header(kind: Kind = Kind.SYNC, step: int = 8, h: int = 4) -> Header:
    return Header(kind, step, h, busy=0.1, square_norm=1.0)


def test_ranks_out_of_step_are_named() -> None:
    check_in_step(dict(enumerate([header()] * 3)))
    with pytest.raises(ReplicaMismatchError) as caught:
        odd = [header(), header(step=9), header(), header(kind=Kind.FINISH)]
        check_in_step(dict(enumerate(odd)))
    assert (
        "ranks 0, 2 at step 8 with H 4 (sync); rank 1 at step 9 with H 4 (sync); "
        "rank 3 at step 8 with H 4 (finish)"
    ) in str(caught.value)
    with pytest.raises(ReplicaMismatchError, match="rank 1 at step 8 with H 5"):
        check_in_step({0: header(), 1: header(h=5)})


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_spread_shows_what_is_not_finite(norm: float) -> None:
    replicas = {rank: Header(Kind.SYNC, 1, 1, 0.0, n) for rank, n in enumerate((1.0, norm))}
    assert not math.isfinite(spread(replicas, norm))


def test_spread_by_hand() -> None:
    """x = 1 and 3: mean 2, spread 1; equal replicas whose norms round apart: 0."""
    replicas = {rank: Header(Kind.SYNC, 1, 1, 0.0, n) for rank, n in enumerate((1.0, 9.0))}
    assert spread(replicas, 4.0) == 1.0
    assert spread({0: replicas[0]}, 1.0 + 1e-15) == 0.0
