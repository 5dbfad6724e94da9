"""Training, on one screen: forward, backward, local step; and what happens when a round ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from . import checkpoint
from .engine import Batch
from .evaluate import Evaluation, estimate_batch_norm, evaluate, has_batch_norm
from .run import Run


def train(run: Run) -> None:
    """Train to the end, evaluating the consensus at each epoch's last synchronisation."""
    config, optimizer, schedule = run.config, run.optimizer, run.schedule
    step = run.start_step
    if config.eval_on_start:
        evaluate_consensus(run, step)
    for epoch in range(step // run.steps_per_epoch, config.epochs):
        begin, end = epoch * run.steps_per_epoch, (epoch + 1) * run.steps_per_epoch
        batches = run.train_data.epoch(epoch, start_step=step - begin, steps=end - step)
        for micro_batches in grouped(batches, run.engine.accumulation):
            lr = schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            measures = run.engine.step(
                run.prepared(micro_batches, step), norms=run.recorder.due(step + 1)
            )
            step += 1
            run.recorder.step(step, lr, measures)
            run.update_ema(step)
            if config.eval_at == "sync" and optimizer.synced:
                next_sync = step + optimizer.period(step, schedule(step))
                if next_sync > end:
                    evaluate_consensus(run, step)
        if config.eval_at == "epoch":
            evaluate_consensus(run, step)
        if config.save_freq and (epoch + 1) % config.save_freq == 0 and end < schedule.total_steps:
            save(run, step)
    optimizer.finish()
    if step and (run.update_ema(step) or run.recorder.evaluated_at != step):
        evaluate_consensus(run, step)
    save(run, step)
    run.recorder.finished()


def grouped(batches: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    """Micro-batches in lists of ``count``, one list per step."""
    while group := list(itertools.islice(batches, count)):
        yield group


def evaluate_consensus(run: Run, step: int) -> None:
    """Evaluate what the replicas agree on, with BatchNorm statistics of its own. Collective."""
    started = time.perf_counter()
    with run.optimizer.consensus(), run.engine.uncompiled():
        evaluation, average = _evaluated(run, step), None
        if run.ema:
            with run.ema.in_place():
                average = _evaluated(run, step)
    run.recorder.evaluated(step, evaluation, average, time.perf_counter() - started)


def _evaluated(run: Run, step: int) -> Evaluation:
    model, autocast = run.engine.model, run.engine.autocast
    if run.config.bn and has_batch_norm(model):
        batches = run.train_data.estimation(step, run.config.bn_batches)
        estimate_batch_norm(model, batches, run.collective, autocast)
    return evaluate(model, run.val_data, run.collective, autocast)


def save(run: Run, step: int) -> None:
    """Write a checkpoint below the run's folder. All ranks call it."""
    checkpoint.save(
        run.folder / "checkpoints",
        step,
        run.config,
        run.state,
        run.collective,
        publishes=run.place.local_rank == 0,
    )
