"""main.py with one fault: the replica of rank 1 gets a NaN after its third step."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main
from training import config, engine

healthy_step = engine.Engine.step
steps = 0


def step(self: engine.Engine, micro_batches: Any, **options: Any) -> engine.Measures:
    global steps
    measures = healthy_step(self, micro_batches, **options)
    steps += 1
    if steps == 3 and torch.distributed.get_rank() == 1:
        with torch.no_grad():
            next(self.model.parameters()).view(-1)[0] = math.nan
    return measures


engine.Engine.step = step
main.main(config.load(sys.argv[1:]))
