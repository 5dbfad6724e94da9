"""Where a run's records go: one small class each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from .config import Config
from .values import ConfigError


class Logger(Protocol):
    """Where records go."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record; its "step" is the number of steps finished."""

    def preempted(self) -> None:
        """The run stops before its end."""

    def close(self, *, failed: bool) -> None:
        """No record follows."""


class Wandb:
    """Weights & Biases, by its own rules of login; "offline" needs none.

    "offline-sync" is for hosts without internet: after each evaluation it asks wandb-osh, which
    runs on a host that shares the disk, to upload what there is.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        self._ask_for_upload = _upload_hook() if config.wandb == "offline-sync" else None
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity or None,
            tags=config.wandb_tags,
            mode="offline" if self._ask_for_upload else config.wandb,
            dir=folder,
            name=folder.name,
            id=folder.name,  # a run that is continued goes on with its own curves
            resume="allow",
            config=config.as_dict(),
        )

    def write(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record["step"]
        values = {f"{kind}/{k}": v for k, v in _by_rank(record) if k not in ("kind", "step")}
        self._run.log(values, step=step)
        if self._ask_for_upload and kind in ("val", "summary"):
            self._ask_for_upload()

    def preempted(self) -> None:
        self._run.mark_preempting()

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _upload_hook() -> Callable[[], None]:
    try:
        from wandb_osh.hooks import TriggerWandbSyncHook
    except ImportError:
        raise ConfigError(
            "wandb is offline-sync: package wandb-osh is missing; pip install wandb-osh"
        ) from None
    return TriggerWandbSyncHook()


def _by_rank(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The items of ``record``, a list as an item per rank: a curve each."""
    for key, value in record.items():
        if isinstance(value, list):
            yield from ((f"{key}/rank {rank}", item) for rank, item in enumerate(value))
        else:
            yield key, value
