"""A rank that dies, hangs, fails or differs ends the run on all; a signal stops it in order."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.patience import PATIENCE
from tests.support.ports import free_port
from tests.support.program import ROOT, Running
from training.checkpoint import files as checkpoint

pytestmark = pytest.mark.slow

FAULTY = ROOT / "tests/training/faulty.py"


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return (
        "--data-pth", data, "--log-pth", str(tmp_path / "runs"), "--epochs", "1000",
        "--steps-per-epoch", "20", "--device", "cpu", "--period", "constant", "--h-base", "4",
        "--save-steps", "10", "--log-freq", "5", "--dead-after", "5",
    )  # fmt: skip


def at_work(running: Running, tmp_path: Path) -> None:
    """Wait for the first checkpoint."""
    deadline = time.monotonic() + PATIENCE
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
    assert_named(Running(*flags), tmp_path, rank, getattr(signal, number), told)


def assert_named(running: Running, tmp_path: Path, rank: int, number: int, told: str) -> None:
    """Send a signal to one of two ranks: the other says so, and ends."""
    at_work(running, tmp_path)
    time.sleep(random.Random(f"{rank}{number}").uniform(0, 0.3))
    running.signal(number, [rank])
    other = running.processes[1 - rank]
    other.join(PATIENCE)
    code = other.exitcode
    running.signal(signal.SIGKILL, [rank])
    outcome = running.ended()
    assert code == 3, outcome.errors
    (line,) = lines(outcome.errors[1 - rank], f"rank {rank} on ")
    assert told in line and "last at step" in line and line.endswith("--resume auto")
    assert "Traceback" not in outcome.errors[1 - rank]


@pytest.mark.parametrize(
    ("fault", "codes", "told"),
    [
        ("bug", [3, 1], "KeyError: 'a bug of ours'"),
        ("hang", [3, 3], "rank 1 on * hangs (training at step 3, without progress"),
        ("out of memory", [3, 2], "images at a time: give --physical-batch-size * or less"),
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
    if fault == "hang":
        flags += ["--stall-after", "10"]  # longer than a first step on a busy machine
    outcome = Running(*flags, script=FAULTY).ended()
    assert outcome.codes == codes, outcome.errors
    said = "\n".join(outcome.errors)
    assert all(part in said for part in told.split("*"))
    assert ("Traceback" in said) == (fault == "bug"), "bugs show where they are, and nothing else"


def test_a_rank_whose_save_fails_with_the_store_is_not_to_blame(
    flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save raises what the thread met, in the middle of a round: no collective fails."""
    monkeypatch.setenv("FAULT", "killed in a save")
    outcome = Running(*flags, "--h-base", "1000", "--save-steps", "1", script=FAULTY).ended()
    assert outcome.codes == [-signal.SIGKILL, 3], outcome.errors
    (line,) = lines(outcome.errors[1], "main.py:") or lines(outcome.errors[1], "rank 0 on ")
    assert "rank 0 on " in line and "has died" in line
    assert "Traceback" not in outcome.errors[1]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_a_signal_to_any_rank_saves_and_stops_all(
    flags, tmp_path: Path, ranks: tuple[int, ...], number: str
) -> None:
    running = Running(*flags)
    at_work(running, tmp_path)
    running.signal(getattr(signal, number), ranks)
    outcome = running.ended()
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
    again.ended()
    assert max(checkpoint.found(folder / "checkpoints")) >= told["step"]


