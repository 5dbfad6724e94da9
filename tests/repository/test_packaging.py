"""A wheel and an sdist install, and the README's program runs with what they install."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE
from tests.support.program import ROOT

# What a package is made of: a build writes into the folder that it is in.
SOURCES = ("localopt", "pyproject.toml", "README.md", "LICENSE")


def build(kind: str, out: Path, scratch: Path) -> Path:
    """A wheel or an sdist of a copy of the sources."""
    copy = scratch / "sources"
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(source, copy / name)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def installed(package: Path, folder: Path) -> Path:
    """The python of an environment that has the package, torch, and nothing of the repository."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "torch_of_another_environment.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    done = subprocess.run(
        [*install, *offline, str(package)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_it_installs_runs_the_readme(kind: str, tmp_path: Path) -> None:
    package = build(kind, tmp_path, tmp_path)
    python = installed(package, tmp_path / "venv")
    (program,) = re.findall(r"```python\n(import os\n.*?)```", readme(), re.DOTALL)
    work = tmp_path / "work"
    work.mkdir()
    (work / "train.py").write_text(f"{program}\nimport localopt\nprint(localopt.__file__)\n")
    torchrun = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "train.py"], cwd=work, env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "synchronisations in 500 steps" in done.stdout
    files = set(re.findall(r"^.*localopt/__init__\.py$", done.stdout, re.MULTILINE))
    assert len(files) == 1 and next(iter(files)).startswith(str(tmp_path / "venv"))


@pytest.mark.slow
def test_the_wheel_has_the_library_and_no_more(tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(build("wheel", tmp_path, tmp_path)).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "localopt").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "localopt/py.typed" in names
    assert all(name.startswith(("localopt/", "localopt-")) for name in names)


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")
