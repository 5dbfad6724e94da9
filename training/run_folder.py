"""A run's folder: its config, and the code, software and machine that it ran with."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from localopt.collective import Collective
from localopt.faults import control

from . import named, progress
from .checkpoint import files
from .config import Config
from .values import ROOT, ConfigError, absolute

_PACKAGES = ("torch", "deepspeed", "ffcv", "numba", "numpy", "vit-pytorch", "torchvision", "wandb")


def make_folder(config: Config, collective: Collective) -> Path:
    """This run's new folder, the same on all ranks, with its config and environment."""
    name = control.gather(collective, progress.name_of(config))[0]
    folder = absolute(config.log_pth) / name
    try:
        files.make_folder(folder)
        if collective.rank == 0:
            environment = json.dumps(_environment(config, collective), indent=2) + "\n"
            files.write_text(folder / "environment.json", environment)
            # Last: a folder with its config is a run's.
            settings = yaml.safe_dump(config.as_dict(), sort_keys=False)
            files.write_text(folder / "config.yml", settings)
    except OSError as error:
        raise ConfigError(f"log_pth {folder.parent}: {error.strerror}") from None
    return folder


def _environment(config: Config, collective: Collective) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain")),
        "code": code_digest(),
        "own_code": own_code(config),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": torch.accelerator.device_count(),
        "world_size": collective.world_size,
        "packages": versions(),
    }


def code_digest() -> str:
    """A checksum of this program's own code, committed or not."""
    total = hashlib.sha256()
    for folder in ("localopt", "data", "training"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return total.hexdigest()[:12]


def own_code(config: Config) -> dict[str, str]:
    """A checksum of each module that the rule or the period was imported from."""
    return named.own_code([config.sync, config.period]) if config.local else {}


def versions() -> dict[str, str | None]:
    """The releases of the packages that what is computed depends on."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
