"""Where records go besides metrics.jsonl: a logger has all that is recorded, or says why not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support.program import start
from tests.support.refusals import check, told
from training.config import DEFAULTS
from training.loggers import chosen, curves
from training.settings import load
from training.values import ConfigError

from .runs import SHORT

TRAIN = {"kind": "train", "step": 3, "loss": 0.5, "h": 4, "drift": None}
SYNC = {"kind": "sync", "step": 4, "losses": [0.25, 0.75]}


def made(name: str, folder: Path, step: int = 0, **others: Any) -> Any:
    (logger,) = chosen({**DEFAULTS, "loggers": (name,), **others}, folder, step)
    return logger


def test_a_list_is_a_curve_for_each_rank_and_what_is_no_number_none() -> None:
    assert dict(curves(TRAIN)) == {"train/loss": 0.5, "train/h": 4}
    assert dict(curves(SYNC)) == {"sync/losses/rank 0": 0.25, "sync/losses/rank 1": 0.75}


def test_they_are_chosen_by_name_by_flags_and_by_flags_of_their_own() -> None:
    assert load([]).loggers == ()
    assert load(["--loggers", "tensorboard"]).loggers == ("tensorboard",)
    assert load(["--mlflow", "--tensorboard"]).loggers == ("mlflow", "tensorboard")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--loggers", "tensorbord"], ["loggers is", "'tensorbord'", "did you mean 'tensorboard'"]),
        (["--loggers", "wandb"], ["loggers is", "'wandb'", "tensorboard, mlflow"]),
        (["--tensorboard", "yes"], ["unknown flag yes"]),
        (["--mlflow=http://host"], ["--mlflow", "'http://host'"]),
    ],
)
def test_a_name_that_no_logger_has_is_refused(flags: list[str], parts: list[str]) -> None:
    check(parts, told(load, flags))


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_what_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    line = told(made, name, tmp_path)
    check([f"loggers has {name}", f"package {name} is missing; pip install {name}"], line)


def test_wandb_osh_that_is_not_installed_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_osh", None)
    with pytest.raises(ConfigError) as caught:
        chosen({**DEFAULTS, "wandb": "offline-sync"}, tmp_path, 0)
    check(["wandb is offline-sync", "pip install wandb-osh"], str(caught.value))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_has_all_curves_and_those_of_a_resumed_run_once(tmp_path: Path) -> None:
    first = made("tensorboard", tmp_path)
    for step in (1, 2, 3):
        first.write({**TRAIN, "step": step, "loss": step / 2})
    first.close(failed=False)
    again = made("tensorboard", tmp_path, step=2)
    for step in (3, 4):
        again.write({**TRAIN, "step": step, "loss": step / 4})
    again.write(SYNC)
    again.close(failed=False)
    shown = scalars(tmp_path)
    assert shown["train/loss"] == [(1, 0.5), (2, 1.0), (3, 0.75), (4, 1.0)]
    assert shown["sync/losses/rank 1"] == [(4, 0.75)]


@pytest.mark.slow
def test_tensorboard_from_a_run_has_what_metrics_jsonl_has(data: str, tmp_path: Path) -> None:
    flags = ("--data-pth", data, "--log-pth", str(tmp_path), *SHORT, "--epochs", "1")
    outcome = start(*flags, "--tensorboard", "--track-replicas")
    assert outcome.codes == [0, 0], outcome.errors
    recorded = [record for record in outcome.records if record["kind"] == "train"]
    shown = scalars(outcome.folder)
    assert [step for step, _ in shown["train/loss"]] == [record["step"] for record in recorded]
    losses = [value for _, value in shown["train/loss"]]
    assert losses == pytest.approx([record["loss"] for record in recorded])
    assert "val/top1" in shown and "sync/losses/rank 1" in shown


def stub(calls: list[tuple[Any, ...]]) -> ModuleType:
    """As much of mlflow as is used, which records what it is asked for."""
    module: Any = ModuleType("mlflow")

    def start_run(**options: Any) -> Any:
        calls.append(("start", options))
        return SimpleNamespace(info=SimpleNamespace(run_id="f00"))

    module.start_run = start_run
    module.log_params = lambda params: calls.append(("params", params["model"]))
    module.log_metrics = lambda metrics, step: calls.append(("metrics", metrics, step))
    module.end_run = lambda status: calls.append(("end", status))
    return module


def test_mlflow_has_settings_curves_and_how_the_run_ended(tmp_path: Path, monkeypatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "mlflow", stub(calls))
    logger = made("mlflow", tmp_path, model="resnet18")
    logger.write(TRAIN)
    logger.preempted()
    logger.close(failed=False)
    assert calls == [
        ("start", {"run_name": tmp_path.name}), ("params", "resnet18"),
        ("metrics", {"train/loss": 0.5, "train/h": 4}, 3), ("end", "KILLED"),
    ]  # fmt: skip


@pytest.mark.parametrize(("failed", "status"), [(False, "FINISHED"), (True, "FAILED")])
def test_mlflow_goes_on_with_the_run_that_is_continued(
    tmp_path: Path, monkeypatch, failed: bool, status: str
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "mlflow", stub(calls))
    made("mlflow", tmp_path).close(failed=False)
    calls.clear()
    made("mlflow", tmp_path).close(failed=failed)
    assert calls == [("start", {"run_id": "f00"}), ("end", status)]
