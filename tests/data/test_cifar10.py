"""data.cifar10: torchvision's folder becomes .beton files, and nothing in it is trusted."""

import itertools
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from data import write
from data.cifar10 import cifar10, find, identity
from data.dataset import DataError
from data.loaders import ValData

CLASSES = [b"airplane", b"cat", b"ship"]
EACH = 7  # images per file


def batch(seed):
    rng = np.random.default_rng(seed)
    return {
        b"batch_label": b"a batch",
        b"labels": rng.integers(0, len(CLASSES), EACH).tolist(),
        b"data": rng.integers(0, 256, (EACH, 3072)).astype(np.uint8),
        b"filenames": [b"%d.png" % number for number in range(EACH)],
    }


META = {b"num_cases_per_batch": EACH, b"label_names": CLASSES, b"num_vis": 3072}


def by_python_2(value):
    """What Python 2's pickle, of protocol 2, made of the same."""

    def opcodes(value):
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"(" + b"".join(map(opcodes, value)) + b"l"
        if isinstance(value, dict):
            return b"(" + b"".join(map(opcodes, itertools.chain(*value.items()))) + b"d"
        shape = b"".join(map(opcodes, value.shape)) + b"\x86"
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2
        dtype += b"K\x00tb"
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        return empty + b"(K\x01" + shape + dtype + b"\x89" + opcodes(value.tobytes()) + b"tb"

    return b"\x80\x02" + opcodes(value) + b"."


def by_python_3(value):
    return pickle.dumps(value, protocol=2)


def make_folder(root, dumps=by_python_3, batches=2):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for number in range(1, batches + 1):
        (folder / f"data_batch_{number}").write_bytes(dumps(batch(number)))
    (folder / "test_batch").write_bytes(dumps(batch(0)))
    (folder / "batches.meta").write_bytes(dumps(META))
    (folder / "readme.html").touch()
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def pictures(*seeds):
    """The batches' images, pixel by pixel from the format's description: channels, then rows."""
    images = np.empty((len(seeds) * EACH, 32, 32, 3), np.uint8)
    rows = [row for seed in seeds for row in batch(seed)[b"data"]]
    for image, row in zip(images, rows, strict=True):
        for channel in range(3):
            for y in range(32):
                image[y, :, channel] = row[1024 * channel + 32 * y :][:32]
    return images, [label for seed in seeds for label in batch(seed)[b"labels"]]


@pytest.mark.parametrize("dumps", [by_python_2, by_python_3])
def test_images_labels_and_names_are_those_of_the_files(tmp_path, dumps):
    classes, train, test = cifar10(make_folder(tmp_path, dumps))
    assert classes == ["airplane", "cat", "ship"]
    for (images, labels), seeds in ((train, (1, 2)), (test, (0,))):
        expected, named = pictures(*seeds)
        assert images.dtype == np.uint8 and (images == expected).all()
        assert labels.dtype == np.int64 and labels.tolist() == named


def test_numpy_reads_these_files_too():
    """Else the tests of this file would be about a format of their own."""
    for dumps in (by_python_2, by_python_3):
        found, expected = pickle.loads(dumps(batch(1)), encoding="bytes"), batch(1)
        assert (found.pop(b"data") == expected.pop(b"data")).all()
        assert found == expected


def test_an_array_stored_by_columns_is_the_same(folder):
    content = batch(1)
    content[b"data"] = np.asfortranarray(content[b"data"])
    (folder / "data_batch_1").write_bytes(by_python_3(content))
    assert (cifar10(folder)[1][0] == pictures(1, 2)[0]).all()


@pytest.mark.parametrize("batches", [1, 5, 11])
def test_there_are_as_many_batches_as_files(tmp_path, batches):
    folder = make_folder(tmp_path, batches=batches)
    assert [path.name for path in find(folder).train] == [
        f"data_batch_{number}" for number in range(1, batches + 1)
    ]
    assert len(cifar10(folder)[1][1]) == batches * EACH


