"""From where a run goes on: a checkpoint that is named, the newest one, or a file of weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from torch import nn
from torch.optim import Optimizer

from localopt.collective import Collective
from localopt.faults import control
from localopt.merge import merged

from ..config import DEFAULTS, HOST_KEYS, Config
from ..engine import ReplicaOptimizer
from ..values import ConfigError, absolute, shortened
from . import files
from .files import MANIFEST, CheckpointError, sha256
from .saver import Counting, State

# Settings without which the saved states would mean something else.
_FITTING = (
    "model", "blurpool", "squeeze_excite", "optimizer", "data", "total_batch_size", "label_skew",
    "sync", "sync_settings", "precision", "ema",
)  # fmt: skip
# Settings that a run may change when it is continued; physical_batch_size follows from the number
# of replicas.
_FREE = {*HOST_KEYS, "resume", "physical_batch_size"}.union(
    f.name for f in fields(Config) if f.metadata["group"] in ("records", "machine")
)


@dataclass(frozen=True)
class Start:
    """Where training begins.

    Attributes:
        step: the number of steps made before.
        recorder: what had been recorded, where a checkpoint says so.
        folder: the run's folder, where the run itself is continued; else it gets a new one.
        lock: what keeps other runs from going on in that folder, on rank 0.
    """

    step: int = 0
    recorder: dict[str, Any] | None = None
    folder: Path | None = None
    lock: BinaryIO | None = None


def weights_file(config: Config) -> Path | None:
    """The file of weights to start from, if ``resume_pth`` names one."""
    path = absolute(config.resume_pth) if config.resume_pth else None
    return path if path and path.is_file() else None


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill ``model`` from a file of weights: a state_dict, or one rank's file of a checkpoint.

    Raises:
        ConfigError: if the file is missing or damaged, or fits another model.
    """
    content = _asked("resume_pth", files.read, path)
    _load_model(model, content.get("model", content), f"resume_pth {path}")


def _load_model(model: nn.Module, weights: Any, where: str) -> None:
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ConfigError(f"{where}: weights of another model: {reason}") from None


def restore(config: Config, state: State, collective: Collective, steps_per_epoch: int) -> Start:
    """Restore what ``resume`` or ``resume_pth`` ask for; say where to go on. All ranks call it.

    A checkpoint brings its own step. With a file of weights, which the model has already, steps are
    counted from ``resume_from_step`` or ``resume_from_epoch``, and the first round begins there.

    Raises:
        ConfigError: if the checkpoint is missing, damaged, of another kind of run, or at another
            step than asked for.
    """
    if config.resume == "auto" and (found := newest(config, collective)):
        folder, lock = found
        start = _restored(folder, "resume auto", config, state, collective)
        run = folder.parent.parent
        if collective.rank == 0:
            print(f"resume auto: continuing {run} after step {start.step}", flush=True)
        return Start(start.step, start.recorder, run, lock)
    if not config.resume_pth:
        return Start()
    path, wanted = absolute(config.resume_pth), _wanted_step(config, steps_per_epoch)
    if not path.is_file():
        if config.optimizer_resume_pth:
            raise ConfigError(
                f"optimizer_resume_pth is {config.optimizer_resume_pth!r}: resume_pth {path} is a "
                "checkpoint, which has its own optimizer state; leave it out"
            )
        step = _asked("resume_pth", files.manifest, path)["step"]
        if wanted not in (None, step):
            raise ConfigError(f"resume_pth {path}: at step {step}, and {wanted} was asked for")
        return _restored(path, "resume_pth", config, state, collective)
    if config.optimizer_resume_pth:
        _load_inner_optimizer(config, state.optimizer, collective)
    for part in (state.optimizer, state.ema):
        if isinstance(part, Counting):
            part.start_at(wanted or 0)
    return Start(wanted or 0)


def _wanted_step(config: Config, steps_per_epoch: int) -> int | None:
    if config.resume_from_step != -1:
        return config.resume_from_step
    return None if config.resume_from_epoch == -1 else config.resume_from_epoch * steps_per_epoch


# The newest checkpoint.


def newest(config: Config, collective: Collective) -> tuple[Path, BinaryIO | None] | None:
    """The newest checkpoint, whole on every host, of a run with these settings; None if none is.

    All ranks call it. Rank 0 proposes what it sees, from the newest on; the others look whether
    what they need is there and undamaged. A line on rank 0 says what was passed over, and why.

    Returns:
        The checkpoint and, on rank 0, the hold on its run: taken before anybody looks, so that of
        runs that are started at once only one goes on there, and clears away what it finds.
    """
    runs = absolute(config.log_pth)
    seen = _checkpoints(runs, config) if collective.rank == 0 else {}
    proposals = [str(path.relative_to(runs)) for path in seen]
    proposals = json.loads(control.gather(collective, json.dumps(proposals))[0])
    chosen = _whole(runs, proposals, collective)
    for folder, held in seen.items():
        if chosen is None or folder.parent != chosen.parent:
            held.close()
    return None if chosen is None else (chosen, seen.get(chosen))


