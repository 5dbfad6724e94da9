"""Checkpoint files appear whole, also where hosts that share a disk publish the same one."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE
from training.checkpoint.files import (
    MANIFEST,
    draft_of,
    folder_of,
    publish,
    set_aside,
    write_rank,
    write_text,
)

HOSTS, SAVES = 3, 40


def _host(folder: Path, barrier, failures) -> None:
    for save in range(SAVES):
        draft, final = folder / f".step-{save}.tmp", folder / f"step-{save}"
        draft.mkdir(exist_ok=True)
        barrier.wait()
        try:
            publish(draft, final, {"step": save})
        except OSError as error:
            failures.put(repr(error))
        barrier.wait()


def test_hosts_that_share_a_disk_publish_one_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, failures = context.Barrier(HOSTS), context.Queue()
    hosts = [
        context.Process(target=_host, args=(tmp_path, barrier, failures)) for _ in range(HOSTS)
    ]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(PATIENCE)
    assert failures.empty(), failures.get()
    assert all((tmp_path / f"step-{save}" / MANIFEST).exists() for save in range(SAVES))


def test_what_was_found_damaged_makes_way_each_time(tmp_path: Path) -> None:
    """A step damaged twice has one folder beside, the later one; unfinished ones are removed."""
    for number in (1, 2):
        for step in (3, 6) if number == 1 else (6,):
            draft = tmp_path / f".step-{step}.tmp"
            draft.mkdir()
            (draft / "number").write_text(str(number))
            publish(draft, folder_of(tmp_path, step), {})
        (tmp_path / ".step-9.tmp").mkdir()
        set_aside(tmp_path, 3)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["step-00000003", "step-00000006.damaged"]
        assert (tmp_path / "step-00000006.damaged/number").read_text() == str(number)


class Disk:
    """What a power loss would leave: files and folders count as they were when last synced."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._safe: dict[int, object] = {}
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            self._safe[os.fstat(descriptor).st_ino] = self._content(f"/proc/self/fd/{descriptor}")

        patch.setattr(os, "fsync", fsync)

    def _content(self, path: str | Path) -> object:
        """Of a file its size, of a folder the files that its names stand for."""
        if not stat.S_ISDIR(os.stat(path).st_mode):
            return os.stat(path).st_size
        return {entry.name: entry.inode() for entry in os.scandir(path)}

    def lost(self, root: Path) -> list[Path]:
        """What is not there in full, or under its name, after a power loss."""
        paths = [root, *root.rglob("*")]
        return [path for path in paths if self._safe.get(path.stat().st_ino) != self._content(path)]


def test_what_has_its_name_survives_a_power_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the rename: the draft's files, its names. After it: all names up to the run's."""
    disk, run = Disk(monkeypatch), tmp_path / "runs/this"
    final = folder_of(run / "checkpoints", 6)
    draft, rename = draft_of(final), Path.rename

    def renamed(self: Path, target: Path) -> Path:
        assert not disk.lost(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    files = {f"rank-000{rank}.pt": write_rank(draft, rank, {"a": rank}) for rank in (0, 1)}
    publish(draft, final, {"step": 6, "world_size": 2, "files": files})
    assert final.exists() and not disk.lost(tmp_path)
    write_text(run / "summary.json", "{}")
    assert not disk.lost(tmp_path)
