"""main.py with one fault, in rank 1's third step: what FAULT in the environment says."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main
from training import engine, settings

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


engine.Engine.step = step
sys.exit(main.main(settings.load(sys.argv[1:])))