def _whole(runs: Path, proposals: list[str], collective: Collective) -> Path | None:
    """The first of the proposals that all ranks find whole."""
    for proposal in proposals:
        folder = runs / proposal
        told = control.gather(collective, _fault(folder, collective))
        identities = {answer.partition(" ")[2] for answer in told if answer.startswith("whole")}
        if len(identities) == 1 and all(answer.startswith("whole") for answer in told):
            return folder
        if collective.rank == 0:
            faulty = next((r for r, answer in enumerate(told) if not answer.startswith("whole")), 0)
            reason = told[faulty] if len(identities) < 2 else "hosts hold different checkpoints"
            print(f"resume auto: passing over {reason} (rank {faulty})", flush=True)
    return None


def _checkpoints(runs: Path, config: Config) -> dict[Path, BinaryIO]:
    """Checkpoints of unfinished runs with these settings, the newest run's newest first.

    With each the hold on its run.

    Raises:
        ConfigError: if the folder of runs cannot be listed.
    """
    mine = _compared(config.as_dict())
    try:
        names = sorted(os.listdir(runs), reverse=True)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(
            f"resume auto: log_pth {runs}: {error.strerror}: its runs cannot be seen"
        ) from None
    found: dict[Path, BinaryIO] = {}
    for run in (runs / name for name in names):
        try:
            if not _may_be_continued(run, mine):
                continue
            if (held := files.lock(run)) is None:
                reason = "it is running"
            elif saved := list(reversed(files.found(run / "checkpoints").values())):
                found |= dict.fromkeys(saved, held)
                continue
            else:
                held.close()
                continue
        except OSError as error:  # another user's, mostly
            reason = f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
        except ValueError as error:
            reason = f"config.yml is damaged: {error}"
        print(f"resume auto: passing over {run}: {reason}", flush=True)
    return found


def _may_be_continued(run: Path, mine: dict[str, Any]) -> bool:
    """Whether it is the folder of an unfinished run with my settings.

    Raises:
        OSError: if that cannot be seen.
        ValueError: if its settings cannot be read.
    """
    try:
        text = files.read_text(run / "config.yml", _LARGEST_CONFIG)
        (run / "summary.json").lstat()
    except NotADirectoryError:
        return False
    except FileNotFoundError as error:
        if Path(error.filename).name == "config.yml":
            return False  # no run
    else:
        return False  # finished
    try:
        theirs = yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    if not isinstance(theirs, dict):
        raise ValueError("it holds no settings")
    return _compared(theirs) == mine


_LARGEST_CONFIG = 2**20


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (DEFAULTS | settings).items() if key not in _FREE}


def _fault(folder: Path, collective: Collective) -> str:
    """What is wrong with a checkpoint, as far as this rank needs it; "whole …" if nothing."""
    try:
        manifest = files.manifest(folder)
        for rank in _needed(manifest, collective):
            files.verify(folder, manifest, rank)
        return f"whole {sha256(folder / MANIFEST)}"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{folder}: {error.strerror}"


def _needed(manifest: dict[str, Any], collective: Collective) -> list[int]:
    """The ranks whose files this one reads: its own; with other replicas than then, all."""
    same = manifest["world_size"] == collective.world_size
    return [collective.rank] if same else list(range(manifest["world_size"]))


# One checkpoint.


def _restored(
    folder: Path, asked: str, config: Config, state: State, collective: Collective
) -> Start:
    """Restore this rank's model, optimizer and random state."""
    manifest = _asked(asked, files.manifest, folder)
    for key in _FITTING:
        saved, mine = manifest["config"].get(key, DEFAULTS[key]), config.as_dict()[key]
        if saved != mine:
            raise ConfigError(
                f"{asked} {folder}: saved with {key} {shortened(saved)}, this run has {mine!r}"
            )
    same = manifest["world_size"] == collective.world_size
    if same:
        content = _rank_state(asked, folder, manifest, collective.rank)
    else:
        content = _for_other_replicas(asked, folder, manifest, config, collective)
    _load_model(state.model, content["model"], f"{asked} {folder}")
    _load_optimizer(state.optimizer, content["optimizer"], f"{asked} {folder}")
    for key, part in state.beside.items():
        part.load_state_dict(content[key])
    if same:
        torch.set_rng_state(content["rng"])
        if "cuda_rng" in content and torch.accelerator.is_available():
            torch.get_device_module().set_rng_state(content["cuda_rng"])
    else:
        torch.manual_seed(torch.initial_seed() + 1_000_000_007 * manifest["step"])
    return Start(int(manifest["step"]), content["recorder"])


