"""--resume auto where others have their runs, too: theirs are passed over, in a line each."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from localopt.collective import Collective
from tests.support.patience import PATIENCE
from tests.support.program import ROOT, Running, start
from tests.support.ranks import run
from training.checkpoint import files, resume
from training.config import Config
from training.values import ConfigError

pytestmark = pytest.mark.slow

NOBODY = 65534


@pytest.fixture
def logs() -> Iterator[Path]:
    """A folder that every user may look into."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def run_folder(logs: Path, name: str, settings: str, mode: int) -> Path:
    """An unfinished run with a checkpoint."""
    draft = logs / name / "checkpoints/draft"
    listed = {files.rank_file(0): files.write_rank(draft, 0, {})}
    manifest = {"step": 3, "world_size": 1, "config": {}, "files": listed, "evaluation": {}}
    files.publish(draft, files.folder_of(draft.parent, 3), manifest)
    (logs / name / "config.yml").write_text(settings)
    (logs / name).chmod(mode)
    return logs / name


def newest(rank: int, world_size: int, logs: str) -> tuple[str, str]:
    """As another user: what is chosen, and what is said."""
    if os.getuid() == 0:
        os.setuid(NOBODY)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            found = resume.newest(Config(alpha=1.0, resume="auto", log_pth=logs), Collective())
        except ConfigError as error:
            return "refused", str(error)
    return str(found and found[0]), said.getvalue()


def test_runs_that_cannot_be_continued_are_passed_over(logs: Path) -> None:
    same = yaml.safe_dump(Config(alpha=1.0, resume="auto", log_pth=str(logs)).as_dict())
    own = run_folder(logs, "1-own", same, 0o777)
    closed = run_folder(logs, "2-closed", same, 0o700)
    if os.getuid():
        closed.chmod(0)
    others = run_folder(logs, "3-others", same, 0o555)
    deep = run_folder(logs, "4-deep", "a: " + "[" * 50_000, 0o777)
    pipe = run_folder(logs, "5-pipe", "", 0o777)
    (pipe / "config.yml").unlink()
    os.mkfifo(pipe / "config.yml")
    text = run_folder(logs, "6-text", "\0", 0o777)
    (logs / "7-no-run").mkdir()
    (logs / "8-a-file").write_text("")
    ((chosen, said),) = run(newest, 1, str(logs), timeout=60)
    assert chosen == str(own / "checkpoints/step-00000003")
    lines = said.splitlines()
    for folder, reason in (
        (closed, "Permission denied"), (others, "Permission denied"), (deep, "nested too deeply"),
        (pipe, "not a regular file"), (text, "config.yml is damaged"),
    ):  # fmt: skip
        (line,) = [line for line in lines if line.startswith(f"resume auto: passing over {folder}")]
        assert reason in line
    assert len(lines) == 5


def test_a_log_folder_that_cannot_be_listed_is_refused(logs: Path) -> None:
    """Else the run would begin anew, and nobody would have said so."""
    logs.chmod(0o700 if os.getuid() == 0 else 0)
    ((chosen, said),) = run(newest, 1, str(logs), timeout=60)
    assert chosen == "refused" and f"{logs}: Permission denied" in said


SLOW = '''
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import main
from training import settings
from training.checkpoint import resume

restored = resume._restored

def slow(folder, *rest):
    Path({mark!r}, "chosen").touch()
    end = time.monotonic() + {limit}
    while not Path({mark!r}, "go").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return restored(folder, *rest)

resume._restored = slow
sys.exit(main.main(settings.load(sys.argv[1:])))
'''


def test_of_two_runs_that_resume_at_once_one_goes_on_undisturbed(data: str, tmp_path: Path) -> None:
    """The other clears nothing away, on no host, and begins a run of its own."""
    flags = (
        "--data-pth", data, "--log-pth", str(tmp_path / "runs"), "--epochs", "2",
        "--steps-per-epoch", "3", "--warmup-epochs", "0", "--device", "cpu", "--save-steps", "3",
        "--period", "constant", "--h-base", "3", "--resume", "auto",
    )  # fmt: skip
    first = start(*flags)
    assert first.codes == [0, 0], first.errors
    (first.folder / "summary.json").unlink()
    shutil.rmtree(first.folder / "checkpoints/step-00000006")
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(ROOT), mark=str(tmp_path), limit=PATIENCE))
    winner = Running(*flags, script=script)
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "chosen").exists():
        assert winner.alive() and time.monotonic() < deadline, winner.ended(1).errors
        time.sleep(0.02)
    draft = files.draft_of(files.folder_of(first.folder / "checkpoints", 6))
    draft.mkdir()
    (draft / "of the winner").touch()

    second = start(*flags, places=[{"LOCAL_RANK": "0"}] * 2)  # as on two hosts
    kept = (draft / "of the winner").exists()
    shutil.rmtree(draft, ignore_errors=True)
    (tmp_path / "go").touch()
    outcome = winner.ended()
    assert second.codes == [0, 0], second.errors
    assert f"passing over {first.folder}: it is running" in second.outputs[0]
    assert second.folder != first.folder and kept
    assert outcome.codes == [0, 0], outcome.errors
    assert outcome.folder == first.folder and 6 in files.found(first.folder / "checkpoints")
