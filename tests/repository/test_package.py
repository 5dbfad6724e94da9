"""A wheel and an sdist: what is in them, what a build leaves behind, and that they work."""

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

import localopt
from tests.support.patience import PATIENCE
from tests.support.program import ROOT

pytestmark = pytest.mark.slow

# What a package is made of: a build may write into the folder that it is in.
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


def copied(folder: Path) -> Path:
    """The sources, in a folder of their own."""
    shutil.copytree(ROOT / "localopt", folder / "localopt")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    return folder


def built(folder: Path, out: Path) -> zipfile.ZipFile:
    """The wheel that pip makes of a folder, as when it installs from there."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    options = ["--disable-pip-version-check", "--no-index", "--wheel-dir", str(out), str(folder)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.iterdir()
    return zipfile.ZipFile(wheel)


def test_a_second_install_has_nothing_of_the_first(tmp_path: Path) -> None:
    folder = copied(tmp_path / "repository")
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


def build(kind: str, out: Path, scratch: Path) -> Path:
    """A wheel or an sdist."""
    copy = copied(scratch / "sources")
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


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_it_installs_runs_the_readme(kind: str, tmp_path: Path) -> None:
    package = build(kind, tmp_path, tmp_path)
    python = installed(package, tmp_path / "venv")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import os\n.*?)```", readme, re.DOTALL)
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
