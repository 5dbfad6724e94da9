"""Runs that are killed, damaged or moved to other numbers of replicas go on."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Once
from tests.support.program import Outcome, start
from training.checkpoint import files as checkpoint
from training.checkpoint.files import MANIFEST

from .kills import RECIPES, TIMED, Runs

pytestmark = pytest.mark.slow

SHORT = (
    "--epochs", "2", "--steps-per-epoch", "6", "--warmup-epochs", "0", "--log-freq", "4",
    "--device", "cpu", "--h-base", "3",
)  # fmt: skip
CONSTANT = ("--period", "constant")


@pytest.fixture
def flags(data: str, tmp_path: Path) -> tuple[str, ...]:
    return ("--data-pth", data, "--log-pth", str(tmp_path / "runs"), *SHORT, *CONSTANT)


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_runs_that_are_killed_go_on_as_if_nothing_had_been(
    recipe: str, data: str, tmp_path: Path
) -> None:
    """A short form of `python -m tests.training.kills`."""
    runs = Runs(recipe, data, tmp_path / "runs", random.Random(recipe))
    runs.compare(runs.killed(2))


EACH = ("--save-steps", "3", "--save-keep", "0")


@pytest.fixture(scope="session")
def finished(data: str, once: Once) -> Path:
    """The folder of a finished run that has saved every three steps."""

    def train(logs: Path) -> None:
        outcome = start("--data-pth", data, "--log-pth", str(logs), *SHORT, *CONSTANT, *EACH)
        assert outcome.codes == [0, 0], outcome.errors

    return once("finished", train)


def timeless(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what a clock has measured."""
    return [{key: value for key, value in r.items() if key not in TIMED} for r in records]


def checkpoints(outcome: Outcome) -> dict[int, Path]:
    return checkpoint.found(outcome.folder / "checkpoints")


def unfinished(folder: Path, *steps: int) -> None:
    """Make a run's folder what it would be had it ended before these checkpoints."""
    (folder / "summary.json").unlink()
    for step in steps:
        shutil.rmtree(checkpoint.found(folder / "checkpoints")[step])


def damage(folder: Path, how: str) -> None:
    file = folder / "rank-0001.pt"
    if how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "a bit flipped":
        content = bytearray(file.read_bytes())
        content[-100] ^= 4
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    elif how == "manifest of another checkpoint":
        other = folder.with_name("step-00000003")
        shutil.copy(other / MANIFEST, folder / MANIFEST)
    elif how == "manifest cut":
        os.truncate(folder / MANIFEST, 100)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("truncated", "rank-0001.pt is damaged"),
        ("a bit flipped", "rank-0001.pt is damaged"),
        ("missing", "rank-0001.pt is missing"),
        ("manifest of another checkpoint", "rank-0000.pt is damaged"),
        ("manifest cut", "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    flags, finished: Path, tmp_path: Path, how: str, told: str
) -> None:
    shutil.copytree(finished, tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    saved = checkpoint.found(folder / "checkpoints")
    assert list(saved) == [3, 6, 9, 12]
    records = (folder / "metrics.jsonl").read_text()
    expected = {rank: weights(saved[12], rank) for rank in (0, 1)}
    unfinished(folder, 12)
    damage(saved[9], how)
    again = start(*flags, *EACH, "--resume", "auto")
    assert again.codes == [0, 0], again.errors
    assert again.folder == folder
    (line,) = [x for x in again.outputs[0].splitlines() if x.startswith("resume auto: passing")]
    assert f"step-00000009: {told}" in line
    for rank in (0, 1):
        assert weights(saved[12], rank) == expected[rank]
    assert timeless(again.records) == timeless(map(json.loads, records.splitlines()))
    assert (saved[9].parent / "step-00000009.damaged").exists() and list(checkpoints(again)) == [
        3, 6, 9, 12,
    ]  # fmt: skip


@pytest.mark.parametrize("left", ["a broken line", "nothing", "no file", "zeros"])
def test_records_that_a_power_loss_took_are_named(
    flags, finished: Path, tmp_path: Path, left: str
) -> None:
    """What is left of the file stays, without the line that broke."""
    shutil.copytree(finished, tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    unfinished(folder, 12)
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines[:3]] == [4, 6, 8]
    first = lines[0] if left in ("a broken line", "zeros") else ""
    file.write_text(first + {"a broken line": lines[1][:30], "zeros": "\0" * 400}.get(left, ""))
    if left == "no file":
        file.unlink()
    again = start(*flags, *EACH, "--resume", "auto")
    assert again.codes == [0, 0], again.errors
    (line,) = again.complaints(0)
    missing = "the records after step 4" if first else "all records"
    assert f"{file}: {missing} up to step 9 are missing" in line
    assert timeless(again.records) == timeless(
        json.loads(line) for line in ([first] if first else []) + lines[3:]
    )


def test_absurd_manifests_are_passed_over_in_a_line_each(
    flags, finished: Path, tmp_path: Path
) -> None:
    """Their checksums are right; one is a pipe that nobody writes to."""
    shutil.copytree(finished, tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    saved = checkpoint.found(folder / "checkpoints")
    unfinished(folder)
    absurd = checkpoint.manifest(saved[12]) | {"world_size": 10**10}
    absurd["sha256"] = checkpoint._digest(absurd)
    (saved[12] / MANIFEST).write_text(json.dumps(absurd))
    (saved[9] / MANIFEST).unlink()
    os.mkfifo(saved[9] / MANIFEST)
    (saved[6] / MANIFEST).write_text("[" * 100_000)
    again = start(*flags, *EACH, "--resume", "auto")
    assert again.codes == [0, 0], again.errors
    told = [x for x in again.outputs[0].splitlines() if x.startswith("resume auto: passing")]
    assert len(told) == 3 and "world_size is 10000000000" in told[0]
    assert "not a regular file" in told[1] and "not JSON" in told[2]
    assert f"continuing {folder} after step 3" in again.outputs[0]


def weights(folder: Path, rank: int) -> dict[str, list]:
    state = torch.load(folder / checkpoint.rank_file(rank), weights_only=True)["model"]
    return {name: tensor.tolist() for name, tensor in state.items()}


def test_only_an_unfinished_run_with_these_settings_is_continued(flags) -> None:
    given = (*flags, "--resume", "auto", "--save-steps", "6")
    first = start(*given)
    again = start(*given)
    assert first.codes == again.codes == [0, 0] and again.folder != first.folder
    unfinished(first.folder, 12)
    unfinished(again.folder, 12)
    other = start(*given, "--seed", "1")
    assert other.codes == [0, 0] and other.folder not in (first.folder, again.folder)
    with checkpoint.lock(again.folder):  # as if it were running
        last = start(*given, "--log-freq", "2")  # what is recorded may differ
    assert last.codes == [0, 0] and last.folder == first.folder
    assert f"{again.folder}: it is running" in last.outputs[0]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1)])
