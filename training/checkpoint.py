"""Checkpoints: one folder each, a file per rank, and a manifest that is written last.

Replicas differ inside a round, and their optimizer states always: every rank saves its own. All
files are written below a temporary name, synced and renamed, so a folder with a manifest is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from localopt import LocalOptimizer, control
from localopt.collective import Collective

from .config import DEFAULTS, PER_HOST, Config, ConfigError, absolute
from .engine import PATIENCE
from .optimizers import DataParallel

MANIFEST = "manifest.json"
FORMAT = 1

# Settings without which the saved states would mean something else.
_FITTING = (
    "model", "blurpool", "squeeze_excite", "optimizer", "data", "total_batch_size", "label_skew",
    "sync", "sync_settings", "precision", "ema",
)  # fmt: skip


class Stateful(Protocol):
    """What is saved beside model and optimizer, where a run has it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@runtime_checkable
class Counting(Protocol):
    """What counts the steps of the run."""

    def start_at(self, step: int) -> None: ...


@dataclass(frozen=True)
class State:
    """All that changes in training on one rank; ``scaler`` and ``ema`` where the run has them."""

    model: nn.Module
    optimizer: LocalOptimizer | DataParallel
    scaler: Stateful | None = None
    ema: Stateful | None = None

    @property
    def beside(self) -> dict[str, Stateful]:
        """What is saved beside model and optimizer, by its key in the file."""
        optional = {"scaler": self.scaler, "ema": self.ema}
        return {key: part for key, part in optional.items() if part is not None}


def save(
    folder: Path,
    step: int,
    config: Config,
    state: State,
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
    saved: dict[str, Any] = {"model": state.model.state_dict(), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        saved["cuda_rng"] = torch.cuda.get_rng_state()
    if config.save_opt:
        saved["optimizer"] = state.optimizer.state_dict()
    saved |= {key: part.state_dict() for key, part in state.beside.items()}
    name = _rank_file(collective.rank)
    with (draft / name).open("wb") as file:
        torch.save(_owned(saved), file)
        file.flush()
        os.fsync(file.fileno())
    told = json.dumps({"bytes": (draft / name).stat().st_size, "sha256": _sha256(draft / name)})
    files = control.gather(collective, told, PATIENCE)
    if publishes:
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": collective.world_size,
            # Alike on all hosts, whose paths differ: ranks compare manifests before they resume.
            "config": {k: v for k, v in config.as_dict().items() if k not in PER_HOST},
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


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill ``model`` from a file of weights: a state_dict, or one rank's file of a checkpoint.

    Raises:
        ConfigError: if the file is missing or damaged, or fits another model.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"resume_pth {path}: {error.strerror}") from None
    except Exception as error:  # torch does not say what it raises for a file of another kind
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"resume_pth {path}: not a file of weights: {reason}") from None
    weights = content.get("model", content) if isinstance(content, dict) else content
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ConfigError(f"resume_pth {path}: weights of another model: {reason}") from None


def resume(config: Config, state: State, collective: Collective, steps_per_epoch: int) -> int:
    """Restore what ``resume_pth`` names; return the step to go on from.

    A checkpoint brings its own step. With a file of weights, which the model has already, steps are
    counted from ``resume_from_step`` or ``resume_from_epoch``, and the first round begins there.

    Raises:
        ConfigError: if the checkpoint is missing, damaged, of another kind of run, or at another
            step than asked for.
    """
    path, wanted = absolute(config.resume_pth), _wanted_step(config, steps_per_epoch)
    if not path.is_file():
        if config.optimizer_resume_pth:
            raise ConfigError(
                f"optimizer_resume_pth is {config.optimizer_resume_pth!r}: resume_pth {path} is a "
                "checkpoint, which has its own optimizer state; leave it out"
            )
        manifest = _manifest(path)
        step = int(manifest["step"])
        if wanted not in (None, step):
            raise ConfigError(f"resume_pth {path}: at step {step}, and {wanted} was asked for")
        _load(path, manifest, config, state, collective)
        return step
    if config.optimizer_resume_pth:
        _load_inner_optimizer(config, state.optimizer, collective)
    for part in (state.optimizer, state.ema):
        if isinstance(part, Counting):
            part.start_at(wanted or 0)
    return wanted or 0


def _wanted_step(config: Config, steps_per_epoch: int) -> int | None:
    if config.resume_from_step != -1:
        return config.resume_from_step
    return None if config.resume_from_epoch == -1 else config.resume_from_epoch * steps_per_epoch


