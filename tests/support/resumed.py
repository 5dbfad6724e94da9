"""Whether a program that was stopped and started again equals one that never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .program import Outcome, start

# Seconds are measured; who starts twice, or looks at the consensus twice, sends more for that.
MEASURED = {"exposed", "hidden", "wait", "waits", "other_seconds", "other_bytes"}
SOMEBODY_ELSE = "all replicas were equal"  # localopt's warning: somebody averages the gradients


def in_two_parts(script: Path, folder: Path, *flags: str) -> tuple[Outcome, Outcome, Outcome]:
    """Run ``script`` to its end, and again in two parts: stopped by ``flags``, then resumed.

    It gets ``--folder``: ``folder/whole`` and ``folder/parts``. What it had saved where it was
    stopped is then in ``folder/stopped``.

    Returns:
        How the ranks ended: of the whole run, of the first part, of the second.
    """
    whole, parts = (("--folder", str(folder / name)) for name in ("whole", "parts"))
    ended = [start(*whole, script=script), start(*parts, *flags, script=script)]
    shutil.copytree(parts[1], folder / "stopped")
    ended.append(start(*parts, script=script))
    for one in ended:
        assert one.codes == [0, 0], one.errors
        assert SOMEBODY_ELSE not in "".join(one.errors), one.errors
    return ended[0], ended[1], ended[2]


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
