"""Every block of code in docs/own-loop.md runs, on two replicas, and does what it says."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from localopt import LSGD, QSR, Average, Constant, LocalAdamW, Watch
from tests.support.ranks import run

PAGE = Path(__file__).resolve().parents[2] / "docs/own-loop.md"
STEPS = 40

# By heading and number under it.
BLOCKS = {
    (section.partition("\n")[0], number): code
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
}
FRAME = next(iter(BLOCKS.values()))
RECIPES = list(BLOCKS)[1:]


def frame(rank: int, steps: int = STEPS, **names: Any) -> dict[str, Any]:
    """The names that recipes use; a model with BatchNorm, 10 classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    teacher = torch.randn(16, 10)
    torch.manual_seed(1 + rank)
    inputs = [torch.randn(8, 16) for _ in range(STEPS)]
    names |= {
        "torch": torch, "dist": dist, "itertools": itertools, "LocalAdamW": LocalAdamW, "QSR": QSR,
        "Watch": Watch, "STEPS": steps, "model": model, "losses": [],
        "batches": [(x, (x @ teacher).argmax(1)) for x in inputs],
        "validation": (inputs[0], (inputs[0] @ teacher).argmax(1)),
        "loss_of": lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]),
    }  # fmt: skip
    exec(FRAME, names)
    return names


def equal_on_all_ranks(model: nn.Module) -> bool:
    mine = nn.utils.parameters_to_vector(model.parameters()).detach()
    of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, mine)
    return all(torch.equal(of_all[0], x) for x in of_all)


def recipe(rank: int, m: int, key: tuple[str, int], folder: str) -> dict[str, Any]:
    names = frame(rank, folder=Path(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(BLOCKS[key], names)
    optimizer = names["optimizer"]
    syncs, step = optimizer.traffic.syncs, optimizer._replica.round.step
    optimizer.finish()
    assert equal_on_all_ranks(names["model"])
    kept = ("losses", "count")
    return {"syncs": syncs, "step": step, "report": optimizer.report,
            **{k: names[k] for k in kept if k in names}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", RECIPES, ids=lambda key: f"{key[0]} {key[1]}")
def test_it_runs(key: tuple[str, int], tmp_path: Path) -> None:
    zero, one = run(recipe, 2, key, str(tmp_path))
    assert zero["step"] == one["step"] and zero["syncs"] == one["syncs"]
    heading, _ = key
    if heading.startswith("Loaders"):
        assert zero["step"] == STEPS - 3
    elif heading.startswith("Accumulate"):
        assert zero["step"] == STEPS // 2
    elif heading.startswith("Stop early") and key[1] == 0:
        assert 0 < zero["step"] < STEPS
    else:
        assert zero["step"] == STEPS
        assert 0 < zero["syncs"] <= STEPS // 4, "QSR with base 4"
    if heading.startswith("Evaluate"):
        assert len(zero["losses"]) == STEPS // 7
    if heading.startswith("The loss"):
        assert len(zero["report"].losses) == 2
        assert all(0 < loss < 5 for loss in zero["report"].losses)


def resumed(rank: int, m: int, folder: str) -> bool:
    code = BLOCKS["Save and resume, one file per rank", 0]
    whole = frame(rank, folder=Path(folder) / "whole")
    whole["folder"].mkdir(exist_ok=True)
    exec(code, whole)
    stopped = frame(rank, folder=Path(folder))
    stopped["batches"] = stopped["batches"][:27]  # the last file is of step 20, within a round
    exec(code, stopped)
    assert not stopped["optimizer"].synced
    on = frame(rank, folder=Path(folder))
    exec(code, on)
    assert on["start"] == 20
    vectors = [nn.utils.parameters_to_vector(n["model"].parameters()) for n in (whole, on)]
    return torch.equal(*vectors)


@pytest.mark.slow
def test_what_is_resumed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert run(resumed, 2, str(tmp_path)) == [True, True]


@pytest.mark.parametrize("rule", [LSGD, Average])
def test_the_frame_goes_with_other_rules(rule: type) -> None:
    """The last recipe's claim: LSGD needs the loss, others do not."""
    model = nn.Linear(4, 2)
    optimizer = LocalAdamW(model.parameters(), 1e-3, period=Constant(2), sync=rule())
    model(torch.randn(3, 4)).sum().backward()
    if rule is LSGD:
        with pytest.raises(RuntimeError, match="record_loss"):
            optimizer.step()
    else:
        optimizer.step()
