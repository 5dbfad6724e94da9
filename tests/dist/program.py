"""Start main.py as a launcher would: one process per replica, with its place in the environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """How the ranks of one run ended."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]

    @property
    def folder(self) -> Path:
        """The run's folder, from the closing table."""
        (line,) = [row for row in self.outputs[0].splitlines() if row.startswith("run folder")]
        return Path(line.removeprefix("run folder").strip())

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]

    def complaints(self, rank: int) -> list[str]:
        """What main.py itself says on standard error."""
        return [line for line in self.errors[rank].splitlines() if line.startswith("main.py:")]


def start(
    *flags: str,
    world_size: int = 2,
    per_rank: Sequence[Sequence[str]] = (),
    script: Path = ROOT / "main.py",
    timeout: float = 120,
) -> Outcome:
    """Run ``script`` with ``flags`` on ``world_size`` ranks; ``per_rank``: a rank's own flags.

    When a rank fails the others have ten seconds to fail too, then they are killed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size,
                 "LOCAL_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        own = per_rank[rank] if per_rank else ()
        if world_size == 1:
            place = {}  # as without a launcher
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *flags, *own],
                env=os.environ | {key: str(value) for key, value in place.items()},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            )
        )  # fmt: skip
    codes, outputs, errors = [], [], []
    for process in processes:
        try:
            output, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, error = process.communicate()
        codes.append(process.returncode)
        outputs.append(output)
        errors.append(error)
        if process.returncode:
            timeout = 10
    return Outcome(codes, outputs, errors)
