"""A manifest whose checksum is right may still say what no run has written: one line, no more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localopt.collective import Collective
from tests.support.ranks import run
from training.checkpoint import files, resume
from training.checkpoint.files import MANIFEST, CheckpointError
from training.values import ConfigError

pytestmark = pytest.mark.slow

GOOD = {
    "step": 6,
    "world_size": 2,
    "config": {"model": "vit-digits"},
    "versions": {},
    "evaluation": {"top1": 0.5},
    "files": {f"rank-000{rank}.pt": {"bytes": 3, "sha256": "x"} for rank in (0, 1)},
}
DEEP = "[" * 100_000 + "]" * 100_000


def written(folder: Path, manifest: dict[str, Any]) -> Path:
    """A checkpoint whose manifest has a checksum that is right."""
    final = files.folder_of(folder, 6)
    draft = files.draft_of(final)
    draft.mkdir(parents=True)
    files.publish(draft, final, manifest)
    return final


def read(rank: int, world_size: int, folder: str) -> list[str]:
    """What all that reads a manifest says of it."""
    path, said = Path(folder), []
    for reader in (files.manifest, lambda path: resume.identity(path, "resume_pth")):
        try:
            reader(path)
        except (CheckpointError, ConfigError) as error:
            said.append(str(error))
    files.prune(path.parent, 1)
    return [*said, resume._fault(path, Collective())]


def said_of(folder: Path) -> list[str]:
    """In a process that is ended if it takes long."""
    (said,) = run(read, 1, str(folder), timeout=30)
    assert len(said) == 3, "every reader refuses it"
    assert all("\n" not in line and len(line) < 500 and str(folder) in line for line in said)
    return said


def test_a_good_one_is_read(tmp_path: Path) -> None:
    assert files.manifest(written(tmp_path, GOOD))["step"] == 6


@pytest.mark.parametrize("value", [10**10, "2", 2.0, True, 0, -1, 3, None, [2], 10**30])
def test_a_number_of_replicas_that_cannot_be(tmp_path: Path, value: object) -> None:
    assert "world_size is" in said_of(written(tmp_path, {**GOOD, "world_size": value}))[0]


@pytest.mark.parametrize("value", ["6", -1, 6.5, None, [6], {}, 10**30])
def test_a_step_that_cannot_be(tmp_path: Path, value: object) -> None:
    assert "step is" in said_of(written(tmp_path, {**GOOD, "step": value}))[0]


@pytest.mark.parametrize("key", ["config", "files", "evaluation"])
@pytest.mark.parametrize("value", [[], "text", None, 3])
def test_a_part_of_another_kind(tmp_path: Path, key: str, value: object) -> None:
    assert f"{key} is {value!r}" in said_of(written(tmp_path, {**GOOD, key: value}))[0]


@pytest.mark.parametrize(
    "listed",
    [
        {"rank-0000.pt": [], "rank-0001.pt": {}},
        {"rank-0000.pt": {"bytes": "3", "sha256": "x"}, "rank-0001.pt": {"bytes": 3}},
        {"rank-0000.pt": {"bytes": 3, "sha256": "x"}, "../../elsewhere": {"bytes": 3}},
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, listed: dict[str, Any]) -> None:
    assert "files.rank-000" in said_of(written(tmp_path, {**GOOD, "files": listed}))[0]


def test_a_score_of_another_kind(tmp_path: Path) -> None:
    said = said_of(written(tmp_path, {**GOOD, "evaluation": {"top1": "high"}}))
    assert "evaluation.top1 is 'high'" in said[0]


def as_text(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(text)


def as_link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "make",
    [
        as_text(DEEP), as_text(f'{{"format": 2, "config": {DEEP}}}'), as_text("9" * 10_000),
        as_text("[]"), as_text("\0" * 100), lambda file: file.write_bytes(b"\xff\xfe{}"),
        as_pipe, as_folder, as_link_to_itself,
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(tmp_path: Path, make: Callable[[Path], object]) -> None:
    folder = written(tmp_path, GOOD)
    make(folder / MANIFEST)
    said_of(folder)


def test_a_ranks_file_that_is_a_pipe(tmp_path: Path) -> None:
    empty = {"bytes": 0, "sha256": "x"}
    folder = written(tmp_path, {**GOOD, "world_size": 1, "files": {"rank-0000.pt": empty}})
    os.mkfifo(folder / "rank-0000.pt")

    assert run(verified, 1, str(folder), timeout=30) == [
        f"{folder}: rank-0000.pt: it is no regular file"
    ]


def verified(rank: int, world_size: int, folder: str) -> str:
    try:
        files.verify(Path(folder), files.manifest(Path(folder)), 0)
    except CheckpointError as error:
        return str(error)
    return "nothing"
