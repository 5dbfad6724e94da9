"""The header: what ranks tell each other before they synchronise."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localopt import ReplicaMismatchError
from localopt.header import (
    SLOT,
    Header,
    Kind,
    check_in_step,
    check_start,
    read,
    spread,
    write,
)

headers = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    step=st.integers(0, 2**40) | st.integers(0, 2**63 - 1),
    h=st.integers(1, 2**40),
    identity=st.integers(0, 2**63 - 1),
    busy=st.floats(allow_nan=False),
    square_norm=st.floats(min_value=0),
    loss=st.floats(allow_nan=False),
    settings=st.integers(0, 2**32 - 1),
    rates=st.integers(0, 2**32 - 1),
    fingerprint=st.integers(0, 2**62),
    start=st.integers(0, 2**62),
    total=st.floats(allow_nan=False),
    finite=st.booleans(),
)


@pytest.mark.parametrize("scanned", [False, True])
@given(brought=st.lists(headers, min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_sum_carries_every_slot_exactly(scanned: bool, brought: list[Header]) -> None:
    """64-bit integers and doubles; also where the total of a scan stays on the device."""
    total = torch.zeros(len(brought), SLOT, dtype=torch.uint8)
    for rank, header in enumerate(brought):
        slots = torch.full((len(brought), SLOT), 3, dtype=torch.uint8)  # an older sum's remains
        if scanned:
            seen = torch.tensor(header.total, dtype=torch.float64)
            write(slots, rank, dataclasses.replace(header, total=0.5, finite=False), seen)
            brought[rank] = dataclasses.replace(header, finite=math.isfinite(header.total))
        else:
            write(slots, rank, header)
        total += slots
    arrived = read(total)
    assert arrived == dict(enumerate(brought))
    pairs = zip(arrived.values(), brought, strict=True)
    assert all(math.copysign(1, a.busy) == math.copysign(1, b.busy) for a, b in pairs)


def test_some_ranks_alone_can_be_read() -> None:
    """Slots that a sum has not covered are zeros, which are no header."""
    slots = torch.zeros(4, SLOT, dtype=torch.uint8)
    write(slots, 2, Header(Kind.SYNC, 5, 3, loss=0.25))
    headers = read(slots, [2])
    assert list(headers) == [2] and headers[2].loss == 0.25
    write(slots, 2, Header(Kind.SYNC, 5, 3))
    assert math.isnan(read(slots, [2])[2].loss), "none recorded"


@given(st.integers(0, SLOT - 2), st.integers(1, 255))
def test_what_is_no_header_is_named(place: int, change: int) -> None:
    """A collective of the program's own, which has met ours: whose rank, and what to do."""
    slots = torch.zeros(2, SLOT, dtype=torch.uint8)
    write(slots, 0, Header(Kind.SYNC, 5, 3))
    with pytest.raises(ReplicaMismatchError, match="what rank 1 brought is not localopt's"):
        read(slots)
    write(slots, 1, Header(Kind.SYNC, 5, 3))
    scanned = SLOT - 13  # the total, which a device may write
    slots[1, place] += change
    if not scanned <= place < scanned + 8:
        with pytest.raises(ReplicaMismatchError, match=r"ranks? (0, )?1 brought"):
            read(slots, [1])


def test_not_looked_at_counts_as_finite() -> None:
    slots = torch.zeros(1, SLOT, dtype=torch.uint8)
    write(slots, 0, Header(Kind.SYNC, 1, 1))
    assert read(slots)[0].finite


def header(kind: Kind = Kind.SYNC, step: int = 8, h: int = 4) -> Header:
    return Header(kind, step, h, busy=0.1, square_norm=1.0)


def test_ranks_out_of_step_are_named() -> None:
    check_in_step(dict(enumerate([header()] * 3)), str)
    with pytest.raises(ReplicaMismatchError) as caught:
        odd = [header(), header(step=9), header(), header(kind=Kind.FINISH)]
        check_in_step(dict(enumerate(odd)), str)
    assert (
        "ranks 0, 2 at step 8 with H 4 (sync); rank 1 at step 9 with H 4 (sync); "
        "rank 3 at step 8 with H 4 (finish)"
    ) in str(caught.value)
    with pytest.raises(ReplicaMismatchError, match="rank 1 at step 8 with H 5"):
        check_in_step({0: header(), 1: header(h=5)}, str)


def test_what_else_differs_is_named() -> None:
    """Optimizers come first: their steps have nothing to do with each other."""
    one = header()
    other = dataclasses.replace(one, identity=1, step=9)
    with pytest.raises(ReplicaMismatchError, match=r"rank 0 with <0> \(sync\); rank 1 with <1>"):
        check_in_step({0: one, 1: other}, "<{}>".format)
    for name, told in (("settings", "the settings of"), ("rates", "the learning rates of")):
        odd = {0: one, 1: one, 2: dataclasses.replace(one, **{name: 7})}
        with pytest.raises(ReplicaMismatchError, match=f"at step 8 {told} ranks 0, 1 and rank 2"):
            check_in_step(odd, str)
    check_start({0: one, 1: one})
    with pytest.raises(ReplicaMismatchError, match="weights of rank 0 and rank 1 differed"):
        check_start({0: one, 1: dataclasses.replace(one, start=7)})


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_spread_shows_what_is_not_finite(norm: float) -> None:
    replicas = {rank: Header(Kind.SYNC, 1, 1, square_norm=n) for rank, n in enumerate((1.0, norm))}
    assert not math.isfinite(spread(replicas, norm))


def test_spread_by_hand() -> None:
    """x = 1 and 3: mean 2, spread 1; equal replicas whose norms round apart: 0."""
    replicas = {rank: Header(Kind.SYNC, 1, 1, square_norm=n) for rank, n in enumerate((1.0, 9.0))}
    assert spread(replicas, 4.0) == 1.0
    assert spread({0: replicas[0]}, 1.0 + 1e-15) == 0.0
