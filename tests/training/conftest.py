"""What tests on real processes share."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.program import ROOT


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of data sets with the digits in it, written by the command the README names."""
    folder = tmp_path_factory.mktemp("data")
    command = [str(ROOT / ".venv/bin/python"), "-m", "data.write", "digits", "--out"]
    subprocess.run([*command, str(folder / "digits")], check=True, cwd=ROOT, capture_output=True)
    return str(folder)
