"""Checkpoints on disk: one folder each, a file per rank, and a manifest that is written last.

Replicas differ inside a round, and their optimizer states always: every rank has its own file. All
is written below a temporary name, synced and renamed, so a folder with a manifest is whole, after a
power loss too; sizes and checksums in the manifest show whether it still is. What reads raises
CheckpointError if not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data.dataset import regular

from ..values import shortened

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
    return {
        step: path for step, path in sorted(folders.items()) if os.path.exists(path / MANIFEST)
    }


def write_rank(folder: Path, rank: int, content: dict[str, Any]) -> dict[str, Any]:
    """Write one rank's file, down to the disk; return what a manifest says of it."""
    make_folder(folder)
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
    sync_folder(final.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that a power loss does not take them away again.

    Raises:
        OSError: if that fails.
    """
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    elif not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def sync_folder(folder: Path) -> None:
    """Have the names in a folder written to the disk: a file's own sync does not do that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
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
        sync_folder(path.parent)
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

    Raises:
        OSError: if there is no such file to be had.
    """
    # Without O_NONBLOCK a named pipe of that name would never be open.
    descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    file = os.fdopen(descriptor, "r+b", buffering=0)
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
        text = regular(folder / MANIFEST, _LARGEST_MANIFEST).decode()
    except (FileNotFoundError, NotADirectoryError):
        what = f"no {MANIFEST} there, so no whole checkpoint" if folder.exists() else "not there"
        if (folder / "checkpoints").is_dir():
            what += "; it is a run's folder: give one of those in its checkpoints"
        raise CheckpointError(f"{folder}: {what}") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: {MANIFEST}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: {error}") from None
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: {MANIFEST} is not of format {FORMAT}")
        recorded = content.pop("sha256", None)
        whole = recorded == _digest(content)
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: not JSON to be read") from None
    if not whole:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged: not what its checksum says")
    if wrong := _misfit(content):
        raise CheckpointError(f"{folder}: {MANIFEST} is none of this program's: {wrong}")
    return content


_LARGEST_MANIFEST = 64 * 2**20  # of 100 bytes a rank


def _misfit(manifest: dict[str, Any]) -> str | None:
    """Where a manifest, whose checksum is right, says what no run of this program can have written.

    What is read of it later needs no look of its own.
    """
    for key, least in (("step", 0), ("world_size", 1)):
        if type(value := manifest.get(key)) is not int or not least <= value < 2**63:
            return f"{key} is {shortened(value)}"
    for key in ("config", "evaluation", "files"):
        if type(value := manifest.get(key)) is not dict:
            return f"{key} is {shortened(value)}"
    for name, score in manifest["evaluation"].items():
        if type(score) not in (int, float):
            return f"evaluation.{name} is {shortened(score)}"
    files = manifest["files"]
    if len(files) != manifest["world_size"]:  # so that the ranks can be counted
        return f"world_size is {manifest['world_size']}, and it names {len(files)} files"
    for rank in range(len(files)):
        file = files.get(rank_file(rank))
        if type(file) is not dict or type(file.get("bytes")) is not int:
            return f"files.{rank_file(rank)} is {shortened(file)}"
    return None


def opened(path: Path) -> BinaryIO:
    """A regular file, to be read: a named pipe would keep its reader waiting for ever.

    Raises:
        OSError: if it cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb")


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
    if repr(content.get("place")) != repr(identity(manifest["step"], rank, manifest["world_size"])):
        raise CheckpointError(f"{folder}: {file.name} belongs to another checkpoint")
    return content


def read(file: Path) -> dict[str, Any]:
    """The content of a file that `torch.save` wrote; nothing in it is run."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except Exception as error:  # torch does not say what it raises for a file of another kind
        reason = " ".join(str(error).partition("\n")[0].partition(". ")[0].split())
        raise CheckpointError(f"{file}: not a file of weights: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a file of weights: it holds no names")
    return content


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