def test_a_run_goes_on_with_other_replicas(flags, before: int, after: int) -> None:
    """Of data-parallel training, which sees global batches, the result must hardly differ: no image
    of the epoch is seen twice or left out."""
    given = (
        *flags[: -len(CONSTANT)], "--recipe-pth", "recipe/digits-vit-adamw.yml",
        "--save-steps", "4", "--physical-batch-size", "16", "--save-keep", "0",
    )  # fmt: skip
    whole = start(*given, world_size=before)
    expected = weights(checkpoints(whole)[12], 0)
    unfinished(whole.folder, 8, 12)
    again = start(*given, "--resume", "auto", world_size=after)
    assert again.codes == [0] * after, again.errors
    assert f"saved by {before} replicas at step 4, this run has {after}" in again.outputs[0]
    assert f"continuing {whole.folder} after step 4" in again.outputs[0]
    manifest = json.loads((checkpoints(again)[12] / MANIFEST).read_text())
    assert manifest["world_size"] == len(manifest["files"]) == after
    for name, value in weights(checkpoints(again)[12], after - 1).items():
        mine, theirs = torch.tensor(value), torch.tensor(expected[name])
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", ["digits-resnet-overlap", "digits-resnet-easgd"])
def test_local_replicas_that_differ_become_others(flags, recipe: str) -> None:
    given = (*flags, "--recipe-pth", f"recipe/{recipe}.yml", "--save-steps", "5")
    whole = start(*given)
    unfinished(whole.folder, 12)
    again = start(*given, "--resume", "auto", world_size=4)
    assert again.codes == [0] * 4, again.errors
    assert [r["step"] for r in again.records if r["kind"] == "train"] == [4, 8, 12]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_not_those_before(flags, small_disk: Path) -> None:
    given = (*flags, "--log-pth", str(small_disk), "--save-steps", "4", "--save-keep", "0")
    roomy = start(*given, "--epochs", "1")  # saves after 4 and 6 steps
    size = sum(file.stat().st_size for file in checkpoints(roomy)[4].iterdir())
    shutil.rmtree(roomy.folder)
    (small_disk / "ballast").write_bytes(bytes(64 * 2**20 - size * 5 // 2))
    outcome = start(*given)  # 4, 8 and 12: room for two
    assert outcome.codes == [2, 2], outcome.errors
    told = [line for line in outcome.errors[0].splitlines() if "cannot save step" in line]
    assert "No space left on device" in told[0] and "rank" in told[0]
    (folder,) = small_disk.glob("digits-*")
    saved = checkpoint.found(folder / "checkpoints")
    assert saved and 12 not in saved
    assert sorted(os.listdir(folder / "checkpoints")) == [path.name for path in saved.values()]
    (small_disk / "ballast").unlink()
    again = start(*given, "--resume", "auto")
    assert again.codes == [0, 0], again.errors
    assert again.folder == folder and 12 in checkpoints(again)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, top1 in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.7), (5, None), (6, 0.6)):
        draft = tmp_path / "draft"
        files = {checkpoint.rank_file(0): checkpoint.write_rank(draft, 0, {})}
        score = {} if top1 is None else {"top1": top1}
        told = {"step": step, "world_size": 1, "config": {}, "files": files, "evaluation": score}
        checkpoint.publish(draft, checkpoint.folder_of(tmp_path, step), told)
        checkpoint.prune(tmp_path, 2)
    assert list(checkpoint.found(tmp_path)) == [3, 5, 6]
    assert sorted(os.listdir(tmp_path)) == [f"step-0000000{step}" for step in (3, 5, 6)]