def test_what_is_written_can_be_read(folder, tmp_path):
    out = tmp_path / "out"
    assert write.main(["cifar10", "--folder", str(tmp_path), "--out", str(out)]) == 0
    description = json.loads((out / "dataset.json").read_text())
    images, _ = pictures(1, 2)
    assert description["name"] == "cifar10"
    assert description["classes"] == ["airplane", "cat", "ship"]
    assert np.allclose(description["mean"], images.mean((0, 1, 2)) / 255, atol=1e-6)
    assert np.allclose(description["std"], images.std((0, 1, 2)) / 255, atol=1e-6)
    assert [file["images"] for file in description["files"].values()] == [14, 7]
    assert str(tmp_path) not in (out / "dataset.json").read_text()

    data = ValData(
        out / "val.beton", rank=0, world_size=1, batch=EACH, resolution=32, crop_ratio=1.0
    )
    [(found, labels)] = data
    expected, named = pictures(0)
    assert labels.tolist() == named
    mean, std = (np.array(description[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    assert np.abs((found.numpy() * std + mean) * 255 - expected.transpose(0, 3, 1, 2)).max() < 1e-3


def test_the_same_files_elsewhere_are_the_same_data(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert write.main(["cifar10", "--folder", str(folder), "--out", str(out)]) == 0
    capsys.readouterr()
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert write.main(["cifar10", "--folder", str(moved), "--out", str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out

    (moved / "test_batch").write_bytes(by_python_3(batch(9)))
    assert write.main(["cifar10", "--folder", str(moved), "--out", str(out)]) == 2
    assert "--force" in one_line(capsys.readouterr().err)


def test_every_file_is_part_of_the_identity(folder):
    seen = [identity(folder)]
    for path in sorted(folder.glob("*batch*")):
        path.write_bytes(path.read_bytes() + b" ")
        seen.append(identity(folder))
    assert len({found["sha256"] for found in seen}) == 5
    (folder / "data_batch_3").write_bytes(by_python_3(batch(3)))
    assert identity(folder)["batches"] == 3


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def changed(**entries):
    return by_python_3(batch(1) | {key.encode(): value for key, value in entries.items()})


NO_IMAGE = {b"data": np.empty((0, 3072), np.uint8), b"labels": []}
OBJECTS = np.array([[0] * 3072] * EACH, object)

DAMAGE = {
    "cut": (lambda content: content[:-100], "data_batch_1 isn't a file of CIFAR-10"),
    "empty": (lambda content: b"", "data_batch_1 isn't a file of CIFAR-10"),
    "text": (lambda content: b"<html>\n</html>\n", "data_batch_1 isn't a file of CIFAR-10"),
    "list": (lambda content: by_python_3([1, 2]), "data_batch_1.*no data"),
    "no labels": (lambda content: by_python_3({b"data": batch(1)[b"data"]}), "1.*no labels"),
    "malicious": (lambda content: by_python_3(Malicious()), "data_batch_1.*mkdir"),
    "eval": (lambda content: b"c__builtin__\neval\n(S'1'\ntR.", "data_batch_1.*eval"),
    "other array": (lambda content: b"cnumpy\nload\n.", r"data_batch_1.*numpy\.load"),
    "3071 pixels": (
        lambda content: changed(data=batch(1)[b"data"][:, :-1]), r"data_batch_1.*\(n, 3072\)",
    ),
    "no image": (lambda content: by_python_2(batch(1) | NO_IMAGE), "data_batch_1.*3072"),
    "floats": (lambda content: changed(data=np.ones((EACH, 3072))), "data_batch_1.*3072"),
    "objects": (lambda content: changed(data=OBJECTS), "data_batch_1.*3072"),
    "no array": (lambda content: changed(data=b"0" * 3072), "data_batch_1.*3072"),
    "too few labels": (lambda content: changed(labels=[0]), "data_batch_1.*list of 7"),
    "label 3": (lambda content: changed(labels=[0] * 6 + [3]), "data_batch_1.*image 6.*0 to 2"),
    "label -1": (lambda content: changed(labels=[-1] * 7), "data_batch_1.*image 0.*0 to 2"),
    "label 0.5": (lambda content: changed(labels=[0.5] * 7), "data_batch_1.*image 0.*0 to 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_batch_is_one_line_and_nothing_is_written(
    folder, tmp_path, monkeypatch, capsys, name
):
    damage, named = DAMAGE[name]
    path = folder / "data_batch_1"
    path.write_bytes(damage(path.read_bytes()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=named):
        cifar10(folder)
    assert write.main(["cifar10", "--folder", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert str(path) in one_line(capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["cifar-10-batches-py"]


@pytest.mark.parametrize("names", [None, [], "airplane", ["airplane"]])
def test_damaged_names_are_named(folder, names):
    (folder / "batches.meta").write_bytes(by_python_3({b"label_names": names}))
    with pytest.raises(DataError, match=r"batches\.meta.*label_names"):
        cifar10(folder)


def test_numpy_is_not_told_what_a_file_says_of_its_arrays(folder):
    """A dtype of objects, said to be plain: numpy would take the bytes for their addresses."""
    content = by_python_2(batch(1)).replace(b"U\x02u1", b"U\x02O8")
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_1.*3072"):
        cifar10(folder)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_2", "test_batch", "batches.meta"])
def test_a_missing_file_is_named(tmp_path, capsys, name):
    folder = make_folder(tmp_path, batches=3)
    (folder / name).unlink()
    command = ["cifar10", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    assert write.main(command) == 2
    assert f"{folder / name} is missing" in one_line(capsys.readouterr().err)
    os.mkfifo(folder / name)
    assert write.main(command) == 2
    assert f"{folder / name} is not a regular file but a FIFO" in one_line(capsys.readouterr().err)
    (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.truncate(2**40)
    assert write.main(command) == 2
    assert f"{folder / name} is larger than" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["", "nowhere", "nowhere/cifar-10-batches-py"])
def test_a_missing_folder_is_told_where_torchvision_puts_it(tmp_path, capsys, place):
    out = tmp_path / "out"
    assert write.main(["cifar10", "--folder", str(tmp_path / place), "--out", str(out)]) == 2
    message = one_line(capsys.readouterr().err)
    assert str(tmp_path / place) in message and "torchvision.datasets.CIFAR10" in message
    assert not out.exists()


def test_the_folder_has_to_be_given(capsys):
    with pytest.raises(SystemExit, match="2"):
        write.main(["cifar10", "--out", str(Path("out"))])
    assert "--folder" in one_line(capsys.readouterr().err)


def one_line(text):
    assert text.endswith("\n") and text.count("\n") == 1
    return text
