"""Puts the faults into copies of the code, one at a time, and tries the tests on each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import pytest_run
from .anchor import broken
from .listing import Fault, FaultError
from .pytest_run import TIME_OUT
from .stages import Stage, stages

_LINKED = (".venv", ".localopt")  # what is installed, not copied


@dataclass(frozen=True)
class Settings:
    """How faults are tried.

    Attributes:
        root: the checkout.
        out: the file of results.
        tests: only these; None: stage by stage.
        extra: more arguments for pytest.
        timeout: seconds for each stage.
        jobs: faults at a time.
        subject_only: leave the tests of other packages out.
        again: also faults that have a result.
    """

    root: Path
    out: Path
    tests: list[str] | None = None
    extra: Sequence[str] = ()
    timeout: float = 900.0
    jobs: int = 1
    subject_only: bool = False
    again: bool = False


@dataclass
class Results:
    """What is known of each fault so far, on disk after each."""

    path: Path
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def at(cls, path: Path) -> Results:
        """Those of a file, which need not be there yet."""
        return cls(path, json.loads(path.read_text("utf-8")) if path.exists() else {})

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Take one more."""
        with self.lock:
            self.known[name] = result
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_name(f".{self.path.name}.tmp")
            draft.write_text(json.dumps(self.known, indent=1, ensure_ascii=False) + "\n", "utf-8")
            draft.replace(self.path)

    def has(self, fault: Fault) -> bool:
        """Whether this fault, as it is now, has a result."""
        return self.known.get(fault.id, {}).get("digest") == digest(fault)


def digest(fault: Fault) -> str:
    """A checksum of what a fault changes."""
    return hashlib.sha256(f"{fault.old}\0{fault.new}".encode()).hexdigest()[:12]


@contextlib.contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of the checkout, uncommitted changes and new files included."""
    base = Path(tempfile.mkdtemp(prefix="fault-"))
    try:
        copy = base / "code"
        listed = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others",
             "--exclude-standard"],
            check=True, capture_output=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.decode().split("\0")):
            if name.split("/")[0] not in _LINKED and (root / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, copy / name, follow_symlinks=False)
        for name in _LINKED:
            if (root / name).exists():
                (copy / name).symlink_to((root / name).resolve())
        # A set-up in the copy would be one of the folder that it is linked to.
        (copy / "run-scripts/setup.sh").write_text("#!/usr/bin/env bash\n")
        yield copy
    finally:
        shutil.rmtree(base, ignore_errors=True)


class Sound:
    """Whether what fails with a fault passes without it; each is tried once."""

    def __init__(self, copy: Path, settings: Settings) -> None:
        self._copy, self._settings = copy, settings
        self._known: dict[tuple[str, ...], bool] = {}
        self._lock = threading.Lock()

    def stands(self, caught_by: str, stage: Stage) -> bool:
        """Whether it was the fault: for a test, and for a stage that ran out of time."""
        if "::" in caught_by:
            return self._passes((caught_by,))
        return caught_by != TIME_OUT or self._passes(stage.arguments)

    def deselected(self) -> list[str]:
        """Arguments that leave out the tests that fail on the code as it is."""
        known = list(self._known.items())
        tests = [asked[0] for asked, passed in known if not passed]
        return [f"--deselect={test}" for test in tests if "::" in test]

    def _passes(self, arguments: tuple[str, ...]) -> bool:
        with self._lock:
            if arguments not in self._known:
                asked, settings = [*arguments, *self.deselected()], self._settings
                outcome = pytest_run.run(self._copy, asked, settings.extra, settings.timeout)
                self._known[arguments] = outcome.caught_by is None
            return self._known[arguments]


def try_all(faults: list[Fault], settings: Settings) -> Results:
    """Try all faults that have no result yet.

    Raises:
        FaultError: if one cannot be put in, or the code as it is cannot be imported.
    """
    for fault in faults:
        broken(settings.root, fault)
    results = Results.at(settings.out)
    due = [fault for fault in faults if settings.again or not results.has(fault)]
    if not due:
        return results
    with copied(settings.root) as copy:
        if problem := pytest_run.check_import(copy):
            raise FaultError(f"the code without any fault cannot be imported: {problem}")
        sound = Sound(copy, settings)
        with ThreadPoolExecutor(settings.jobs) as pool:
            running = [pool.submit(tried, fault, settings, sound) for fault in due]
            try:
                for number, done in enumerate(as_completed(running), 1):
                    fault, result = done.result()
                    results.add(fault.id, result)
                    print(f"[{number}/{len(due)}] {_line(fault, result)}", flush=True)
            except BaseException:
                pytest_run.stopping.set()
                pool.shutdown(cancel_futures=True)
                raise
    return results


def tried(fault: Fault, settings: Settings, sound: Sound) -> tuple[Fault, dict[str, Any]]:
    """Put a fault into a copy, and run stage after stage until a test fails."""
    place, text = broken(settings.root, fault)
    result: dict[str, Any] = {
        **{key: getattr(fault, key) for key in ("origin", "file", "function", "what")},
        "equivalent": fault.equivalent,
        "digest": digest(fault),
        "caught_by": None,
        "stage": None,
        "seconds": 0.0,
        "stages": {},
        "doubts": [],
    }
    with copied(settings.root) as copy:
        (copy / place.file).write_text(text, encoding="utf-8")
        tests, alone = settings.tests, settings.subject_only
        for stage in stages(settings.root, fault, tests, subject_only=alone):
            if _fails(copy, stage, settings, sound, result):
                break
    return fault, result


def _fails(
    copy: Path, stage: Stage, settings: Settings, sound: Sound, result: dict[str, Any]
) -> bool:
    """Whether a stage catches the fault; what fails without it as well is left out."""
    while True:
        asked = [*stage.arguments, *sound.deselected()]
        outcome = pytest_run.run(copy, asked, settings.extra, settings.timeout)
        spent = result["stages"].get(stage.name, 0.0) + outcome.seconds
        result["stages"][stage.name] = round(spent, 1)
        result["seconds"] = round(sum(result["stages"].values()), 1)
        if outcome.caught_by is None:
            return False
        if sound.stands(outcome.caught_by, stage):
            result |= {"caught_by": outcome.caught_by, "stage": stage.name, "end": outcome.end}
            return True
        doubt = f"{stage.name}: {outcome.caught_by} without the fault, too"
        if doubt in result["doubts"]:
            return False
        result["doubts"].append(doubt)
        if outcome.caught_by == TIME_OUT:
            return False


def _line(fault: Fault, result: dict[str, Any]) -> str:
    told = result["caught_by"] or "NOT CAUGHT"
    doubts = f"; {'; '.join(result['doubts'])}" if result["doubts"] else ""
    stage = f"{result['stage']}, " if result["stage"] else ""
    return f"{fault.id}: {told} ({stage}{result['seconds']:.0f} s{doubts})"


def interruptible() -> None:
    """Make a request to stop end the tests that run, too."""

    def stop(number: int, frame: object) -> None:
        pytest_run.stopping.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
