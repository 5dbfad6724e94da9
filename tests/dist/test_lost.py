"""A rank that dies, hangs, fails or differs ends the run on all; a signal stops it in order."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from training import checkpoint

from .program import ROOT, Running

FAULTY = ROOT / "tests/dist/faulty.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    command = [str(ROOT / ".venv/bin/python"), "-m", "data.write", "digits", "--out"]
    subprocess.run([*command, str(folder / "digits")], check=True, cwd=ROOT, capture_output=True)
    return str(folder)


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return (
        "--data-pth", data, "--log-pth", str(tmp_path / "runs"), "--epochs", "1000",
        "--steps-per-epoch", "20", "--device", "cpu", "--period", "constant", "--h-base", "4",
        "--save-steps", "10", "--log-freq", "5", "--dead-after", "3", "--stall-after", "6",
    )  # fmt: skip


def at_work(running: Running, tmp_path: Path) -> None:
    """Wait for the first checkpoint."""
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("runs/*/checkpoints/step-*")):
        assert running.alive() and time.monotonic() < deadline, running.ended(1).errors
        time.sleep(0.02)


def lines(errors: str, part: str) -> list[str]:
    return [line for line in errors.splitlines() if part in line]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("number", "told"), [("SIGKILL", "has died"), ("SIGSTOP", "is stopped")])
def test_a_rank_that_dies_or_is_stopped_ends_the_run(
    flags, tmp_path: Path, rank: int, number: str, told: str
) -> None:
    running = Running(*flags)
    at_work(running, tmp_path)
    time.sleep(random.Random(f"{rank}{number}").uniform(0, 0.3))
    running.signal(getattr(signal, number), [rank])
    other = running.processes[1 - rank]
    other.join(30)  # within dead_after, a beat, and what a busy machine takes
    code = other.exitcode
    running.signal(signal.SIGKILL, [rank])
    outcome = running.ended(30)
    assert code == 3, outcome.errors
    (line,) = lines(outcome.errors[1 - rank], f"rank {rank} on ")
    assert told in line and "last at step" in line and line.endswith("--resume auto")
    assert "Traceback" not in outcome.errors[1 - rank]


@pytest.mark.parametrize(
    ("fault", "codes", "told"),
    [
        ("bug", [3, 1], "KeyError: 'a bug of ours'"),
        ("hang", [3, 3], "rank 1 on * hangs (training at step 3, without progress"),
        ("nan loss", [3, 2], "DivergedError: the training loss is nan at step 5"),
        ("nan parameters", [2, 2], "rank 1 brought NaN or infinity into the synchronisation at"),
        ("another H", [2, 2], "rank 1"),
    ],
)
def test_a_rank_that_fails_is_named(
    flags, fault: str, codes: list[int], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", fault)
    flags = [*flags, "--save-steps", "0"]
    outcome = Running(*flags, script=FAULTY).ended(60, afterwards=20)
    assert outcome.codes == codes, outcome.errors
    said = "\n".join(outcome.errors)
    assert all(part in said for part in told.split("*"))
    assert ("Traceback" in said) == (fault == "bug"), "bugs show where they are, and nothing else"


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_signal_to_any_rank_saves_and_stops_all(
    flags, tmp_path: Path, ranks: tuple[int, ...], number: str
) -> None:
    running = Running(*flags)
    at_work(running, tmp_path)
    running.signal(getattr(signal, number), ranks)
    outcome = running.ended(60)
    assert outcome.codes == [128 + getattr(signal, number)] * 2, outcome.errors
    assert f"{number} on " in outcome.outputs[0].splitlines()[-1]
    (folder,) = (tmp_path / "runs").iterdir()
    told = json.loads((folder / "preempted").read_text())
    saved = checkpoint.found(folder / "checkpoints")
    assert told["step"] == max(saved) and told["reason"].startswith(number)

    again = Running(*flags, "--resume", "auto")
    while (folder / "preempted").exists():
        assert again.alive(), again.ended(1).errors
        time.sleep(0.02)
    again.signal(signal.SIGTERM, (0,))
    again.ended(60)
    assert max(checkpoint.found(folder / "checkpoints")) >= told["step"]
