"""Start main.py as a launcher would: one process per replica, with its place in the environment."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .patience import PATIENCE
from .ports import free_port
from .ranks import context

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


class Running:
    """``script`` with ``flags`` on ``world_size`` ranks, of which the last may be ``absent``.

    ``per_rank`` are a rank's own flags, ``places`` what a launcher says otherwise to each.
    """

    def __init__(
        self,
        *flags: str,
        world_size: int = 2,
        per_rank: Sequence[Sequence[str]] = (),
        script: Path = ROOT / "main.py",
        absent: int = 0,
        places: Sequence[Mapping[str, str]] = (),
    ) -> None:
        port = free_port()
        self._told = tempfile.TemporaryDirectory()
        self.processes = []
        for rank in range(world_size - absent):
            place = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size,
                "LOCAL_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            own = per_rank[rank] if per_rank else ()
            if world_size == 1:
                place = {}  # as without a launcher
            environment = os.environ | {key: str(value) for key, value in place.items()}
            environment |= places[rank] if places else {}
            arguments = script, [*flags, *own], environment, f"{self._told.name}/{rank}"
            process = context.Process(target=_rank, args=arguments)
            process.start()
            self.processes.append(process)

    def alive(self) -> bool:
        """Whether all ranks are at work."""
        return all(process.exitcode is None for process in self.processes)

    def signal(self, number: int, ranks: Sequence[int]) -> None:
        """Send a signal to some ranks."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def ended(self, timeout: float = PATIENCE) -> Outcome:
        """Wait for the end; a rank that takes longer is killed."""
        for process in self.processes:
            process.join(timeout)
            if process.exitcode is None:
                process.kill()
                process.join()
        codes = [process.exitcode for process in self.processes]
        files = [
            [Path(self._told.name, f"{rank}.{name}") for rank in range(len(codes))]
            for name in ("stdout", "stderr")
        ]
        # One that was killed early has not made its files.
        outputs, errors = ([f.read_text() if f.exists() else "" for f in some] for some in files)
        self._told.cleanup()
        return Outcome(codes, outputs, errors)


def start(*flags: str, timeout: float = PATIENCE, **options: Any) -> Outcome:
    """Run main.py to its end; ``options`` are those of `Running`."""
    return Running(*flags, **options).ended(timeout)


def _rank(script: Path, flags: list[str], environment: dict[str, str], told: str) -> None:
    """In a process of its own: what ``python script flags`` does, without the wait for imports."""
    for name, descriptor, buffering in (("stdout", 1, -1), ("stderr", 2, 1)):
        with open(f"{told}.{name}", "w") as file:
            os.dup2(file.fileno(), descriptor)
        setattr(sys, name, os.fdopen(descriptor, "w", buffering))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [str(script), *flags]
    ahead = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [str(script.parent), *ahead]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.stdout.flush()