def _rank_state(asked: str, folder: Path, manifest: dict[str, Any], rank: int) -> dict[str, Any]:
    content = _asked(asked, files.rank_state, folder, manifest, rank)
    if "optimizer" not in content:
        raise ConfigError(f"{asked} {folder}: saved without optimizer state (save_opt: false)")
    if missing := [part for part in ("model", "recorder", "rng") if part not in content]:
        name = files.rank_file(rank)
        raise ConfigError(f"{asked} {folder}: {name} does not hold {', '.join(missing)}")
    return content


def _for_other_replicas(
    asked: str, folder: Path, manifest: dict[str, Any], config: Config, collective: Collective
) -> dict[str, Any]:
    """What every rank takes where there are more replicas than saved, or fewer."""
    saved_by = manifest["world_size"]
    if config.label_skew:
        raise ConfigError(
            f"{asked} {folder}: saved by {saved_by} replicas, this run has "
            f"{collective.world_size}; with label_skew {config.label_skew} each has images of its "
            "own, which others could not go on with"
        )
    first: dict[str, Any] = {}

    def states() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        for rank in range(saved_by):
            content = _rank_state(asked, folder, manifest, rank)
            first.update(content if rank == 0 else {})
            yield content["model"], content["optimizer"]

    try:
        model, optimizer = merged(states())
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{asked} {folder}: {error}") from None
    if collective.rank == 0:
        print(
            f"{asked}: saved by {saved_by} replicas at step {manifest['step']}, this run has "
            f"{collective.world_size}: all start from the consensus with the mean of the "
            "optimizer states, and begin a new round",
            flush=True,
        )
    recorder = first["recorder"] | {"pending": []}  # those were of other shares of the images
    return first | {"model": model, "optimizer": optimizer, "recorder": recorder}


def _load_optimizer(
    optimizer: Optimizer | ReplicaOptimizer, saved: dict[str, Any], where: str
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


def _load_inner_optimizer(
    config: Config, optimizer: ReplicaOptimizer, collective: Collective
) -> None:
    path = absolute(config.optimizer_resume_pth)
    # Data-parallel replicas have one state: a local run's would take them apart.
    own = config.local and config.multiple_optimizers
    rank = collective.rank if own else 0
    manifest = _asked("optimizer_resume_pth", files.manifest, path)
    for key in ("model", "blurpool", "squeeze_excite", "optimizer"):
        saved, mine = manifest["config"].get(key, DEFAULTS[key]), config.as_dict()[key]
        if str(saved).removeprefix("local") != str(mine).removeprefix("local"):
            raise ConfigError(
                f"optimizer_resume_pth {path}: saved with {key} {shortened(saved)}, this run has "
                f"{mine!r}"
            )
    if rank >= manifest["world_size"]:
        raise ConfigError(
            f"optimizer_resume_pth {path}: saved by {manifest['world_size']} replicas, so there is "
            f"no {files.rank_file(rank)}; set multiple_optimizers to false to give all "
            "replicas rank 0's"
        )
    content = _asked("optimizer_resume_pth", files.rank_state, path, manifest, rank)
    if "optimizer" not in content:
        raise ConfigError(f"optimizer_resume_pth {path}: saved without optimizer state")
    inner = {key: content["optimizer"][key] for key in ("state", "param_groups")}
    _load_optimizer(optimizer.inner, inner, f"optimizer_resume_pth {path}")


def identity(path: Path, setting: str) -> str:
    """A text that tells this checkpoint, or file of weights, from others; ranks compare it first.

    Raises:
        ConfigError: if there is no whole checkpoint.
    """
    try:
        if path.is_file():
            return f"weights {sha256(path)}"
        step = _asked(setting, files.manifest, path)["step"]
        return f"step {step}, manifest {sha256(path / MANIFEST)}"
    except OSError as error:
        raise ConfigError(f"{setting} {path}: {error.strerror}") from None


def _asked(setting: str, read: Any, *arguments: Any) -> dict[str, Any]:
    """What ``read`` gives; its complaint names the setting."""
    try:
        return read(*arguments)
    except CheckpointError as error:
        raise ConfigError(f"{setting} {error}") from None
