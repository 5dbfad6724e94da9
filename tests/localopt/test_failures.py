"""Replicas that do not fit are named on every rank, and nobody waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from localopt import (
    QSR,
    AbsentRankError,
    Average,
    CollectiveError,
    Constant,
    LayoutMismatchError,
    LocalAdamW,
    LocalOptimizer,
    LocalSGD,
    NonFiniteError,
    ReplicaMismatchError,
)
from localopt.faults import control
from tests.support.ranks import run

pytestmark = pytest.mark.slow


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def left_too_early(rank: int, m: int, period: int) -> None:
    optimizer = LocalSGD(parameters((3,)), 0.1, period=Constant(period))
    steps(optimizer, 3)
    dist.destroy_process_group()
    with pytest.raises(CollectiveError, match=r"call finish\(\) before destroy_process_group\(\)"):
        optimizer.finish()


@pytest.mark.parametrize("period", [2, 3])
def test_a_group_that_is_destroyed_before_the_end_is_named(period: int) -> None:
    """In the middle of a round, and after one."""
    run(left_too_early, 2, period)


# Out of step.


def steps(optimizer: LocalOptimizer, count: int) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


def evaluate(optimizer: LocalOptimizer) -> None:
    with optimizer.consensus():
        pass


def different_rates(optimizer: LocalOptimizer, rank: int) -> None:
    """QSR on replicas with different learning rates: H 4 on rank 1, 1 on the others."""
    optimizer.period = QSR(alpha=0.1, base=1)
    optimizer.param_groups[0]["lr"] = 0.05 if rank == 1 else 0.1
    steps(optimizer, 4)


# What each rank does, and what the message says of rank 1 and of the others.
SCENARIOS: dict[str, tuple[Callable[[LocalOptimizer, int], None], str, str]] = {
    "different H": (different_rates, "rank 1 at step 4 with H 4 (sync)", "at step 1 with H 1"),
    "one evaluates in mid-round": (
        lambda o, rank: (steps(o, 2), evaluate(o) if rank == 1 else None, steps(o, 1)),
        "rank 1 at step 2 with H 3 (consensus)",
        "at step 3 with H 3 (sync)",
    ),
    "one finishes in mid-round": (
        lambda o, rank: (steps(o, 2), o.finish() if rank == 1 else None, steps(o, 1)),
        "rank 1 at step 2 with H 3 (finish)",
        "at step 3 with H 3 (sync)",
    ),
    "one finishes between rounds": (
        lambda o, rank: (steps(o, 3), o.finish() if rank == 1 else None, steps(o, 3)),
        "rank 1 at step 3 with H 3 (finish)",
        "at step 6 with H 3 (sync)",
    ),
    "finish meets consensus": (
        lambda o, rank: (steps(o, 1), o.finish() if rank == 1 else evaluate(o)),
        "rank 1 at step 1 with H 3 (finish)",
        "at step 1 with H 3 (consensus)",
    ),
}


def out_of_step(rank: int, m: int) -> dict[str, str]:
    messages = {}
    for name, (scenario, *_) in SCENARIOS.items():
        optimizer = LocalSGD(parameters((5,), (2, 2)), 0.1, period=Constant(3))
        with pytest.raises(ReplicaMismatchError) as caught:
            scenario(optimizer, rank)
        messages[name] = str(caught.value)
    return messages


def test_out_of_step() -> None:
    """Replicas at another step, with another H or in another call are named, alike on all ranks."""
    ranks = run(out_of_step, 4)
    for name, message in ranks[0].items():
        assert all(other[name] == message for other in ranks), name
        _, one, others = SCENARIOS[name]
        assert one in message and f"ranks 0, 2, 3 {others}" in message, message


# Built differently.


class Net(nn.Module):
    def __init__(self, width: int = 4, order: int = 0, extra: int = 0) -> None:
        super().__init__()
        for name in ("a", "b")[:: -1 if order else 1]:
            self.register_parameter(name, nn.Parameter(torch.zeros(width)))
        self.frozen = nn.Parameter(torch.zeros(3 + extra))
        self.register_buffer("seen", torch.zeros(2 + extra))


def build(rank: int, **changed: Any) -> LocalOptimizer:
    """An optimizer; ``changed`` says what rank 1 does otherwise."""
    odd = changed if rank == 1 else {}
    model = Net(**odd.get("net", {}))
    owned = [p for name, p in model.named_parameters() if name != "frozen"]
    if "dtype" in odd:
        owned[0].data = owned[0].data.to(odd["dtype"])
    make = odd.get("make", LocalSGD)
    settings = {"period": Constant(2), "sync": Average(), "model": model}
    return make(owned, 0.1, **{**settings, **odd.get("settings", {})})


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"net": {"width": 5}}, "a: shape (5,)"),
    "order": ({"net": {"order": 1}}, "b: shape (4,)"),
    "dtype": ({"dtype": torch.float64}, "torch.float64"),
    "buffer": ({"net": {"extra": 1}}, "seen: shape (3,)"),
    "inner": ({"make": LocalAdamW}, "inner optimizer AdamW"),
    "period": ({"settings": {"period": Constant(3)}}, "h=3"),
    "rule": ({"settings": {"sync": Average(reset_fields=("x",))}}, "reset_fields=('x',)"),
    "policy": ({"settings": {"buffers": "average"}}, "buffers average"),
    "auto": ({"settings": {"auto": False}}, "auto False"),
    "drift": ({"settings": {"track_drift": True}}, "track_drift True"),
}


def built_differently(rank: int, m: int) -> dict[str, str]:
    messages = {}
    for name, (changed, _) in DIFFERENCES.items():
        with pytest.raises(LayoutMismatchError) as caught:
            build(rank, **changed)
        messages[name] = str(caught.value)
    optimizer = build(rank)  # the store is none the worse for it
    steps(optimizer, 2)
    grown = nn.Parameter(torch.zeros(2 + rank))
    with pytest.raises(LayoutMismatchError) as caught:
        optimizer.add_param_group({"params": [grown]})
    messages["group"] = str(caught.value)
    return messages


def test_built_differently() -> None:
    """Any difference in layout, rule, period or options is named at construction, on all ranks."""
    ranks = run(built_differently, 3)
    for name, (_, text) in DIFFERENCES.items():
        assert all(messages[name] == ranks[0][name] for messages in ranks), name
        assert text in ranks[0][name] and "differs from rank 0: rank 1 has" in ranks[0][name], name
    assert "ranks 1, 2 of 3 differ" in ranks[0]["group"]


def never_builds(rank: int, m: int) -> str:
    control.TIMEOUT = timedelta(seconds=2)
    if rank == 1:
        time.sleep(5)
        return ""
    with pytest.raises(AbsentRankError) as caught:
        LocalSGD(parameters((3,)), period=Constant(1))
    return str(caught.value)


def test_rank_that_never_builds() -> None:
    """A rank that never builds its optimizer is named by those that waited for it."""
    zero, _, two = run(never_builds, 3)
    assert zero.startswith("rank 1 did not arrive within 2 s")
    assert two.startswith("rank 1 did not arrive within 2 s")


# Not finite.


def bad_values(rank: int, m: int) -> list[str]:
    """NaN and infinities of rank 1, in every parameter of every type, then recovery."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    messages = []
    for value in (float("nan"), float("inf"), -float("inf")):
        for bad in range(len(dtypes)):
            params = [nn.Parameter(torch.ones(21, dtype=dtype)) for dtype in dtypes]
            optimizer = LocalSGD(params, 0.1, period=Constant(1))
            steps(optimizer, 1)
            if rank == 1:
                params[bad].data[20] = value
            with pytest.raises(NonFiniteError) as caught:
                steps(optimizer, 1)
            assert "at step 2" in str(caught.value)
            messages.append(str(caught.value))
    return messages


