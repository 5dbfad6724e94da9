"""The example programs on two ranks; test_readme.py has one started by torchrun."""

from __future__ import annotations

import re

import pytest

from tests.support.program import ROOT, start

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


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {c[0] for c in RUNS}
