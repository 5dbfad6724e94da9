"""Checkpoints: one folder each, a file per rank, and a manifest that is written last.

Replicas differ inside a round, and their optimizer states always: every rank saves its own. All
files are written below a temporary name, synced and renamed, so a folder with a manifest is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localopt import LocalOptimizer, control
from localopt.collective import Collective

from .config import Config, ConfigError
from .engine import PATIENCE
from .optimizers import DataParallel

MANIFEST = "manifest.json"
FORMAT = 1

# Settings without which the saved states would mean something else.
_FITTING = (
    "model", "optimizer", "data", "total_batch_size", "label_skew", "sync", "sync_settings",
)  # fmt: skip


def save(
    folder: Path,
    step: int,
    config: Config,
    model: nn.Module,
    optimizer: LocalOptimizer | DataParallel,
    collective: Collective,
    *,
    publishes: bool,
) -> Path:
    """Write ``folder/step-{step}``; return its path. Every rank calls it; no collective is made.

    Args:
        publishes: whether this rank puts its host's files under their final name: one per host,
            for hosts that share no disk.

    Raises:
        OSError: on the rank that cannot write; nothing is left under the final name.
    """
    final = folder / f"step-{step:08d}"
    draft = folder / f".{final.name}.tmp"
    draft.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"model": model.state_dict(), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    if config.save_opt:
        state["optimizer"] = optimizer.state_dict()
    name = _rank_file(collective.rank)
    with (draft / name).open("wb") as file:
        torch.save(_owned(state), file)
        file.flush()
        os.fsync(file.fileno())
    told = json.dumps({"bytes": (draft / name).stat().st_size, "sha256": _sha256(draft / name)})
    files = control.gather(collective, told, PATIENCE)
    if publishes:
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": collective.world_size,
            "config": config.as_dict(),
            "files": {_rank_file(rank): json.loads(text) for rank, text in enumerate(files)},
        }
        _publish(draft, final, manifest)
    control.gather(collective, "published", PATIENCE)
    return final


def _publish(draft: Path, final: Path, manifest: dict[str, Any]) -> None:
    try:
        write_text(draft / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        draft.rename(final)
    except OSError:
        if not (final / MANIFEST).exists():  # else: another host on the same disk was first
            raise
    descriptor = os.open(final.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def load(
    path: Path,
    config: Config,
    model: nn.Module,
    optimizer: LocalOptimizer | DataParallel,
    collective: Collective,
) -> int:
    """Restore this rank's model, optimizer and random state; return the step.

    Raises:
        ConfigError: if the checkpoint is missing, damaged, or of another kind of run.
    """
    manifest = _manifest(path)
    if manifest["world_size"] != collective.world_size:
        raise ConfigError(
            f"resume_pth {path}: saved by {manifest['world_size']} replicas, this run has "
            f"{collective.world_size}"
        )
    for key in _FITTING:
        saved, mine = manifest["config"].get(key), config.as_dict()[key]
        if saved != mine:
            raise ConfigError(
                f"resume_pth {path}: saved with {key} {saved!r}, this run has {mine!r}"
            )
    state = _rank_state(path, manifest, _rank_file(collective.rank))
    if "optimizer" not in state:
        raise ConfigError(f"resume_pth {path}: saved without optimizer state (save_opt: false)")
    model.load_state_dict(state["model"])
    configured = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:  # of another version, or other settings inside the rule
        raise ConfigError(f"resume_pth {path}: {error}") from None
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)  # this run's config decides, not the saved one
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return int(manifest["step"])


def identity(path: Path) -> str:
    """A text that tells this checkpoint from others; ranks compare it before they load.

    Raises:
        ConfigError: if there is no whole checkpoint.
    """
    step = _manifest(path)["step"]
    return f"step {step}, manifest {_sha256(path / MANIFEST)}"


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"resume_pth {path}: no {MANIFEST} there, so no whole checkpoint"
        ) from None
    except ValueError:
        raise ConfigError(f"resume_pth {path}: {MANIFEST} is damaged") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"resume_pth {path}: {MANIFEST} is not of format {FORMAT}")
    return manifest


def _rank_state(path: Path, manifest: dict[str, Any], name: str) -> dict[str, Any]:
    file, recorded = path / name, manifest["files"][name]
    if not file.exists():
        raise ConfigError(f"resume_pth {path}: {name} is missing")
    if file.stat().st_size != recorded["bytes"] or _sha256(file) != recorded["sha256"]:
        raise ConfigError(f"resume_pth {path}: {name} is damaged: not what {MANIFEST} recorded")
    return torch.load(file, map_location="cpu", weights_only=True)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    # Hosts that share a disk may write the same file at the same moment.
    draft = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _owned(value: Any) -> Any:
    """``value`` with every tensor copied: a view would drag its whole flat buffer into the file."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _owned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_owned(item) for item in value)
    return value


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.pt"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
