"""main.py with one fault, in rank 1's third step: what FAULT in the environment says."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main
from training import engine, run, settings
from training.checkpoint import files

healthy_step = engine.Engine.step
steps = 0


def step(self: engine.Engine, micro_batches: Any, **options: Any) -> engine.Measures:
    global steps
    steps += 1
    fault = os.environ["FAULT"] if steps == 3 and torch.distributed.get_rank() == 1 else ""
    if fault == "bug":
        raise KeyError("a bug of ours")
    if fault == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
    if fault == "hang":
        time.sleep(1000)
    measures = healthy_step(self, micro_batches, **options)
    if fault == "nan parameters":
        with torch.no_grad():
            next(self.model.parameters()).view(-1)[0] = math.nan
    if fault == "nan loss":
        measures.loss.fill_(math.nan)
    if fault == "another H":
        self.optimizer._replica.round.remaining += 1
        self.optimizer._replica.round.h += 1
    return measures


def write_rank(folder: Path, rank: int, content: dict[str, Any]) -> dict[str, Any]:
    """Rank 0, which keeps the store, is killed in a save that the other one then goes on with."""
    mark = folder.parent.parent.parent / "killed"
    if os.environ["FAULT"] == "killed in a save" and "00000008" in folder.name:
        if rank == 0:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not mark.exists():
            time.sleep(0.01)
        time.sleep(0.2)
    return healthy_write(folder, rank, content)


if os.environ["FAULT"] == "killed in a save":  # before the watch has noticed
    run.Watch = functools.partial(run.Watch, beat=4.0)
healthy_write = files.write_rank
files.write_rank = write_rank
engine.Engine.step = step
sys.exit(main.main(settings.load(sys.argv[1:])))
