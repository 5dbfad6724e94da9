"""The weights of a checkpoint for other programs.

The file holds a plain state_dict of what the replicas agree on, and nothing of localopt's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from data.dataset import DESCRIPTION, DataError, Dataset
from localopt.merge import merged
from localopt.saved import KEY, own_state
from localopt.sync import RULES

from .. import models
from ..config import DEFAULTS
from ..evaluate import has_batch_norm
from ..values import ConfigError, absolute
from . import files
from .files import MANIFEST, CheckpointError


class ExportError(ValueError):
    """A checkpoint that gives no weights, or a file that cannot be written. One line."""


@dataclass(frozen=True)
class Exported:
    """What was exported."""

    file: Path
    settings: Mapping[str, Any]  # of the run
    model: nn.Module  # the program's, with the weights
    classes: int
    replicas: int
    step: int  # with which the moving average ends, if it is exported
    average: bool  # whether it is the moving average
    normalised: tuple[list[float], list[float]] | None  # images' mean and deviation, where known

    def __str__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        resolution = self.settings["resolution"]
        replicas = f"{self.replicas} replicas" if self.replicas > 1 else "1 replica"
        what = "moving average" if self.average else "consensus"
        lines = [
            f"{self.file}: {what} of {replicas} after step {self.step}",
            f"{self.settings['model']}, {self.classes} classes, {resolution} x {resolution} "
            f"pixels, {count:,} parameters",
            f"for {_home(self.settings, self.classes)}",
        ]
        if self.normalised:
            mean, std = self.normalised
            lines.append(f"images in [0, 1] are normalised with mean {mean} and std {std}")
        if has_batch_norm(self.model) and self.replicas > 1:
            lines.append(
                "BatchNorm statistics are means of the replicas' own: better re-estimate them over "
                "training images"
            )
        return "; ".join(lines)


def export(path: Path, out: Path | None = None, *, ema: bool = False) -> Exported:
    """Write the weights of a checkpoint as a plain state_dict.

    Args:
        path: a checkpoint's folder, or a run's, of which the newest is taken.
        out: the file; None: one named after model and step, in the working directory.
        ema: the moving average instead of the consensus.

    Raises:
        CheckpointError: if the checkpoint is not whole.
        ExportError: if it has no such weights, or the file cannot be written.
    """
    folder = _checkpoint(path)
    manifest = files.manifest(folder)
    settings = {**DEFAULTS, **manifest["config"]}
    step, average = manifest["step"], "-ema" if ema else ""
    weights, averaged_to = _weights(folder, manifest, settings, ema)
    model, classes = _filled(folder, settings, weights)
    out = out or Path(f"{settings['model']}-step-{step:08d}{average}.pt")
    _write(out, {name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    return Exported(
        file=out, settings=settings, model=model, classes=classes,
        replicas=manifest["world_size"], step=averaged_to if ema else step, average=ema,
        normalised=_normalised(folder.parent.parent),
    )  # fmt: skip


def _checkpoint(path: Path) -> Path:
    """The folder of the checkpoint that ``path`` means."""
    if (path / MANIFEST).exists():
        return path
    for folder in (path / "checkpoints", path):
        if steps := files.found(folder):
            return list(steps.values())[-1]
    if not path.is_dir() or files.found(path.parent):
        files.manifest(path)  # which says what is wrong
    raise ExportError(f"{path}: neither a checkpoint nor a run that has one")


def _weights(
    folder: Path, manifest: dict[str, Any], settings: Mapping[str, Any], ema: bool
) -> tuple[dict[str, Tensor], int]:
    """The replicas' agreed weights, and the step of the moving average."""
    averaged_to = 0

    def states() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        nonlocal averaged_to
        for rank in range(manifest["world_size"]):
            content = files.rank_state(folder, manifest, rank)
            if not ema:
                yield content["model"], _consensus_state(folder, content, settings)
                continue
            if "ema" not in content:
                raise ExportError(f"{folder}: the run had no moving average: leave out --ema")
            part = content["ema"]
            averaged_to = part["step"]
            average = {**part["parameters"], **part["buffers"]}
            # It has no frozen parameters, and buffers that a state_dict leaves out.
            yield {name: average.get(name, x) for name, x in content["model"].items()}, {}

    try:
        return merged(states())[0], averaged_to
    except CheckpointError:
        raise
    except ValueError as error:
        raise ExportError(f"{folder}: {error}") from None


def _consensus_state(
    folder: Path, content: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Of the optimizer's state what the consensus depends on."""
    state = content.get("optimizer", {})
    local = settings["optimizer"].startswith("local")
    # Checkpoints of old do not say; those were of built-in rules.
    centre = content.get("centre", getattr(RULES.get(str(settings["sync"])), "centre", None))
    if local and not state and centre:
        raise ExportError(
            f"{folder}: saved without optimizer state (save_opt: false), in which sync "
            f"{settings['sync']} has its weights"
        )
    own = own_state(state)
    return {"param_groups": [{KEY: own}]} if own is not None else {}


def _filled(
    folder: Path, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[nn.Module, int]:
    """The run's model with ``weights``, and how many classes it has."""
    classes = len(list(weights.values())[-1])  # the head's bias comes last
    try:
        model = models.of(settings, classes)
        model.load_state_dict(weights)
    except (ConfigError, RuntimeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ExportError(f"{folder}: weights of another {settings['model']}: {reason}") from None
    return model, classes


def _home(settings: Mapping[str, Any], classes: int) -> str:
    """What the file's names fit."""
    name, resolution = settings["model"], settings["resolution"]
    changes = [change for change in ("blurpool", "squeeze_excite") if settings[change]]
    plain = f"training.models.build({name!r}, classes={classes}, resolution={resolution}"
    if changes:
        return f"{plain}, …) with {' and '.join(changes)}, which no plain library has"
    if name in models.TORCHVISION:
        return f"torchvision.models.{name}(num_classes={classes})"
    if name.startswith("simplevit"):
        return f"vit_pytorch's SimpleViT(image_size={resolution}, num_classes={classes}, …)"
    return f"{plain}, …)"


def _normalised(run: Path) -> tuple[list[float], list[float]] | None:
    """What the run's images were normalised with, where the run's folder and the data are here."""
    try:
        config = yaml.safe_load((run / "config.yml").read_text(encoding="utf-8"))
        dataset = Dataset.load(absolute(config["data_pth"]) / config["data"] / DESCRIPTION)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError, DataError):
        return None
    return dataset.mean, dataset.std


def _write(out: Path, weights: dict[str, Tensor]) -> None:
    """The whole file or nothing."""
    try:
        with files.whole(out) as file:
            torch.save(weights, file)
    except (OSError, RuntimeError) as error:  # torch raises the latter where a disk is full
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ExportError(f"{out}: cannot be written: {reason}") from None
