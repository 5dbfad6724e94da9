"""From where a run goes on: a checkpoint that is named, the newest one, or a file of weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
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
from .saver import State

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
    """Where training begins."""

    step: int = 0  # the number of steps made before
    recorder: dict[str, Any] | None = None  # what had been recorded, where a checkpoint says so
    folder: Path | None = None  # the run's, where the run itself is continued; else it gets one
    lock: BinaryIO | None = None  # what keeps other runs out of that folder, on rank 0


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
        if part is not None:
            part.start_at(wanted or 0)
    return Start(wanted or 0)


def _wanted_step(config: Config, steps_per_epoch: int) -> int | None:
    if config.resume_from_step != -1:
        return config.resume_from_step
    return None if config.resume_from_epoch == -1 else config.resume_from_epoch * steps_per_epoch


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
        answers = control.gather(collective, _fault(folder, collective))
        faults = {r: why for r, why in enumerate(answers) if not why.startswith("whole")}
        whole = set(answers) - set(faults.values())
        if not faults and len(whole) == 1:
            return folder
        if collective.rank == 0:
            rank = next(iter(faults), 0)
            reason = faults[rank] if len(whole) < 2 else "hosts hold different checkpoints"
            print(f"resume auto: passing over {reason} (rank {rank})", flush=True)
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


class _Checkpoint:
    """A checkpoint that a setting asks for; complaints name both."""

    def __init__(self, asked: str, folder: Path) -> None:
        self.asked, self.folder = asked, folder
        self.manifest = _asked(asked, files.manifest, folder)
        self.replicas: int = self.manifest["world_size"]

    def refusal(self, problem: object) -> ConfigError:
        return ConfigError(f"{self.asked} {self.folder}: {problem}")

    def check(self, config: Config, keys: Iterable[str], free: str = "") -> None:
        """Refuse one that was saved with other settings; of a name the prefix ``free`` is free."""
        for key in keys:
            saved, mine = self.manifest["config"].get(key, DEFAULTS[key]), config.as_dict()[key]
            alike = free and str(saved).removeprefix(free) == str(mine).removeprefix(free)
            if saved != mine and not alike:
                raise self.refusal(f"saved with {key} {shortened(saved)}, this run has {mine!r}")

    def state(self, rank: int) -> dict[str, Any]:
        """What that rank saved."""
        content = _asked(self.asked, files.rank_state, self.folder, self.manifest, rank)
        if "optimizer" not in content:
            raise self.refusal("saved without optimizer state (save_opt: false)")
        if missing := [part for part in ("model", "recorder", "rng") if part not in content]:
            raise self.refusal(f"{files.rank_file(rank)} does not hold {', '.join(missing)}")
        return content


def _restored(
    folder: Path, asked: str, config: Config, state: State, collective: Collective
) -> Start:
    """Restore this rank's model, optimizer and random state."""
    source = _Checkpoint(asked, folder)
    source.check(config, _FITTING)
    same, step = source.replicas == collective.world_size, int(source.manifest["step"])
    content = (
        source.state(collective.rank) if same else _for_other_replicas(source, config, collective)
    )
    _load_model(state.model, content["model"], f"{asked} {folder}")
    _load_optimizer(state.optimizer, content["optimizer"], source)
    for key, part in state.parts.items():
        part.load_state_dict(content[key])
    if same:
        torch.set_rng_state(content["rng"])
        if "cuda_rng" in content and torch.accelerator.is_available():
            torch.get_device_module().set_rng_state(content["cuda_rng"])
    else:
        torch.manual_seed(torch.initial_seed() + 1_000_000_007 * step)
    return Start(step, content["recorder"])


def _for_other_replicas(
    source: _Checkpoint, config: Config, collective: Collective
) -> dict[str, Any]:
    """What every rank takes where there are more replicas than saved, or fewer."""
    numbers = f"saved by {source.replicas} replicas%s, this run has {collective.world_size}"
    if config.label_skew:
        raise source.refusal(
            f"{numbers % ''}; with label_skew {config.label_skew} each has images of its own, "
            "which others could not go on with"
        )
    first: dict[str, Any] = {}

    def states() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        for rank in range(source.replicas):
            content = source.state(rank)
            first.update(content if rank == 0 else {})
            yield content["model"], content["optimizer"]

    try:
        model, optimizer = merged(states())
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise source.refusal(error) from None
    if collective.rank == 0:
        at = f" at step {source.manifest['step']}"
        print(
            f"{source.asked}: {numbers % at}: all start from the consensus with the mean of the "
            "optimizer states, and begin a new round",
            flush=True,
        )
    recorder = first["recorder"] | {"pending": []}  # those were of other shares of the images
    return first | {"model": model, "optimizer": optimizer, "recorder": recorder}


def _load_optimizer(
    optimizer: Optimizer | ReplicaOptimizer, saved: dict[str, Any], source: _Checkpoint
) -> None:
    """Restore an optimizer; its settings stay those of this run's config."""
    configured = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:  # of another version, or other settings inside the rule
        raise source.refusal(error) from None
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)


def _load_inner_optimizer(
    config: Config, optimizer: ReplicaOptimizer, collective: Collective
) -> None:
    source = _Checkpoint("optimizer_resume_pth", absolute(config.optimizer_resume_pth))
    # Data-parallel replicas have one state: a local run's would take them apart.
    own = config.local and config.multiple_optimizers
    rank = collective.rank if own else 0
    source.check(config, ("model", "blurpool", "squeeze_excite", "optimizer"), free="local")
    if rank >= source.replicas:
        raise source.refusal(
            f"saved by {source.replicas} replicas, so there is no {files.rank_file(rank)}; set "
            "multiple_optimizers to false to give all replicas rank 0's"
        )
    saved = source.state(rank)["optimizer"]
    inner = {key: saved[key] for key in ("state", "param_groups")}
    _load_optimizer(optimizer.inner, inner, source)


def identity(path: Path, setting: str) -> str:
    """A text that identifies this checkpoint, or file of weights; ranks compare it first."""
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
