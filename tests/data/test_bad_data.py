"""Damaged data, wrong descriptions, and what cannot be written: one line, and nothing changes."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import write
from data.dataset import DataError, Dataset, checked
from data.loaders import stored_side
from tests.support.refusals import check, numbered, told, untouched
from training.plan.plan import plan


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    settings = {"size": 8, "split": "test"}
    with redirect_stderr(io.StringIO()):
        write.write("digits", settings, folder)
    return folder


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)


def replaced_by_text(path: Path) -> None:
    path.write_text("text\n")


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def removed(path: Path) -> None:
    path.unlink()


def extended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES = [
    truncated,
    emptied,
    flipped_header,
    replaced_by_text,
    replaced_by_folder,
    removed,
    extended,
]


@pytest.mark.parametrize("name", ["train.beton", "dataset.json"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_data(digits: Path, tmp_path: Path, damage: Any, name: str) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    damage(folder / name)
    with untouched(tmp_path):
        for call in (checked, stored_side):
            line = told(call, folder / "train.beton", error=DataError)
            check([str(folder / name), "python -m data.write"], line)


# What is written in place of an entry of dataset.json; a dotted name is of an entry's entry.
ENTRIES: list[tuple[str, Any, list[str]]] = [
    ("name", 3, ["name is 3"]),
    ("settings", [], ["settings is []"]),
    ("classes", "abc", ["classes is 'abc'"]),
    ("classes", [1, 2], ["classes is [1, 2]"]),
    ("classes", None, ["classes is None"]),
    ("mean", [0.5], ["mean is [0.5]"]),
    ("mean", [0.5, 0.5, "x"], ["mean is [0.5, 0.5, 'x']"]),
    ("mean", [0.5, 0.5, float("nan")], ["mean is [0.5, 0.5, nan]"]),
    ("std", [0, 1, 1], ["std is [0, 1, 1]"]),
    ("std", 0.5, ["std is 0.5"]),
    ("files", [], ["cannot be read"]),
    ("files", {}, ["train.beton isn't described"]),
    ("files", {"train.beton": 3}, ["cannot be read"]),
    ("files.images", "many", ["images of 'train.beton' is 'many'"]),
    ("files.images", -1, ["images of 'train.beton' is -1"]),
    ("files.images", True, ["images of 'train.beton' is True"]),
    ("files.images", 7, ["train.beton", "inconsistent tables"]),
    ("files.bytes", 1.5, ["bytes of 'train.beton' is 1.5"]),
    ("files.bytes", 7, ["train.beton", "instead of 7"]),
    ("files.sha256", None, ["sha256 of 'train.beton' is None"]),
    ("files.sha256", "0" * 64, ["train.beton", "checksum"]),
    ("skipped", {"a": 1}, ["skipped is {'a': 1}"]),
    ("an\nextra", 1, ["cannot be read"]),
]


@pytest.mark.parametrize(("entry", "value", "parts"), ENTRIES, ids=numbered(ENTRIES))
def test_a_wrong_entry_of_a_description(
    digits: Path, tmp_path: Path, entry: str, value: Any, parts: list[str]
) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    content = json.loads((folder / "dataset.json").read_text())
    section, _, key = entry.partition(".")
    (content["files"]["train.beton"] if key else content)[key or section] = value
    (folder / "dataset.json").write_text(json.dumps(content))
    with untouched(tmp_path):
        line = told(stored_side, folder / "train.beton", error=DataError)
        check([str(folder), *parts], line)
    if entry not in ("files.bytes", "files.sha256", "files.images"):  # the plan opens no images
        line = told(plan, ["--plan", "--data-pth", str(tmp_path)])
        check([str(folder / "dataset.json")], line)


@pytest.mark.parametrize("key", ["name", "settings", "classes", "mean", "std", "files"])
def test_a_description_that_lacks_an_entry(digits: Path, tmp_path: Path, key: str) -> None:
    content = json.loads((digits / "dataset.json").read_text())
    del content[key]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content))
    check([str(path), repr(key)], told(Dataset.load, path, error=DataError))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", "\x00", "[" * 100_000])
def test_a_description_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(text)
    check([str(path)], told(Dataset.load, path, error=DataError))


def test_a_description_of_another_data_set(digits: Path, tmp_path: Path) -> None:
    with redirect_stderr(io.StringIO()):
        write.write("digits", {"size": 16, "split": "test"}, tmp_path / "other")
        shutil.copy(tmp_path / "other" / "train.beton", tmp_path / "train.beton")
    shutil.copy(digits / "dataset.json", tmp_path)
    line = told(checked, tmp_path / "train.beton", error=DataError)
    check([str(tmp_path / "train.beton"), "checksum"], line)


WRITES: list[tuple[str, list[str]]] = [
    ("", ["SOURCE"]),
    ("flowers --out OUT", ["'flowers'"]),
    ("digits", ["--out"]),
    ("digits --out", ["--out"]),
    ("digits --out=", ["--out", "''"]),
    ("digits --out OUT --unknown 1", ["--unknown"]),
    ("digits --out OUT --size x", ["--size", "'x'"]),
    ("digits --out OUT --size 1.5", ["--size", "'1.5'"]),
    ("digits --out OUT --size 0", ["size", "0"]),
    ("digits --out OUT --size -3", ["size", "-3"]),
    ("digits --out OUT --size 1000000", ["size", "1000000"]),
    ("digits --out OUT --split none", ["--split", "'none'"]),
    ("digits --out TMP/file", ["TMP/file"]),
    ("digits --out TMP/file/folder", ["TMP/file/folder"]),
    ("digits --out TMP/digits", ["TMP/digits", "--force"]),
    ("cifar10 --out OUT", ["--folder"]),
    ("cifar10 --out OUT --folder /no/folder", ["/no/folder"]),
    ("cifar10 --out OUT --folder TMP/file", ["TMP/file"]),
    ("cifar10 --out OUT --folder TMP/cifar-10-batches-py", ["test_batch"]),
    ("imagefolder --out OUT --folder /no/tree", ["/no/tree"]),
    ("imagefolder --out OUT --folder TMP/file", ["TMP/file"]),
    ("imagefolder --out OUT --folder TMP/digits", ["TMP/digits"]),
    ("imagefolder --out OUT --folder TMP/tree --quality 0", ["quality", "0"]),
    ("imagefolder --out OUT --folder TMP/tree --quality 101", ["quality", "101"]),
    ("imagefolder --out OUT --folder TMP/tree --quality x", ["--quality", "'x'"]),
    ("imagefolder --out OUT --folder TMP/tree --max-size 0", ["size", "0"]),
    ("imagefolder --out OUT --folder TMP/tree --max-size 5000", ["size", "5000"]),
    ("imagefolder --out OUT --folder TMP/tree --jpeg-share 2", ["share", "2"]),
    ("imagefolder --out OUT --folder TMP/tree --jpeg-share nan", ["share", "nan"]),
    ("imagefolder --out OUT --folder TMP/tree --jpeg-share 0.25 --mode raw", ["0.25", "raw"]),
    ("imagefolder --out OUT --folder TMP/tree --mode bmp", ["--mode", "'bmp'"]),
    ("imagefolder --out OUT --folder TMP/tree --workers 0", ["workers", "0"]),
    ("imagefolder --out OUT --folder TMP/tree --workers -1", ["workers", "-1"]),
    ("imagefolder --out OUT --folder TMP/tree --statistics none", ["--statistics", "'none'"]),
]


@pytest.mark.parametrize(("flags", "parts"), WRITES, ids=[flags for flags, _ in WRITES])
def test_what_cannot_be_written(digits: Path, tmp_path: Path, flags: str, parts: list[str]) -> None:
    shutil.copytree(digits, tmp_path / "digits")
    (tmp_path / "file").touch()
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    for part in ("train", "val"):
        (tmp_path / "tree" / part / "a").mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "tree" / part / "a/1.png")

    def filled(text: str) -> str:
        return text.replace("OUT", f"{tmp_path}/out").replace("TMP", str(tmp_path))

    errors = io.StringIO()
    with untouched(tmp_path), redirect_stderr(errors), redirect_stdout(io.StringIO()) as output:
        try:
            status = write.main([filled(word) for word in flags.split()])
        except SystemExit as stopped:
            status = stopped.code
    line = errors.getvalue()
    assert (status, output.getvalue()) == (2, "")
    assert line.count("\n") == 1 and line.endswith("\n"), line
    check([filled(part) for part in parts], line)
