"""What tests of the program share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Once
from tests.support.program import ROOT


@pytest.fixture(scope="session")
def data(once: Once) -> str:
    """A folder of data sets with the digits in it, written by the command the README names."""

    def write(folder: Path) -> None:
        command = [sys.executable, "-m", "data.write", "digits", "--out", str(folder / "digits")]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)

    return str(once("data", write))
