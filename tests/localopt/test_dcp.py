"""Replicas in checkpoints of torch.distributed.checkpoint: each rank gets back its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint.stateful import Stateful

from localopt import EASGD, QSR, Average, Constant, DiLoCo, LocalOptimizer
from localopt.integrations.dcp import ReplicaState, load, merged_state
from localopt.merge import merged
from tests.support import oracle
from tests.support.contract import (
    LRS,
    SIZE,
    Model,
    equal_on_all_ranks,
    everything,
    local_step,
    same_bits,
    stacked,
)
from tests.support.ranks import run

# One process without a group is a case of these tests; DCP warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Rule, period, and the steps to save after: in mid-round, at a round's end, one step later, when
# an overlapped collective is in flight.
CASES: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "average": (Average, QSR(alpha=0.16, base=3), (2, 6, 7)),
    "diloco": (DiLoCo, Constant(3), (2, 6, 7)),
    "easgd": (lambda: EASGD(alpha=0.3, beta=0.4, overlap=True), Constant(3), (2, 6, 7)),
}
STEPS = 14


class Run:
    """A replica that trains on its own problem."""

    def __init__(self, case: str, rank: int, seed: int = 0) -> None:
        rule, period, _ = CASES[case]
        self.rank, self.model = rank, Model(seed=seed)
        inner = torch.optim.AdamW(self.model.parameters(), lr=LRS[0], weight_decay=0.1)
        self.optimizer = LocalOptimizer(inner, period, rule(), model=self.model)
        self.problem = oracle.Quadratics.make(4, SIZE, seed=3)

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            local_step(self.optimizer, self.model, self.problem, self.rank, step)
            self.model.statistic += self.rank + 1

    def state(self) -> dict[str, Any]:
        return {"replica": ReplicaState(self.model, self.optimizer)}

    def all(self) -> list[Tensor]:
        return everything(self.optimizer, self.model)

    def end(self) -> tuple[list[Tensor], list[Any]]:
        """All there is now, and after finish()."""
        now, optimizer = self.all(), self.optimizer
        figures = [optimizer.round, optimizer.h, optimizer.synced, optimizer.traffic.bytes]
        optimizer.finish()
        return [*now, *self.all()], [*figures, optimizer.traffic.bytes]


def same(a: tuple[list[Tensor], list[Any]], b: tuple[list[Tensor], list[Any]]) -> bool:
    return same_bits(a[0], b[0]) and a[1] == b[1]


def round_trips(rank: int, m: int, root: Path) -> int:
    """Save at each step, resume from each checkpoint; return how many there were."""
    tried = 0
    for case, (_, _, saved) in CASES.items():
        alone = Run(case, rank)
        alone.train(0, STEPS)
        final = alone.end()

        saving, at = Run(case, rank), 0
        places, expected = [], {}
        for step in saved:
            saving.train(at, step)
            at = step
            dcp.save(saving.state(), checkpoint_id=root / f"{case}-{step}")
            places.append(saving.optimizer.synced)
            expected[step] = saving.all()
        assert set(places) == {True, False}, "saved between rounds and within one"
        saving.train(at, STEPS)
        assert same(final, saving.end()), f"{case}: saving has changed the run"

        for step in saved:
            resumed = Run(case, rank, seed=7)
            dcp.load(resumed.state(), checkpoint_id=root / f"{case}-{step}")
            assert same_bits(expected[step], resumed.all()), f"{case}: loaded at step {step}"
            if not resumed.optimizer.synced:
                rows = stacked(resumed.model.vector())
                assert not torch.equal(rows[0], rows[1]), "replicas differ within a round"
            assert not equal_on_all_ranks(resumed.model.statistic)
            resumed.train(step, STEPS)
            assert same(final, resumed.end()), f"{case}: resumed at step {step}"
            tried += 1
    return tried


@pytest.mark.slow
def test_every_rank_resumes_its_own_run(tmp_path: Path) -> None:
    """Bit for bit the run that was not interrupted, nor ever saved; each rank writes its own."""
    assert run(round_trips, 2, tmp_path) == [9, 9]
    sizes = [file.stat().st_size for file in (tmp_path / "average-2").glob("*.distcp")]
    assert len(sizes) == 2 and min(sizes) > 0.9 * max(sizes)


def save_mid_round(rank: int, m: int, root: Path) -> tuple[dict, dict]:
    """Save by DCP; return the state as it would be without."""
    replica = Run("easgd", rank)
    replica.train(0, 7)
    dcp.save(replica.state(), checkpoint_id=root / "easgd")
    return dict(replica.model.state_dict()), replica.optimizer.state_dict()


def load_on_others(rank: int, m: int, root: Path) -> tuple[str, str, list[Tensor]]:
    """What is said to another number of ranks, and the model that they go on with."""
    replica, told = Run("easgd", rank, seed=7), []
    for read in (load, lambda state, folder: dcp.load(state, checkpoint_id=folder)):
        try:
            read(replica.state(), root / "easgd")
        except (ValueError, CheckpointException) as error:
            told.append(f"{type(error).__name__}: {error}")
        dist.barrier()
    weights, state = merged_state(root / "easgd")
    replica.model.load_state_dict(weights)
    replica.optimizer.load_state_dict(state)
    start = replica.all()
    replica.train(7, 12)
    replica.optimizer.finish()
    assert equal_on_all_ranks(replica.model.vector())
    assert bool(replica.model.vector().isfinite().all())
    return told[0], told[1], start


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nested state that is no container, by its place; tensors as bytes."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from leaves(part, f"{name}.{key}")
    else:
        yield name, value.numpy().tobytes() if isinstance(value, Tensor) else value


SAVED_BY_2 = "the checkpoint was saved by 2 replicas, and there are {}: .*merged_state"


@pytest.mark.slow
def test_another_number_of_ranks(tmp_path: Path) -> None:
    """Fewer or more are told in a line what to do, and that works."""
    states = run(save_mid_round, 2, tmp_path)
    weights, state = merged(iter(states))
    assert list(leaves(merged_state(tmp_path / "easgd"))) == list(leaves((weights, state)))

    ranks = run(load_on_others, 3, tmp_path)
    one = Run("easgd", 0, seed=7)
    for read in (load, lambda state, folder: dcp.load(state, checkpoint_id=folder)):
        with pytest.raises(ValueError, match=SAVED_BY_2.format(1)):
            read(one.state(), tmp_path / "easgd")
    one.model.load_state_dict(weights)
    one.optimizer.load_state_dict(state)
    for ours, theirs, start in ranks:
        assert ours.startswith("ValueError: ") and "\n" not in ours
        assert "saved by 2 replicas, and there are 3: localopt.integrations.dcp.merged" in ours
        assert "Missing key in checkpoint state_dict: replica.rank2" in theirs
        assert same_bits(start, one.all())


def save_behind_training(rank: int, m: int, root: Path) -> None:
    group = dist.new_group(backend="gloo")
    for number, options in enumerate((
        {"checkpoint_id": root / "0"},
        {"storage_writer": FileSystemWriter(root / "1")},
    )):  # fmt: skip
        replica = Run("easgd", rank)
        replica.train(0, 7)
        expected = replica.all()
        saved = dcp.async_save(replica.state(), process_group=group, **options)
        replica.train(7, STEPS)
        final = replica.end()
        saved.result()
        resumed = Run("easgd", rank, seed=7)
        dcp.load(resumed.state(), checkpoint_id=root / str(number))
        assert same_bits(expected, resumed.all()), options
        resumed.train(7, STEPS)
        assert same(final, resumed.end()), options


@pytest.mark.slow
def test_async_save_takes_the_state_of_the_call(tmp_path: Path) -> None:
    """Training goes on at once, and changes nothing of what is saved."""
    run(save_behind_training, 2, tmp_path)


def save_with_nan(rank: int, m: int, root: Path) -> str:
    """What a rank is told when rank 1 has NaN; then the ranks load over it."""
    replica = Run("average", rank)
    replica.train(0, 2)
    good = replica.all()
    dcp.save(replica.state(), checkpoint_id=root / "good")
    if rank == 1:
        replica.model.weights[0].data[3] = float("nan")
    group = dist.new_group(backend="gloo")
    with pytest.raises(CheckpointException):
        behind = dcp.async_save(replica.state(), checkpoint_id=root / "bad", process_group=group)
        behind.result()
    with pytest.raises(CheckpointException) as refused:
        dcp.save(replica.state(), checkpoint_id=root / "bad")
    dcp.load(replica.state(), checkpoint_id=root / "good")
    assert same_bits(good, replica.all())
    return str(refused.value)


@pytest.mark.slow
def test_a_replica_with_nan_is_not_saved_and_can_be_loaded_over(tmp_path: Path) -> None:
    """All ranks hear of it at once: none waits for one that has left."""
    for told in run(save_with_nan, 2, tmp_path):
        assert "NonFiniteError: rank 1 holds NaN or infinity at step 2: weights.0" in told
    assert not (tmp_path / "bad/.metadata").exists()


def save_in_a_group(rank: int, m: int, root: Path) -> None:
    group = dist.new_group([1, 2])
    model = nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    if rank == 0:
        return
    optimizer = LocalOptimizer(inner, Constant(2), model=model, process_group=group)
    with torch.no_grad():
        model.weight.fill_(rank)
    state = {"part": ReplicaState(model, optimizer, group)}
    dcp.save(state, checkpoint_id=root / "group", process_group=group)
    with torch.no_grad():
        model.weight.zero_()
    load(state, root / "group", group)
    assert (model.weight == rank).all()


@pytest.mark.slow
def test_replicas_that_are_not_all_ranks(tmp_path: Path) -> None:
    run(save_in_a_group, 3, tmp_path)
    weights, _ = merged_state(tmp_path / "group", "part")
    assert (weights["weight"] == 1.5).all()


def test_something_else_is_refused(tmp_path: Path) -> None:
    """In a line; what is damaged or not there is told by torch."""
    replica = Run("average", 0)
    state = replica.state()
    assert isinstance(state["replica"], Stateful)
    dcp.save({"model": replica.model.state_dict()}, checkpoint_id=tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds no ReplicaState of the name 'replica'$"):
        load(state, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds no ReplicaState of the name 'replica'$"):
        merged_state(tmp_path / "other")
    dcp.save({"replica": {"rank0": "text"}}, checkpoint_id=tmp_path / "text")
    with pytest.raises(ValueError, match="rank 0: what is loaded is not what a ReplicaState has"):
        load(state, tmp_path / "text")
    with pytest.raises(ValueError, match="rank 0: what is loaded is not what a ReplicaState has"):
        merged_state(tmp_path / "text")
    dcp.save(state, checkpoint_id=tmp_path / "cut")
    (file,) = (tmp_path / "cut").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointException):
        load(state, tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        load(state, tmp_path / "nothing")


def test_what_is_saved_is_a_copy_on_the_host() -> None:
    """Also of a module's version numbers, which its state has beside the tensors."""
    replica = Run("average", 0)
    replica.train(0, 2)
    state = ReplicaState(replica.model, replica.optimizer)
    taken, before = state.state_dict(), replica.all()
    (own,) = taken.values()
    assert own.model._metadata == replica.model.state_dict()._metadata
    replica.train(2, 6)
    state.load_state_dict(taken)
    assert same_bits(before, replica.all())
