"""tests/conftest.py: on a machine with a GPU only the tests marked `gpu` find one."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.slow

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TESTS = """
import os, subprocess, sys
import pytest
import torch

def found():
    told = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    child = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    return torch.cuda.is_available(), torch.cuda.device_count(), child.stdout.strip()

@pytest.fixture(scope="module")
def at_first():
    return found()

def test_plain(at_first):
    assert found() == at_first == (False, 0, "")

@pytest.mark.gpu
def test_gpu():
    assert found() == (True, 2, "0,1")

def test_plain_again():
    assert found() == (False, 0, "")
"""
TWO_GPUS = """
import torch

torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2
"""


def test_only_tests_marked_gpu_find_one(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile(test_here=TESTS, two_gpus=TWO_GPUS)
    pytester.makeini("[pytest]\nmarkers = gpu: needs one")
    ran = pytester.runpytest_subprocess("-p", "two_gpus", "-p", "no:randomly")
    ran.assert_outcomes(passed=3)
