"""What is recorded of a run while it trains, a progress bar, and a closing table."""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from data.loaders import Pace

from . import progress
from .checkpoint.files import lock, write_text
from .checkpoint.resume import Start
from .checkpoint.saver import SaveError
from .config import Config
from .distributed import Process
from .engine import Measures, ReplicaOptimizer
from .evaluate import Evaluation
from .loggers import chosen
from .record_file import Guarded, RecordFile, complain
from .values import ConfigError

PREEMPTED = "preempted"  # the marker of a run that was asked to stop


class DivergedError(RuntimeError):
    """The training or validation loss is NaN or infinite."""


class Recorder:
    """Collects what the loop measures, and on rank 0 writes it out.

    Training losses and accuracies are means since the last record, the norms of gradient and
    parameters those of the step recorded; all are of rank 0's replica and its share of the images.
    They stay on the device, and are read every ``log_freq`` steps.
    The optimizer has counted synchronisations since step ``counted_from``.
    """

    def __init__(
        self, config: Config, folder: Path, process: Process, optimizer: ReplicaOptimizer,
        total_steps: int, steps_per_epoch: int, start: Start, counted_from: int,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.process, self.optimizer = config, folder, process, optimizer
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.start_step, self.counted_from = start.step, counted_from
        self.evaluation: dict[str, float] = {}
        self.evaluated_at: int | None = None
        self._exposed_before = optimizer.traffic.exposed
        self._hidden_before = optimizer.traffic.hidden
        self._reported = optimizer.report
        self._pending: list[Measures] = []
        self._started = time.perf_counter()
        self._paused = 0.0
        self._first_step: float | None = None  # when this process made it, pauses left out
        self._epochs = 0
        kept = self._take_up(start) if start.recorder else None
        self._loggers: list[Guarded] = []
        self._lock: BinaryIO | None = None
        self._file: RecordFile | None = None
        if process.rank == 0:
            self._lock = start.lock or _held(folder)
            (folder / PREEMPTED).unlink(missing_ok=True)
            self._file = RecordFile(folder / "metrics.jsonl", kept, start.step)
            loggers = chosen(config.as_dict(), folder, start.step)
            self._loggers = [Guarded(logger) for logger in loggers]
        self._progress = progress.Pace(total_steps)
        quiet = None if process.rank == 0 else True  # None: only on a terminal
        self._bar = tqdm(
            total=total_steps, initial=start.step, unit="step", disable=quiet, dynamic_ncols=True
        )

    def state_dict(self) -> dict[str, Any]:
        """What has been recorded so far, for a run that is continued."""
        return {
            "pending": [vars(measures) for measures in self._pending],
            "evaluation": self.evaluation, "evaluated_at": self.evaluated_at,
            "start_step": self.start_step, "counted_from": self.counted_from,
            "exposed_before": self._exposed_before, "hidden_before": self._hidden_before,
            "seconds": time.perf_counter() - self._started, "paused": self._paused,
            "file": None if self._file is None else self._file.size,
        }  # fmt: skip

    def sync(self) -> None:
        """Have what `state_dict` has counted written to the disk."""
        if self._file is not None:
            self._file.sync()

    def _take_up(self, start: Start) -> int | None:
        """Go on from what `state_dict` gave; return how much of the metrics file stands."""
        saved = start.recorder
        device = self.process.device
        self._pending = [
            Measures(**{k: v if v is None else v.to(device) for k, v in measures.items()})
            for measures in saved["pending"]
        ]
        self.evaluation = saved["evaluation"]
        if start.folder is None:  # another run, which counts its own seconds
            return None
        self.evaluated_at = saved["evaluated_at"]
        self.start_step, self.counted_from = saved["start_step"], saved["counted_from"]
        self._exposed_before = saved["exposed_before"]
        self._hidden_before = saved["hidden_before"]
        self._started -= saved["seconds"]
        self._paused = saved["paused"]
        return saved["file"]

    def due(self, step: int) -> bool:
        """Whether a training record is written once ``step`` steps are finished."""
        return step % self.config.log_freq == 0 or step == self.total_steps

    def step(self, step: int, lr: float, measures: Measures) -> None:
        """A step is finished."""
        self._progress.step(step)
        if self._first_step is None:
            progress.say("the first step is made")
            self._first_step = time.perf_counter() - self._paused
        self._pending.append(measures)
        self._bar.update()
        self._synchronised(step)
        if self.due(step):
            self._flush(step, lr)

    def _synchronised(self, step: int) -> None:
        """Where asked for, what the replicas reported to each other at the last synchronisation.

        What was exchanged behind training is known a round late: ``begun_at`` is its own step.
        """
        report = self.optimizer.report if self.config.track_replicas else None
        if report is None or report is self._reported:
            return
        self._reported = report
        found = vars(report) | {"step": step, "begun_at": report.step}
        self._write({"kind": "sync", "epoch": report.step / self.steps_per_epoch, **found})

    def _flush(self, step: int, lr: float) -> None:
        loss = float(torch.stack([m.loss for m in self._pending]).mean())  # host sync
        images = len(self._pending) * self.config.total_batch_size // self.process.world_size
        record = {
            "kind": "train",
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": loss,
            "accuracy": float(torch.stack([m.correct for m in self._pending]).sum()) / images,
            "lr": lr,
            **self._position(),
            **self._cost(),
        }
        for name in ("grad_norm", "param_norm"):
            if (norm := getattr(self._pending[-1], name)) is not None:
                record[name] = float(norm)
        self._pending.clear()
        self._write(record)
        now = (
            f"loss {loss:.3f}, lr {lr:.2e}, H {self.optimizer.h}, "
            f"syncs {self.optimizer.traffic.syncs}"
        )
        self._bar.set_postfix_str(now)
        if self.process.rank == 0 and self._bar.disable and self._progress.due():
            passed = self._progress.times(step)
            print(f"step {step:,} of {self.total_steps:,}, {now}; {passed}", flush=True)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the training loss is {loss} at step {step}: lower max_lr, or clip with clip_norm"
            )

    def epoch_ended(self, pace: Pace) -> None:
        """An epoch is over: say after the first one if training waits for images."""
        self._epochs += 1
        if self._epochs > 1 or self._first_step is None or self.process.rank != 0:
            return
        seconds = time.perf_counter() - self._paused - self._first_step
        if line := waiting_for_images(pace, seconds, self.config.nw):
            tqdm.write(line, file=sys.stdout)

    def evaluated(
        self, step: int, evaluation: Evaluation, average: Evaluation | None, seconds: float
    ) -> None:
        """The consensus was evaluated, and its moving average, where the run has one.

        The ``seconds`` of both do not count as training.
        """
        self._paused += seconds
        self.evaluation, self.evaluated_at = vars(evaluation).copy(), step
        for name in ("top1", "top5", "loss") if average else ():
            self.evaluation[f"ema_{name}"] = getattr(average, name)
        epoch = step / self.steps_per_epoch
        self._write(
            {"kind": "val", "step": step, "epoch": epoch, "eval_seconds": seconds}
            | self.evaluation
            | self._position()
            | self._cost()
        )
        if self.process.rank == 0:
            tqdm.write(
                f"epoch {epoch:6.2f}  step {step:6d}  H {self.optimizer.h:5d}  "
                f"syncs {self.optimizer.traffic.syncs:6d}  val loss {evaluation.loss:.4f}  "
                f"top-1 {evaluation.top1:.2%}  {self._progress.times(step)}",
                file=sys.stdout,
            )
        if not math.isfinite(evaluation.loss):
            raise DivergedError(
                f"the validation loss is {evaluation.loss} at step {step}: lower max_lr, or clip "
                "with clip_norm"
            )

    def finished(self) -> None:
        """The run is over: summary.json and the table."""
        self._synchronised(self.total_steps)
        seconds = time.perf_counter() - self._started - self._paused
        steps = self.total_steps - self.start_step
        traffic = self.optimizer.traffic
        self._bar.close()
        if self.process.rank == 0:
            images = steps * self.config.total_batch_size
            summary = {
                "kind": "summary",
                "step": self.total_steps,
                "replicas": self.process.world_size,
                **self.evaluation,
                **self._cost(),
                "share": traffic.syncs / max(1, self.total_steps - self.counted_from),
                "other_bytes": traffic.other_bytes,
                "wait": traffic.wait,
                "train_seconds": seconds,
                "images_per_second": images / seconds,
            }
            self._write(summary)
            print(_table(summary, self.folder, self.config), flush=True)
            file = self.folder / "summary.json"
            try:
                write_text(file, json.dumps(summary, indent=2) + "\n")
            except OSError as error:
                raise SaveError(
                    f"cannot write {file}: {error.strerror}: the run is over, and looks unfinished"
                ) from None
        self.close()

    def preempted(self, step: int, reason: str) -> None:
        """The run stops before its end: a marker in its folder, until it is continued."""
        self._bar.close()
        if self.process.rank == 0:
            now = datetime.now().isoformat("T", "seconds")
            marker = {"step": step, "reason": reason, "time": now}
            try:
                write_text(self.folder / PREEMPTED, json.dumps(marker) + "\n")
            except OSError as error:  # the checkpoint is there: that is what counts
                complain(f"{self.folder / PREEMPTED}: {error.strerror}")
            for logger in self._loggers:
                logger.preempted()

    def close(self, *, failed: bool = False) -> None:
        """No record follows."""
        self._bar.close()
        for logger in self._loggers:
            logger.close(failed=failed)
        self._loggers = []
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.close()

    def _position(self) -> dict[str, Any]:
        position: dict[str, Any] = {"h": self.optimizer.h, "round": self.optimizer.round}
        if self.optimizer.drift is not None:
            position["drift"] = self.optimizer.drift
        return position

    def _cost(self) -> dict[str, Any]:
        traffic = self.optimizer.traffic
        return {
            "syncs": traffic.syncs, "bytes": traffic.bytes,
            "exposed_seconds": traffic.exposed - self._exposed_before,
            "hidden_seconds": traffic.hidden - self._hidden_before,
            "seconds": time.perf_counter() - self._started,
        }  # fmt: skip

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(record)
        for logger in self._loggers:
            logger.write(record)


