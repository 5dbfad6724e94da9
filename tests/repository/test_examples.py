"""The example programs on two ranks; test_readme.py has one started by torchrun."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.repository.test_framework_examples import FRAMEWORKS
from tests.support.program import ROOT, start
from tests.support.resumed import difference, in_two_parts

# Program and flags -> synchronisations it reports.
RUNS = {
    ("comm_optimizer.py", "--dist-optim-name", "EASGD"): 100,
    ("comm_optimizer.py", "--dist-optim-name", "LSGD"): 100,
    ("comm_optimizer.py", "--dist-optim-name", "none"): 0,
    ("overlap_local_sgd.py",): 200,
    ("own_dist_optimizer.py",): 50,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS, ids=" ".join)
def test_it_runs_and_learns(command: tuple[str, ...]) -> None:
    program, *flags = command
    ended = start(*flags, script=ROOT / "examples" / program)
    assert ended.codes == [0, 0], ended.errors
    (accuracy,) = re.findall(r"accuracy ([\d.]+)%", ended.outputs[0])
    assert float(accuracy) > 85
    assert f"{RUNS[command]} synchronisations" in ended.outputs[0]


@pytest.mark.slow
def test_the_language_model_learns_and_resumes(tmp_path: Path) -> None:
    """Stopped in the middle of a round, it becomes what it would have been, bit for bit."""
    ran = in_two_parts(ROOT / "examples/language_model.py", tmp_path, "--stop", "90")
    said = ran.whole.outputs[0]
    (loss,) = re.findall(r"step 200: test loss ([\d.]+), .* 8 synchronisations", said)
    assert float(loss) < 2.5  # as frequent as bytes are: 3.3
    assert "step 90: test loss" in ran.stopped.outputs[0]
    assert "3 synchronisations" in ran.stopped.outputs[0]
    assert ran.resumed.outputs[0] == said, "loss, synchronisations and bytes"

    parted = [torch.load(tmp_path / "stopped" / f"rank{rank}.pt")["model"] for rank in (0, 1)]
    assert not any(torch.equal(x, y) for x, y in zip(*(p.values() for p in parted), strict=True))
    names = ("consensus.pt", "rank0.pt", "rank1.pt")
    consensus, *ranks = (torch.load(tmp_path / "whole" / name) for name in names)
    for name, one in zip(names, (consensus, *ranks), strict=True):
        assert difference(one, torch.load(tmp_path / "parts" / name)) is None, name
    for state in ranks:
        assert difference(state["model"], consensus) is None, "they agree after finish()"


def test_every_example_is_run() -> None:
    run = {command[0] for command in RUNS} | {"language_model.py", *FRAMEWORKS}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == run
