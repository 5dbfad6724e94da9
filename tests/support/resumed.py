"""Whether a program that was stopped and started again equals one that never stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import observed
from .program import Outcome, start

# What torchrun says, and `Running` does not; Lightning asks for it.
TORCHRUN = {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}
# Seconds are measured; who starts twice, or looks at the consensus twice, sends more for that.
MEASURED = {"exposed", "hidden", "wait", "waits", "other_seconds", "other_bytes"}
SOMEBODY_ELSE = "all replicas were equal"  # localopt's warning: gradients are averaged elsewhere


@dataclass(frozen=True)
class Runs:
    """A program's runs on two ranks.

    Attributes:
        folder: has what the program saves: ``whole``; ``stopped``, where it was stopped; ``parts``,
            where it went on from there.
        whole, stopped, resumed: how the ranks ended.
    """

    folder: Path
    whole: Outcome
    stopped: Outcome
    resumed: Outcome

    def seen(self, rank: int) -> dict[str, Any]:
        """What `observed` has written of a rank in the whole run."""
        return json.loads((self.folder / f"whole.{rank}.json").read_text())


def in_two_parts(program: Path, folder: Path, *flags: str) -> Runs:
    """Run ``program`` to its end, and again in two parts: stopped by ``flags``, then resumed."""

    def run(name: str, *flags: str) -> Outcome:
        given = (str(folder / name), str(program), "--folder", str(folder / name), *flags)
        ended = start(*given, script=Path(observed.__file__), places=[TORCHRUN] * 2)
        assert ended.codes == [0, 0], ended.errors
        assert SOMEBODY_ELSE not in "".join(ended.errors), ended.errors
        return ended

    whole, stopped = run("whole"), run("parts", *flags)
    shutil.copytree(folder / "parts", folder / "stopped")
    return Runs(folder, whole, stopped, run("parts"))


def difference(first: Any, second: Any, path: str = "") -> str | None:
    """Where two saved states differ, bit for bit, but for what is measured; None if nowhere."""
    if type(first) is not type(second):
        return f"{path}: {type(first)}, {type(second)}"
    if isinstance(first, Tensor):
        return None if torch.equal(first, second) else f"{path}: tensors"
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return f"{path}: {first.keys()}, {second.keys()}"
        pairs = {key: (first[key], second[key]) for key in first if key not in MEASURED}
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            return f"{path}: lengths"
        pairs = dict(enumerate(zip(first, second, strict=True)))
    else:
        return None if first == second or first != first else f"{path}: {first}, {second}"
    found = (difference(a, b, f"{path}/{key}") for key, (a, b) in pairs.items())
    return next((one for one in found if one), None)
