"""Training, on one screen: forward, backward, local step; and what happens when a round ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from .engine import Batch
from .evaluate import Evaluation, estimate_batch_norm, evaluate, has_batch_norm
from .run import Run


def train(run: Run) -> None:
    """Train to the end, evaluating the consensus at each epoch's last synchronisation.

    Where the replicas are asked to stop they agree on a step, save after it, and return.
    """
    config, optimizer, schedule = run.config, run.optimizer, run.schedule
    step = run.start.step
    if config.eval_on_start and run.start.folder is None:
        evaluate_consensus(run, step)
    for epoch in range(step // run.steps_per_epoch, config.epochs):
        begin, end = epoch * run.steps_per_epoch, (epoch + 1) * run.steps_per_epoch
        batches = run.train_data.epoch(epoch, start_step=step - begin, steps=end - step)
        for micro_batches in grouped(batches, run.engine.accumulation):
            if not run.watch.begin(step):
                return preempt(run, step)
            lr = schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            measures = run.engine.step(
                run.prepared(micro_batches, step), norms=run.recorder.due(step + 1)
            )
            step += 1
            run.recorder.step(step, lr, measures)
            run.update_ema(step)
            if evaluation_due(run, step, end):
                evaluate_consensus(run, step)
            if saving_due(run, step, end):
                save(run, step)
        run.recorder.epoch_ended(run.train_data.pace)
    optimizer.finish()
    if step and (run.update_ema(step) or run.recorder.evaluated_at != step):
        evaluate_consensus(run, step)
    save_last(run, step)
    run.recorder.finished()


def evaluation_due(run: Run, step: int, end: int) -> bool:
    """Whether the consensus is evaluated after ``step``, of an epoch that ends at step ``end``."""
    if run.config.eval_at == "epoch":
        return step == end
    if not run.optimizer.synced:
        return False
    return step + run.optimizer.period(step, run.schedule(step)) > end


def saving_due(run: Run, step: int, end: int) -> bool:
    """Whether a checkpoint is written after ``step``; the last one is written anyway."""
    config = run.config
    if step == run.schedule.total_steps:
        return False
    epochs = end // run.steps_per_epoch
    return bool(config.save_steps and step % config.save_steps == 0) or bool(
        config.save_freq and step == end and epochs % config.save_freq == 0
    )


def grouped(batches: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    """Micro-batches in lists of ``count``, one list per step."""
    while group := list(itertools.islice(batches, count)):
        yield group


def evaluate_consensus(run: Run, step: int) -> None:
    """Evaluate what the replicas agree on, with BatchNorm statistics of its own. Collective."""
    started = time.perf_counter()
    with run.watch.phase("evaluating"), run.optimizer.consensus(), run.engine.uncompiled():
        evaluation, average = _evaluated(run, step, "model"), None
        if run.ema:
            with run.ema.in_place():
                average = _evaluated(run, step, "ema")
    run.recorder.evaluated(step, evaluation, average, time.perf_counter() - started)


def _evaluated(run: Run, step: int, what: str) -> Evaluation:
    model, autocast = run.engine.model, run.engine.autocast
    if run.config.bn and has_batch_norm(model):
        batches = run.train_data.estimation(step, run.config.bn_batches)
        estimate_batch_norm(model, batches, run.collective, autocast)
    run.state.statistics.keep(step, what, model)
    return evaluate(model, run.val_data, run.collective, autocast)


def save(run: Run, step: int) -> None:
    """Have a checkpoint written below the run's folder. All ranks call it."""
    run.saver.save(step, run.state, run.recorder, run.recorder.evaluation)


def save_last(run: Run, step: int) -> None:
    """Have the last checkpoint written, if it isn't there yet, and wait for it. Collective."""
    if run.saver.saved_at != step:
        save(run, step)
    with run.watch.phase("saving"):
        run.saver.finish()


def preempt(run: Run, step: int) -> None:
    """End a run that was asked to stop: save, and leave a marker. All ranks call it."""
    save_last(run, step)
    run.recorder.preempted(step, run.watch.reason)
    run.preempted = True
