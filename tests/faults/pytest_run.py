"""One run of pytest in a copy of the code, and what it says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .stages import SELF

TIME_OUT = "time-out"
# A fault often shows as something that never comes; what fails is tried on unmodified code too.
_WAITS = {"PATIENCE": "45"}
_SUMMARY = "short test summary info"
# A test's parameters may hold spaces and dashes, such as "[a - b]".
_LINE = re.compile(r"^(FAILED|ERROR) ([^\s\[]+(?:\[.*?\])?)(?: - .*)?$", re.MULTILINE)
_ABSENT = re.compile(
    r"^ERROR: (?:(?:file or directory )?not found:|found no collectors for) ", re.MULTILINE
)

stopping = threading.Event()  # no further test is begun


@dataclass(frozen=True)
class Outcome:
    """What caught the fault, if anything did; ``end`` is the last of what pytest printed."""

    caught_by: str | None
    seconds: float
    end: str


def run(copy: Path, arguments: Sequence[str], extra: Sequence[str], timeout: float) -> Outcome:
    """Run pytest on a copy of the code until a test fails."""
    command = [
        python(copy), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rfE",
        f"--basetemp={copy.parent / 'pytest'}", f"--ignore={SELF}", "--timeout=90",
        *arguments, *extra,
    ]  # fmt: skip
    code, text, seconds = _finished(command, copy, timeout)
    return Outcome(verdict(code, text), seconds, text[-3000:])


def python(copy: Path) -> str:
    """The interpreter of a copy."""
    own = copy / ".venv/bin/python"
    return str(own) if own.exists() else sys.executable


def check_import(copy: Path) -> str | None:
    """What keeps a copy's own packages from being imported; None if nothing does."""
    names = "localopt, data.loaders, training.loop"
    code = f"import {names}; print(localopt.__file__, data.__file__, training.__file__)"
    status, text, _ = _finished([python(copy), "-c", code], copy, 600)
    if status:
        return text.strip()[-2000:]
    paths = text.strip().splitlines()[-1].split()
    strange = [path for path in paths if not Path(path).resolve().is_relative_to(copy.resolve())]
    return f"imported from elsewhere: {', '.join(strange)}" if strange else None


def _finished(command: list[str], copy: Path, timeout: float) -> tuple[int | None, str, float]:
    """Exit status (None: out of time), output and seconds; nothing is left running."""
    environment = {**_WAITS, **os.environ, "PYTHONPATH": str(copy)}
    began = time.monotonic()
    with (copy.parent / "output").open("w+b") as output:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = _waited(process, began + timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _end_strays(copy)
        output.seek(0)
        return code, output.read().decode(errors="replace"), time.monotonic() - began


def _waited(process: subprocess.Popen[bytes], until: float) -> int | None:
    while time.monotonic() < until:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.2)
        if stopping.is_set():
            raise KeyboardInterrupt
    return None


def _end_strays(copy: Path) -> None:
    """End what tests have started in sessions of its own: it works in the copy."""
    base = copy.parent.resolve()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").resolve().is_relative_to(base):
                os.kill(int(entry.name), signal.SIGKILL)


def verdict(code: int | None, text: str) -> str | None:
    """What has failed first, from pytest's exit status and output; None if nothing did."""
    if code is None:
        return TIME_OUT
    if code in (0, 5):  # 5: no test was collected
        return None
    if code == 4 and _ABSENT.search(text):
        return None
    if code < 0:
        return f"crash ({signal.Signals(-code).name})"
    failed = _LINE.search(text.rpartition(_SUMMARY)[2]) if _SUMMARY in text else None
    if failed is None:
        if "+++ Timeout +++" in text:
            return TIME_OUT
        return "collection" if "while loading conftest" in text else f"exit status {code}"
    kind, node = failed.groups()
    return node if kind == "FAILED" or "::" in node else f"collection of {node}"
