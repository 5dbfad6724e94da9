"""The example programs, as a user starts them, on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

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
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "examples" / program), *flags],
        capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (accuracy,) = re.findall(r"accuracy ([\d.]+)%", ended.stdout)
    assert float(accuracy) > 85
    assert f"{RUNS[command]} synchronisations" in ended.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {c[0] for c in RUNS}
