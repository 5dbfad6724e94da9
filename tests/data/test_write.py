"""data.digits and data.write: the embedded data set and its files."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import write
from data.digits import CLASSES, digits, enlarge, stratified
from tests.support.patience import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    assert write.main(["digits", "--out", str(out), "--size", "16"]) == 0
    return out


def test_digits_are_split_once_and_for_all():
    train, test = digits()
    fit, tune = digits("tune")
    assert [len(part.labels) for part in (train, test, fit, tune)] == [1438, 359, 1151, 287]
    assert train.images.shape == (1438, 32, 32, 3) and train.images.dtype == np.uint8
    assert train.labels.dtype == np.int64 and len(CLASSES) == 10
    again, _ = digits()
    assert (again.images == train.images).all() and (again.labels == train.labels).all()


def test_every_class_is_held_out_in_proportion():
    labels = np.concatenate([part.labels for part in digits(size=1)])
    _, test = digits(size=1)
    shares = np.bincount(test.labels) / np.bincount(labels)
    assert np.abs(shares - 0.2).max() < 0.004


def test_stratified_parts_are_disjoint_and_complete():
    labels = np.arange(103) % 4
    kept, held_out = stratified(labels, 0.25, seed=0)
    assert sorted([*kept, *held_out]) == list(range(103))
    assert np.bincount(labels[held_out]).tolist() == [6, 6, 6, 6]
    assert (stratified(labels, 0.25, seed=1)[1] != held_out).any()


def test_tuning_never_sees_the_test_part():
    train, _ = digits(size=8)
    fit, tune = digits("tune", size=8)

    def images(part):
        return sorted(image.tobytes() for image in part.images)

    assert sorted(images(fit) + images(tune)) == images(train)


def test_enlarging_to_the_same_size_only_rescales():
    image = np.arange(64.0).reshape(1, 8, 8) % 17
    assert (enlarge(image, 8)[0, :, :, 0] == np.rint(image[0] * 255 / 16)).all()
    larger = enlarge(image, 16)[0]
    # Pixel centres at -0.25 (clipped to 0) and 0.25 of the old grid.
    assert larger[0, 0, 0] == 0 and larger[0, 1, 0] == np.rint(0.25 * 255 / 16)


@pytest.mark.parametrize("arguments", [{"split": "train"}, {"size": 0}])
def test_digits_refuses_nonsense(arguments):
    with pytest.raises(ValueError):
        digits(**arguments)


def test_description(folder):
    description = json.loads((folder / "dataset.json").read_text())
    train, _ = digits(size=16)
    assert description["name"] == "digits"
    assert description["settings"] == {"size": 16, "split": "test"}
    assert description["classes"] == CLASSES
    assert np.allclose(description["mean"], train.images.mean((0, 1, 2)) / 255, atol=1e-6)
    assert np.allclose(description["std"], train.images.std((0, 1, 2)) / 255, atol=1e-6)
    assert description["files"]["train.beton"]["images"] == 1438
    assert description["files"]["val.beton"]["images"] == 359
    for name, file in description["files"].items():
        assert (folder / name).stat().st_size == file["bytes"]


def test_the_bytes_are_the_same_in_every_release(folder):
    """Data written long ago would be written anew, or refused, if these changed."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert sums == {
        "dataset.json": "0f84f1168bdc1dfa6ae64138b531b513893a54edb59ddc1ec841a2aea6386d6d",
        "train.beton": "d055da74844608bb0b3456a97a2c3ea6738d51352b8637c0d210e92d8ea39e9f",
        "val.beton": "5b8252a3ede8fca554bc9df78b0147305262a8e83d84ae72c56047081831b84c",
    }


def test_writing_again_does_nothing_and_force_writes_the_same_bytes(folder, capsys):
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}
    assert sorted(before) == ["dataset.json", "train.beton", "val.beton"]
    command = ["digits", "--out", str(folder), "--size", "16"]
    assert write.main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {p.name: p.stat().st_ino for p in folder.iterdir()} == {
        name: inode for name, (inode, _) in before.items()
    }
    assert write.main([*command, "--force"]) == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        name: content for name, (_, content) in before.items()
    }


