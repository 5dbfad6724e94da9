"""Where a run's records go: one small class each, in `LOGGERS` where it is chosen by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .values import ConfigError, did_you_mean

Record = Mapping[str, Any]


class Logger:
    """Takes records; the "step" of one is the number of steps finished.

    Those in `LOGGERS` are made of the run's settings, its folder, and the step where it goes on.
    """

    def write(self, record: Record) -> None:
        """Take one record."""
        raise NotImplementedError

    def preempted(self) -> None:
        """The run stops before its end."""

    def close(self, *, failed: bool) -> None:
        """No record follows."""


class Wandb(Logger):
    """Weights & Biases, by its own rules of login; "offline" needs none.

    "offline-sync" is for hosts without internet: after each evaluation it asks wandb-osh, which
    runs on a host that shares the disk, to upload what there is.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, step: int) -> None:
        import wandb

        mode, self._ask_for_upload = settings["wandb"], None
        if mode == "offline-sync":
            from wandb_osh.hooks import TriggerWandbSyncHook

            mode, self._ask_for_upload = "offline", TriggerWandbSyncHook()
        self._run = wandb.init(
            project=settings["wandb_project"], entity=settings["wandb_entity"] or None,
            tags=settings["wandb_tags"], mode=mode, dir=folder, name=folder.name,
            id=folder.name, resume="allow",  # a run that is continued has its own curves
            config=dict(settings),
        )  # fmt: skip

    def write(self, record: Record) -> None:
        self._run.log(dict(curves(record)), step=record["step"])
        if self._ask_for_upload and record["kind"] in ("val", "summary"):
            self._ask_for_upload()

    def preempted(self) -> None:
        self._run.mark_preempting()

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class TensorBoard(Logger):
    """TensorBoard's event files, in folder tensorboard of the run's."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier process recorded past this step is recorded once more.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        for name, value in curves(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class MLflow(Logger):
    """MLflow, where its own environment variables say; a run that is continued goes on there."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, step: int) -> None:
        import mlflow

        self._mlflow, self._status, known = mlflow, "FINISHED", folder / "mlflow-run"
        if known.exists():
            mlflow.start_run(run_id=known.read_text(encoding="utf-8"))
        else:
            run = mlflow.start_run(run_name=folder.name)
            mlflow.log_params(dict(settings))
            known.write_text(run.info.run_id, encoding="utf-8")

    def write(self, record: Record) -> None:
        self._mlflow.log_metrics(dict(curves(record)), step=record["step"])

    def preempted(self) -> None:
        self._status = "KILLED"

    def close(self, *, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else self._status)


LOGGERS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


def check(names: tuple[str, ...]) -> None:
    """Raise ValueError for a name that no logger has."""
    for name in names:
        if name not in LOGGERS:
            hint = did_you_mean(name, LOGGERS)
            raise ValueError(f"there is no {name!r}, only {', '.join(LOGGERS)}{hint}")


def chosen(settings: Mapping[str, Any], folder: Path, step: int) -> list[Logger]:
    """The loggers that ``settings`` ask for, besides metrics.jsonl.

    Raises:
        ConfigError: if what one needs is not installed, or it cannot begin.
    """
    kinds = {f"loggers has {name}": LOGGERS[name] for name in settings["loggers"]}
    if settings["wandb"] != "disabled":
        kinds[f"wandb is {settings['wandb']}"] = Wandb
    made = []
    for why, kind in kinds.items():
        try:
            made.append(kind(settings, folder, step))
        except ImportError as error:
            missing = (error.name or kind.__name__.lower()).partition(".")[0]
            advice = f"package {missing} is missing; pip install {missing}".replace("_", "-")
            raise ConfigError(f"{why}: {advice}") from None
        except Exception as error:  # each has its own
            reason = " ".join(str(error).split())
            raise ConfigError(f"{why}: {type(error).__name__}: {reason[:300]}") from None
    return made


def require_login(settings: Mapping[str, Any]) -> None:
    """Refuse to go online where nobody is logged in: wandb would ask, or give up late.

    Raises:
        ConfigError: if so.
    """
    if settings["wandb"] != "online":
        return
    try:
        import wandb
    except ImportError:
        raise ConfigError("wandb is online: package wandb is missing; pip install wandb") from None
    if not wandb.login(prompt=False):
        raise ConfigError(
            "wandb is online, and nobody is logged in on this host: run `wandb login` once, set "
            "WANDB_API_KEY, or give --wandb offline"
        )


def curves(record: Record) -> Iterator[tuple[str, float]]:
    """The numbers of ``record`` by name, those of a list as a curve for each rank."""
    for key, value in record.items():
        name = f"{record['kind']}/{key}"
        if isinstance(value, list):
            yield from ((f"{name}/rank {rank}", item) for rank, item in enumerate(value))
        elif isinstance(value, int | float) and key != "step":
            yield name, value