def ranks_of(flags: tuple[str, ...]) -> dict[str, psutil.Process]:
    """The processes that train with these flags, by rank."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if command[1:4].count("main.py") and flags[3] in command:
                found[process.environ()["RANK"]] = process
    return found


def launched(command: list[str], flags: tuple[str, ...], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as file:
        return subprocess.Popen(
            [*command, *flags], cwd=ROOT, text=True, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"RESTARTS": "2", "REPORT": "1"},
        )  # fmt: skip


def until(condition: Callable[[], object], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.long
def test_no_rank_outlives_deepspeeds_launcher(flags, tmp_path: Path) -> None:
    """Which on one host passes signals on to none of them, and could not pass this one on."""
    port = str(free_port())
    command = [
        str(ROOT / ".venv/bin/deepspeed"), "--hostfile", "hostfile", "--no_ssh_check",
        "--master_addr", "127.0.0.1", "--master_port", port, "main.py",
    ]  # fmt: skip
    launcher = launched(command, flags, log := tmp_path / "log")
    until(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*")), launcher, log)
    ranks = ranks_of(flags)
    assert set(ranks) == {"0", "1"}
    launcher.kill()
    launcher.wait(PATIENCE)
    assert not psutil.wait_procs(ranks.values(), timeout=PATIENCE)[1], "a rank is left"
    (marker,) = tmp_path.glob("runs/*/preempted")
    assert "the launcher of rank" in marker.read_text()


@pytest.mark.long
def test_an_interrupt_of_run_sh_is_called_one(flags, tmp_path: Path) -> None:
    """Ctrl-C reaches the script, which ends the launcher, which sends the ranks SIGTERM."""
    recipe = "recipe/digits-resnet-localsgd-qsr.yml"
    command = [str(ROOT / "run-scripts/run.sh"), recipe]
    script = launched(command, (*flags, "--alpha", "1"), log := tmp_path / "log")
    until(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*")), script, log)
    script.send_signal(signal.SIGINT)
    assert script.wait(PATIENCE) == 130, log.read_text()
    (marker,) = tmp_path.glob("runs/*/preempted")
    assert json.loads(marker.read_text())["reason"].startswith("SIGINT on rank "), log.read_text()
    assert "Traceback" not in log.read_text()
    assert not ranks_of(flags)


@pytest.mark.long
def test_run_sh_starts_a_run_that_crashed_again(flags, tmp_path: Path) -> None:
    """And draws it when it is over."""
    recipe = "recipe/digits-resnet-localsgd-qsr.yml"
    given = (*flags, "--epochs", "2", "--alpha", "1")
    command = [str(ROOT / "run-scripts/run.sh"), recipe]
    script = launched(command, given, log := tmp_path / "log")
    until(lambda: list(tmp_path.glob("runs/*/checkpoints/step-*")), script, log)
    ranks_of(flags)["1"].kill()
    assert script.wait(PATIENCE) == 0, log.read_text()
    told = log.read_text()
    assert "2 replicas" in told
    assert told.count("starting it again from its newest checkpoint (1 restarts left)") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "summary.json").exists()
    assert max(checkpoint.found(folder / "checkpoints")) == 40
    page = folder / "report" / "report.html"
    assert page.exists() and f"{page}: 1 run" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ('folder.code_digest = lambda: "another"', "rank 1 has [version of this code: another]"),
        (
            'found = folder.versions(); folder.versions = lambda: found | {"torch": "1.0"}',
            "rank 1 has [version of torch: 1.0]",
        ),
    ],
    ids=["code", "torch"],
)
def test_a_rank_with_other_software_is_named(
    flags, tmp_path: Path, change: str, told: str
) -> None:
    other = tmp_path / "other.py"
    other.write_text(
        "import os, sys\nimport main\nfrom training import run_folder as folder, settings\n"
        f"if os.environ['RANK'] == '1':\n    {change}\n"
        "sys.exit(main.main(settings.load(sys.argv[1:])))\n"
    )
    outcome = Running(*flags, script=other).ended()
    assert outcome.codes == [2, 2], outcome.errors
    for rank in (0, 1):
        (line,) = outcome.complaints(rank)
        assert told in line and "where rank 0 has" in line


def test_a_run_goes_on_when_nobody_reads_what_it_prints(flags, tmp_path: Path) -> None:
    """As when its launcher, or the ssh session that started it, has gone: it stops in order."""
    command = [sys.executable, "main.py", *flags, "--steps-per-epoch", "6"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert any(line.startswith("epoch") for line in process.stdout)  # up to the first one
        process.stdout.close()
        process.stderr.close()
        (folder,) = (tmp_path / "runs").iterdir()
        before, deadline = evaluations(folder), time.monotonic() + PATIENCE
        while evaluations(folder) < before + 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        assert (folder / "preempted").exists()
    finally:
        process.kill()


def evaluations(folder: Path) -> int:
    """How many lines have been printed."""
    return (folder / "metrics.jsonl").read_text().count('"val"')