@pytest.mark.parametrize("damage", ["cut", "bit", "remove", "description"])
def test_damage_is_repaired(folder, damage, capsys):
    """Of what is not there by itself, of what is there and something else by --force."""
    path = folder / ("dataset.json" if damage == "description" else "val.beton")
    before = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "bit":
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    else:
        path.write_bytes(before[:-10])
    command = ["digits", "--out", str(folder), "--size", "16"]
    if damage != "remove":
        damaged = path.read_bytes()
        assert write.main(command) == 2
        line = one_line(capsys.readouterr().err)
        assert str(path) in line and path.read_bytes() == damaged
        told = f"python -m data.write digits --size 16 --out {folder} --force"
        assert f"`{told}`" in line
        command = told.split()[3:]
    assert write.main(command) == 0
    assert path.read_bytes() == before


def test_another_data_set_is_not_overwritten_by_chance(folder, capsys):
    assert write.main(["digits", "--out", str(folder), "--split", "tune"]) == 2
    assert "--force" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["train.beton", "val.beton", "dataset.json"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "fifo"])
def test_what_else_is_there_is_not_overwritten(tmp_path, name, kind, capsys):
    """Someone's own files of these names, with no description of a data set beside them."""
    path, mine = tmp_path / "out" / name, tmp_path / "mine"
    path.parent.mkdir()
    mine.write_text("mine")
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(mine)
    else:
        os.mkfifo(path)
    before = path.lstat()
    assert write.main(["digits", "--out", str(path.parent), "--size", "8"]) == 2
    line = one_line(capsys.readouterr().err)
    assert f"{path} is there already" in line and "--force`" in line
    assert path.lstat() == before and mine.read_text() == "mine"
    assert os.listdir(path.parent) == [name]
    if kind != "folder":
        assert write.main(["digits", "--out", str(path.parent), "--size", "8", "--force"]) == 0
        assert path.is_file() and mine.read_text() == "mine"


def test_a_failure_leaves_what_was_there(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write._Pages, "put", fail)
    with pytest.raises(write.DataError, match="No space left"):
        write.write("digits", {"size": 16, "split": "test"}, folder, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interruption_between_two_pages_ends_at_once(tmp_path):
    pages = write._Pages(tmp_path / "file", 0, write.MIN_PAGE_SIZE)
    with pytest.raises(KeyboardInterrupt), pages:
        pages.put(np.zeros(9, np.uint8))
        pages.flush_page()  # FFCV would wait for ever for its turn to write this page again
        raise KeyboardInterrupt
    assert (tmp_path / "file").stat().st_size == write.MIN_PAGE_SIZE


def test_what_a_source_finds_out_at_the_end_can_stop_it(tmp_path):
    def refuse():
        raise write.DataError("too late")

    samples = [(np.zeros((9, 9, 3), np.uint8), 0)]
    content = write.Content(["a"], [0.5] * 3, [0.5] * 3, samples, samples, findings=refuse)
    with pytest.raises(write.DataError, match="too late"):
        write.write_content("late", {}, content, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert write.main(["digits", "--out", str(tmp_path / "file" / "folder")]) == 2
    assert str(tmp_path) in one_line(capsys.readouterr().err)
    assert write.main(["digits", "--out", str(tmp_path / "new"), "--size", "0"]) == 2
    assert "0" in one_line(capsys.readouterr().err)
    with pytest.raises(SystemExit, match="2"):
        write.main(["imagenet", "--out", str(tmp_path)])
    assert "imagenet" in one_line(capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.slow
def test_the_command_ends_quietly(tmp_path):
    command = [sys.executable, "-m", "data.write", "digits", "--out", str(tmp_path), "--size", "8"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0
    assert result.stdout == f"{tmp_path}: written\n"
    assert "Error" not in result.stderr and "Warning" not in result.stderr


def one_line(text):
    assert text.endswith("\n") and text.count("\n") == 1
    return text
