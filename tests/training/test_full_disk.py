"""A full disk costs what cannot be written, and not the run; a line names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.patience import PATIENCE
from tests.support.program import ROOT, Outcome, start
from training.loggers import Logger
from training.record_file import Guarded

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests/training/short_of_disk.py"


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return (
        "--data-pth", data, "--log-pth", str(tmp_path / "runs"), "--epochs", "1",
        "--steps-per-epoch", "8", "--warmup-epochs", "0", "--device", "cpu", "--log-freq", "1",
        "--period", "constant", "--h-base", "4",
    )  # fmt: skip


@pytest.fixture
def short(flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def short(**disk: Any) -> Outcome:
        monkeypatch.setenv("DISK", json.dumps({"logs": str(tmp_path / "runs"), **disk}))
        return start(*flags, script=SCRIPT, world_size=1)

    return short


def test_records_that_found_no_space_are_named_once(short: Any) -> None:
    outcome = short(full=3, space=6)
    assert outcome.codes == [0], outcome.errors
    begun, over = outcome.complaints(0)
    assert "metrics.jsonl: File too large: the record of step 3 is lost" in begun
    assert "metrics.jsonl can be written again: 3 records are lost, of steps 3 to 5" in over
    steps = [record["step"] for record in outcome.records if record["kind"] == "train"]
    assert steps == [1, 2, 6, 7, 8], "no line is broken"
    assert "Traceback" not in outcome.errors[0]


@pytest.mark.parametrize("file", ["summary.json", "config.yml", "environment.json"])
def test_a_file_that_finds_no_space_is_named(short: Any, file: str) -> None:
    outcome = short(file=file)
    assert outcome.codes == [2]
    (line,) = outcome.complaints(0)
    assert "No space left on device" in line and "Traceback" not in outcome.errors[0]
    if file == "summary.json":
        assert file in line and "run folder" in outcome.outputs[0], "the table is printed"


def test_what_is_printed_to_a_full_disk_is_lost_and_nothing_else(flags, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, str(ROOT / "main.py"), *flags],
            stdout=full, stderr=full, timeout=PATIENCE, check=False,
            env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        )  # fmt: skip
    assert ended.returncode == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "summary.json").exists()


class Broken(Logger):
    """Takes nothing."""

    def write(self, record: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    def preempted(self) -> None:
        raise RuntimeError("nobody there")

    def close(self, *, failed: bool) -> None:
        raise RuntimeError("nobody there")


def test_a_logger_that_fails_is_named_and_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Guarded(Broken())
    for step in (5, 6, 7):
        logger.write({"kind": "train", "step": step})
    logger.preempted()
    logger.close(failed=False)
    first, stop, count, end = capsys.readouterr().err.splitlines()
    assert "Broken: OSError" in first and "No space left" in first and "step 5" in first
    assert "3 records are lost" in count
    assert stop == end == "main.py: Broken: RuntimeError: nobody there"
