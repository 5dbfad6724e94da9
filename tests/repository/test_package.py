"""What `pip install .` makes of the library, and what it leaves behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import localopt
from tests.support.patience import PATIENCE
from tests.support.program import ROOT

pytestmark = pytest.mark.slow


def built(folder: Path, out: Path) -> zipfile.ZipFile:
    """The wheel that pip makes of a folder, as when it installs from there."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    options = ["--disable-pip-version-check", "--no-index", "--wheel-dir", str(out), str(folder)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.iterdir()
    return zipfile.ZipFile(wheel)


def test_a_second_install_has_nothing_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "localopt", folder / "localopt")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "localopt" / "removed.py").touch()
    before = set(folder.iterdir())
    assert "localopt/removed.py" in built(folder, tmp_path / "first").namelist()
    (folder / "localopt" / "removed.py").unlink()
    wheel = built(folder, tmp_path / "second")
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    ours = [path for path in (ROOT / "localopt").rglob("*") if path.suffix in (".py", ".typed")]
    assert sorted(names) == sorted(str(path.relative_to(ROOT)) for path in ours)
    left = {path.name for path in set(folder.iterdir()) - before}
    assert left <= {"localopt.egg-info"}, "which no install reads"
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    assert f"\nVersion: {localopt.__version__}\n" in wheel.read(metadata).decode()
