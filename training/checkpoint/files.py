"""Checkpoints on disk: one folder each, a file per rank, and a manifest that is written last.

Replicas differ inside a round, and their optimizer states always: every rank has its own file. All
is written below a temporary name, synced and renamed, so a folder with a manifest is whole; sizes
and checksums in the manifest show whether it still is. What reads raises CheckpointError if not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

MANIFEST = "manifest.json"
FORMAT = 2

_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is not there, not whole, or not as it was written."""


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps belongs."""
    return checkpoints / f"step-{step:08d}"


def draft_of(final: Path) -> Path:
    """Where it is written before it is whole."""
    return final.with_name(f".{final.name}.tmp")


def rank_file(rank: int) -> str:
    """A rank's file in a checkpoint."""
    return f"rank-{rank:04d}.pt"


def identity(step: int, rank: int, world_size: int) -> dict[str, int]:
    """What a rank's file says of itself, under "place"."""
    return {"step": step, "rank": rank, "world_size": world_size}


def found(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder that have a manifest, by step, the oldest first."""
    try:
        names = sorted(os.listdir(checkpoints))
    except OSError:
        return {}
    folders = {int(m[1]): checkpoints / name for name in names if (m := _NAME.fullmatch(name))}
    return {step: path for step, path in sorted(folders.items()) if (path / MANIFEST).exists()}


def write_rank(folder: Path, rank: int, content: dict[str, Any]) -> dict[str, Any]:
    """Write one rank's file, down to the disk; return what a manifest says of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / rank_file(rank)) as file:
        summed = _Summed(file)
        try:
            torch.save(content, summed)
        except RuntimeError:  # what torch makes of an error in writing
            if summed.error is None:
                raise
            raise summed.error from None
    return {"bytes": summed.bytes, "sha256": summed.sum.hexdigest()}


class _Summed:
    """A file that is written to, with its size and checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sum, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sum.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        self._file.flush()


def publish(draft: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Add the manifest, and give the folder its name. Hosts that share a disk may all do so."""
    manifest = {"format": FORMAT, **manifest}
    manifest["sha256"] = _digest(manifest)
    try:
        write_text(draft / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        draft.rename(final)
    except OSError:
        if not (final / MANIFEST).exists():  # else: another host on the same disk was first
            raise
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best; with 0 none.

    The best is that before which the highest top-1 accuracy was measured, the newest of those.
    """
    steps = found(checkpoints)
    if not keep or len(steps) <= keep:
        return

    def score(step: int) -> tuple[float, int]:
        try:
            top1 = manifest(steps[step])["evaluation"].get("top1")
        except CheckpointError:
            top1 = None
        return (-1.0 if top1 is None else top1), step

    kept = {*list(steps)[-keep:], max(steps, key=score)}
    for step, folder in steps.items():
        if step not in kept:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder, which at no moment looks like a whole checkpoint without being one."""
    with contextlib.suppress(OSError):  # gone: another host on the same disk was first
        trash = folder.with_name(f".{folder.name}.trash-{socket.gethostname()}-{os.getpid()}")
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def set_aside(checkpoints: Path, after: int) -> None:
    """Clear the way for a run that goes on from step ``after``.

    Later checkpoints, which were found damaged, get another name; unfinished ones are removed.
    """
    for step, folder in found(checkpoints).items():
        if step > after:
            with contextlib.suppress(OSError):
                aside = folder.with_name(f"{folder.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
    for pattern in (".step-*.tmp", ".step-*.trash-*"):
        for left in checkpoints.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is there as a whole, down to the disk, or not at all."""
    # Hosts that share a disk may write the same file at the same moment.
    draft = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    with whole(path) as file:
        file.write(text.encode())


def lock(run: Path) -> BinaryIO | None:
    """Take hold of a run's folder for as long as the file that is returned is open.

    Returns:
        None if another process has hold of it.
    """
    file = (run / "lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


def manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says, which is undamaged and of this format."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = f"no {MANIFEST} there, so no whole checkpoint" if folder.exists() else "not there"
        raise CheckpointError(f"{folder}: {what}") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: {MANIFEST}: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: {MANIFEST} is not of format {FORMAT}")
    if content.pop("sha256", None) != _digest(content):
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: not what its checksum says")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(folder: Path, manifest: dict[str, Any], rank: int) -> Path:
    """The path of a rank's file, which is as it was written."""
    name = rank_file(rank)
    file, recorded = folder / name, manifest["files"].get(name)
    if recorded is None:
        raise CheckpointError(
            f"{folder}: saved by {manifest['world_size']} replicas, so there is no {name}"
        )
    try:
        whole = file.stat().st_size == recorded["bytes"] and sha256(file) == recorded["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: {name}: {error.strerror}") from None
    if not whole:
        raise CheckpointError(f"{folder}: {name} is damaged: not what {MANIFEST} recorded")
    return file


def rank_state(folder: Path, manifest: dict[str, Any], rank: int) -> dict[str, Any]:
    """What a rank saved."""
    file = verify(folder, manifest, rank)
    content = read(file)
    if content.get("place") != identity(manifest["step"], rank, manifest["world_size"]):
        raise CheckpointError(f"{folder}: {file.name} belongs to another checkpoint")
    return content


def read(file: Path) -> dict[str, Any]:
    """The content of a file that `torch.save` wrote; nothing in it is run."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except Exception as error:  # torch does not say what it raises for a file of another kind
        reason = " ".join(str(error).partition("\n")[0].split())
        raise CheckpointError(f"{file}: not a file of weights: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a file of weights: it holds no names")
    return content


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
