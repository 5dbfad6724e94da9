"""The example programs of other frameworks on two ranks, where the framework is installed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.program import ROOT
from tests.support.resumed import Runs, difference, in_two_parts


@dataclass(frozen=True)
class Example:
    """What a program saves and says.

    Args:
        needs: the framework's module.
        stop: flags that stop it in the middle of a round.
        saved: the name of a rank's file where it ends, and where it was stopped.
        parts: the weights and the optimizer's state in it.
        says: how its last line begins where it has learnt.
        good: whether the number in that is good.
        shares: sizes of its data sets, and how many samples of each both ranks draw together
            before any comes again.
        collectives: others than localopt may call so many.
    """

    needs: str
    stop: tuple[str, str]
    saved: tuple[str, str]
    parts: Callable[[Any], tuple[Any, Any]]
    says: str
    good: Callable[[float], bool]
    shares: dict[str, int]
    collectives: int


def rank_file(rank: int, name: str) -> str:
    return name.format(rank=rank, of_rank=f".rank{rank}" if rank else "")


FRAMEWORKS = {
    "accelerate_loop.py": Example(
        "accelerate", ("--stop", "200"), ("rank{rank}.pt", "rank{rank}.pt"),
        lambda saved: (saved["model"], saved["optimizer"]),
        r"step 512: accuracy ([\d.]+)%, 54 synchronisations", lambda accuracy: accuracy > 85,
        {"4096": 4096}, 0,
    ),
    "lightning_module.py": Example(
        "lightning", ("--stop", "3"), ("checkpoint.ckpt{of_rank}", "checkpoint.ckpt{of_rank}"),
        lambda saved: (saved["state_dict"], saved["optimizer_states"][0]),
        r"step 512: accuracy ([\d.]+)%, 54 synchronisations", lambda accuracy: accuracy > 85,
        {"4096": 4096, "1024": 1024}, 80,  # several an epoch, and 8 epochs
    ),
    "trainer.py": Example(
        "transformers", ("--stop", "70"),
        ("checkpoint-150/replica_{rank}.pt", "checkpoint-70/replica_{rank}.pt"),
        lambda saved: (saved["model"], saved["optimizer"]),
        r"step 150: test loss ([\d.]+), 17 synchronisations", lambda loss: loss < 2.8,
        {"13111": 2 * 16 * 150}, 10,
    ),
}  # fmt: skip


def marks(name: str) -> list[pytest.MarkDecorator]:
    missing = importlib.util.find_spec(FRAMEWORKS[name].needs) is None
    reason = f"{FRAMEWORKS[name].needs} is not installed: pip install -e '.[examples]'"
    return [pytest.mark.skipif(missing, reason=reason)]


pytestmark = [pytest.mark.frameworks, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=marks(name)) for name in FRAMEWORKS]
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """The example, and its runs: to the end, and in two parts."""
    example = FRAMEWORKS[request.param]
    folder = tmp_path_factory.mktemp(example.needs)
    yield example, in_two_parts(ROOT / "examples" / request.param, folder, *example.stop)


Given = tuple[Example, Runs]


def states(example: Example, folder: Path, stopped: bool = False) -> list[tuple[Any, Any]]:
    """Weights and optimizer state of each rank."""
    names = (folder / rank_file(rank, example.saved[stopped]) for rank in (0, 1))
    return [example.parts(torch.load(name, weights_only=False)) for name in names]


def test_it_learns(runs: Given) -> None:
    example, ran = runs
    said = re.search(example.says, ran.whole.outputs[0])
    assert said and example.good(float(said[1])), ran.whole.outputs


def test_it_goes_on_as_if_it_had_not_been_stopped(runs: Given) -> None:
    """Loss, synchronisations, bytes; and bit for bit the weights and states of each rank."""
    example, ran = runs
    last = [
        re.search(r"^step .*$", one.outputs[0], re.MULTILINE)[0] for one in (ran.whole, ran.resumed)
    ]
    assert last[0] == last[1]
    pairs = zip(*(states(example, ran.folder / name) for name in ("whole", "parts")), strict=True)
    for whole, resumed in pairs:
        assert difference(whole, resumed) is None


def test_replicas_part_within_a_round_and_agree_at_the_end(runs: Given) -> None:
    example, ran = runs
    (first, state), (second, _) = states(example, ran.folder / "stopped", stopped=True)
    assert state["param_groups"][0]["localopt"]["replica"]["open"], "stopped in mid-round"
    assert not any(torch.equal(first[name], second[name]) for name in first)
    (first, _), (second, _) = states(example, ran.folder / "whole")
    assert difference(first, second) is None


def test_it_saves_the_consensus(runs: Given) -> None:
    example, ran = runs
    for folder, stopped in (("whole", False), ("stopped", True)):
        ranks = [weights for weights, _ in states(example, ran.folder / folder, stopped)]
        if (ran.folder / folder / "model.safetensors").exists():
            from safetensors.torch import load_file

            consensus = load_file(ran.folder / folder / "model.safetensors")
        else:
            consensus = torch.load(ran.folder / folder / "consensus.pt")
        assert consensus
        for name, value in consensus.items():
            mean = sum(weights[name].double() for weights in ranks) / len(ranks)
            torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


def test_each_replica_has_its_own_share_of_the_data(runs: Given) -> None:
    example, ran = runs
    first, second = (ran.seen(rank)["drawn"] for rank in (0, 1))
    for size, count in example.shares.items():
        shares = [set(drawn[size][: count // 2]) for drawn in (first, second)]
        assert [len(share) for share in shares] == [count // 2] * 2
        assert not shares[0] & shares[1]


def test_nobody_else_calls_collectives_at_every_step(runs: Given) -> None:
    example, ran = runs
    called = ran.seen(0)["called"]
    assert sum(called.values()) <= example.collectives, called