def _held(folder: Path) -> BinaryIO:
    """The hold on a run's folder, for as long as it is open."""
    try:
        held = lock(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None
    if held is None:
        raise ConfigError(f"{folder}: another run is writing there")
    return held


def waiting_for_images(pace: Pace, seconds: float, workers: int) -> str | None:
    """What to say of an epoch of so many ``seconds`` if more than a tenth went to waiting."""
    if not pace.seconds or seconds < 1 or pace.waited < 0.1 * seconds:
        return None
    made = pace.images / pace.seconds
    could = pace.images / max(seconds - pace.waited, 1e-9)
    return (
        f"training waits for images {pace.waited / seconds:.0%} of the time: a replica's loader "
        f"gives {made:,.0f} images/s, its steps could take {could:,.0f}. Raise nw (now {workers}) "
        "where the host has more cores, or store smaller images"
    )


def _table(summary: dict[str, Any], folder: Path, config: Config) -> str:
    accuracy, average = "not evaluated", summary.get("ema_top1")
    if "top1" in summary:
        accuracy = f"{summary['top1']:.2%} of {summary['images']} images"
    replicas = "1 replica" if summary["replicas"] == 1 else f"{summary['replicas']} replicas"
    rows = {
        "run": f"{config.model} on {config.data}, {config.optimizer}, {replicas}",
        "validation accuracy (consensus)": accuracy,
        **({"of its moving average": f"{average:.2%}"} if average is not None else {}),
        "steps": f"{summary['step']:,}",
        "synchronisations": f"{summary['syncs']:,} ({summary['share']:.1%} of the steps)",
        "sent per replica": f"{summary['bytes'] / 1e6:,.1f} MB",
        "exposed": f"{summary['exposed_seconds']:.1f} s of {summary['train_seconds']:.1f} s",
        **({"hidden": f"{hidden:.1f} s"} if (hidden := summary["hidden_seconds"]) >= 0.05 else {}),
        "speed": f"{summary['images_per_second']:,.0f} images/s",
        "run folder": str(folder),
    }
    width = max(map(len, rows))
    line = "-" * (width + 2 + max(map(len, rows.values())))
    return "\n".join([line, *(f"{key:<{width}}  {value}" for key, value in rows.items()), line])
