"""main.py, whose files may not grow during some steps, as if the disk were full; see DISK."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main
from training import engine, record, run_folder, settings

given: dict[str, Any] = json.loads(os.environ["DISK"])
healthy_step = engine.Engine.step
healthy_text = record.write_text
steps = 0


def limit(size: int) -> None:
    """No file of this process grows beyond this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def step(self: engine.Engine, micro_batches: Any, **options: Any) -> engine.Measures:
    global steps
    steps += 1
    if steps == given.get("full"):
        (file,) = Path(given["logs"]).glob("*/metrics.jsonl")
        limit(file.stat().st_size + 20)  # a line is begun
    if steps == given.get("space"):
        limit(resource.RLIM_INFINITY)
    return healthy_step(self, micro_batches, **options)


def write_text(path: Path, text: str) -> None:
    if path.name == given.get("file"):
        raise OSError(28, "No space left on device", str(path))
    healthy_text(path, text)


engine.Engine.step = step
record.write_text = run_folder.files.write_text = write_text
sys.exit(main.main(settings.load(sys.argv[1:])))