def _load_inner_optimizer(
    config: Config, optimizer: LocalOptimizer | DataParallel, collective: Collective
) -> None:
    path = absolute(config.optimizer_resume_pth)
    # Data-parallel replicas have one state: a local run's would take them apart.
    own = config.local and config.multiple_optimizers
    name = _rank_file(collective.rank if own else 0)
    manifest = _manifest(path, "optimizer_resume_pth")
    for key in ("model", "blurpool", "squeeze_excite", "optimizer"):
        saved, mine = manifest["config"].get(key, DEFAULTS[key]), config.as_dict()[key]
        if str(saved).removeprefix("local") != str(mine).removeprefix("local"):
            raise ConfigError(
                f"optimizer_resume_pth {path}: saved with {key} {saved!r}, this run has {mine!r}"
            )
    if name not in manifest["files"]:
        raise ConfigError(
            f"optimizer_resume_pth {path}: saved by {manifest['world_size']} replicas, so there is "
            f"no {name}; set multiple_optimizers to false to give all replicas rank 0's"
        )
    saved = _rank_state(path, manifest, name, "optimizer_resume_pth").get("optimizer")
    if saved is None:
        raise ConfigError(f"optimizer_resume_pth {path}: saved without optimizer state")
    inner = {key: saved[key] for key in ("state", "param_groups")}
    _load_optimizer(optimizer.inner, inner, f"optimizer_resume_pth {path}")


def _load_optimizer(
    optimizer: Optimizer | LocalOptimizer | DataParallel, saved: dict[str, Any], where: str
) -> None:
    """Restore an optimizer; its settings stay those of this run's config."""
    configured = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:  # of another version, or other settings inside the rule
        raise ConfigError(f"{where}: {error}") from None
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)


def _load(
    path: Path, manifest: dict[str, Any], config: Config, state: State, collective: Collective
) -> None:
    """Restore this rank's model, optimizer and random state."""
    if manifest["world_size"] != collective.world_size:
        raise ConfigError(
            f"resume_pth {path}: saved by {manifest['world_size']} replicas, this run has "
            f"{collective.world_size}"
        )
    for key in _FITTING:
        saved, mine = manifest["config"].get(key, DEFAULTS[key]), config.as_dict()[key]
        if saved != mine:
            raise ConfigError(
                f"resume_pth {path}: saved with {key} {saved!r}, this run has {mine!r}"
            )
    content = _rank_state(path, manifest, _rank_file(collective.rank))
    if "optimizer" not in content:
        raise ConfigError(f"resume_pth {path}: saved without optimizer state (save_opt: false)")
    state.model.load_state_dict(content["model"])
    _load_optimizer(state.optimizer, content["optimizer"], f"resume_pth {path}")
    for key, part in state.beside.items():
        part.load_state_dict(content[key])
    torch.set_rng_state(content["rng"])
    if "cuda_rng" in content and torch.cuda.is_available():
        torch.cuda.set_rng_state(content["cuda_rng"])


def identity(path: Path, setting: str = "resume_pth") -> str:
    """A text that tells this checkpoint, or file of weights, from others; ranks compare it first.

    Raises:
        ConfigError: if there is no whole checkpoint.
    """
    try:
        if path.is_file():
            return f"weights {_sha256(path)}"
        step = _manifest(path, setting)["step"]
        return f"step {step}, manifest {_sha256(path / MANIFEST)}"
    except OSError as error:
        raise ConfigError(f"{setting} {path}: {error.strerror}") from None


def _manifest(path: Path, setting: str = "resume_pth") -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = f"no {MANIFEST} there, so no whole checkpoint" if path.exists() else "not there"
        raise ConfigError(f"{setting} {path}: {what}") from None
    except ValueError:
        raise ConfigError(f"{setting} {path}: {MANIFEST} is damaged") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"{setting} {path}: {MANIFEST} is not of format {FORMAT}")
    return manifest


def _rank_state(
    path: Path, manifest: dict[str, Any], name: str, setting: str = "resume_pth"
) -> dict[str, Any]:
    file, recorded = path / name, manifest["files"][name]
    if not file.exists():
        raise ConfigError(f"{setting} {path}: {name} is missing")
    if file.stat().st_size != recorded["bytes"] or _sha256(file) != recorded["sha256"]:
        raise ConfigError(f"{setting} {path}: {name} is damaged: not what {MANIFEST} recorded")
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