def test_non_finite_is_named() -> None:
    """NaN and infinity are named where the round ends: which rank, which parameter."""
    zero, one = run(bad_values, 2)
    assert zero == one
    for i, message in enumerate(zero):
        assert message.startswith("rank 1 brought") and message.endswith(f": group0.{i % 4}")


def large_values(rank: int, m: int) -> list[list[float]]:
    """Finite everywhere; the sum over a replica or over the ranks is not."""
    means = []
    for dtype, value in (
        (torch.float32, 3e38),
        (torch.float64, 1.7e308),
        (torch.float16, 6e4),
        (torch.bfloat16, 3e38),
    ):
        p = nn.Parameter(torch.full((4,), value, dtype=dtype))
        optimizer = LocalSGD([p], 0.0, period=Constant(1))
        steps(optimizer, 1)
        means.append((p.double() / p.new_tensor(value).double()).tolist())
    return means


def test_large_values_are_finite() -> None:
    """Finite replicas have a finite mean, and raise nothing."""
    for means in run(large_values, 4):
        for mean in means:
            assert mean == pytest.approx([1.0] * 4)


def unchecked(rank: int, m: int) -> list[float]:
    p = nn.Parameter(torch.tensor([1.0, float("nan") if rank else 1.0]))
    optimizer = LocalSGD([p], 0.0, period=Constant(1), check_finite=False)
    if rank:
        p.data[1] = float("nan")
    optimizer.step()
    return p.tolist()


def test_unchecked() -> None:
    """check_finite=False does not look."""
    for values in run(unchecked, 2):
        assert values[0] == 1.0 and values[1] != values[1]


def headers_survive_nan(rank: int, m: int) -> str:
    """Out of step *and* not finite: the header travels beside the NaN, untouched."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = LocalSGD([p], 1.0, period=Constant(300))
    optimizer._replica.round.step = 2**40
    p.data.fill_(float("nan"))
    steps(optimizer, 257 + rank)
    with pytest.raises(ReplicaMismatchError) as caught:
        optimizer.finish()
    return str(caught.value)


def test_headers_survive_nan_and_bfloat16() -> None:
    """Header digits "cannot round"."""
    zero, one = run(headers_survive_nan, 2)
    assert zero == one
    assert f"rank 0 at step {2**40 + 257} with H 300" in zero
    assert f"rank 1 at step {2**40 + 258} with H 300" in zero


# Moved away.


def moved(rank: int, m: int) -> None:
    """On one rank only, in mid-round: that rank says so itself."""
    model = nn.Linear(3, 2)
    optimizer = LocalSGD(model.parameters(), period=Constant(2), model=model)
    steps(optimizer, 1)
    model.double()
    with pytest.raises(RuntimeError, match="weight no longer lives in the optimizer's flat buffer"):
        steps(optimizer, 1)


def test_moved_parameters() -> None:
    run(moved, 2)


# Sharded.


def sharded(rank: int, m: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (m,))
    tensor: Tensor = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"group0.0 is sharded \(DTensor\)"):
        LocalSGD([nn.Parameter(tensor)], period=Constant(1))


def test_sharded_parameters_are_refused() -> None:
    run(sharded, 2)
