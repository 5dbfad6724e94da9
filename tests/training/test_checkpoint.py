"""Checkpoint files appear whole, also where hosts that share a disk publish the same one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from tests.support.patience import PATIENCE
from training.checkpoint.files import MANIFEST, folder_of, publish, set_aside

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
