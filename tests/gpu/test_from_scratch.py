"""from_scratch on one card, which the processes of a strategy share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.links import needs_a_gpu, on_a_gpu
from tests.support.patience import PATIENCE
from tests.support.program import ROOT

pytestmark = pytest.mark.slow


def command(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "from_scratch", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "n", "flag"),
    [
        ("ring_all_reduce", 2, "--workers"),
        ("param_server", 3, "--workers"),
        *(
            pytest.param(*each, "--n-gpus", marks=on_a_gpu)
            for each in [
                ("ring_all_reduce", 2), ("ring_all_reduce", 1), ("param_server", 3), ("ddp", 2),
                ("data_parallel", 1),
            ]
        ),
    ],
)  # fmt: skip
def test_replicas_end_equal(tmp_path: Path, strategy: str, n: int, flag: str) -> None:
    """And have learnt: more processes than GPUs take turns on them."""
    out = tmp_path / "figures.json"
    given = ["--epochs", "3", "--batch-size", "32", "--out", str(out)]
    ended = command("--strategy", strategy, flag, str(n), *given)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(out.read_text())
    assert figures["replicas_equal"] and figures["accuracy"] > 0.8
    told = ended.stdout.splitlines()[0]
    assert " on CPUs, " in told if flag == "--workers" else " GPU" in told


@pytest.mark.gpu
@needs_a_gpu
def test_more_gpus_than_there_are() -> None:
    """Only data_parallel needs one for each; one line says so."""
    found = torch.cuda.device_count()
    ended = command("--strategy", "data_parallel", "--n-gpus", str(found + 1))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"from_scratch: data_parallel needs a GPU for each of {found + 1} replicas, and there are "
        f"{found}; on CPUs take param_server, ring_all_reduce or ddp\n"
    )
