"""data.imagefolder: which images a tree has, and what becomes of one; what needs no workers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import imagefolder
from data.dataset import DataError
from data.sources import imagefolder as imagefolder_source
from tests.support.photographs import make_tree

from .trees import CLASSES, encoded, files, one_line, run


def test_links_and_subfolders_are_followed_and_other_files_ignored(own):
    place = own / "train" / CLASSES[2]
    place.rename(own / "elsewhere")
    place.symlink_to(own / "elsewhere")
    (place / "b").mkdir()
    for name in ("b/2.png", "b/1.webp", "z.BMP"):
        (place / name).touch()
    (place / ".hidden").mkdir()
    (own / "val" / ".git").mkdir()
    for name in (".DS_Store", "._a.JPEG", "notes.txt", "b/._1.png", ".hidden/1.png"):
        (place / name).touch()
    (own / "train" / "list.txt").touch()
    names = [name for name in imagefolder.find(own).train.names if CLASSES[2] in name]
    assert [Path(name).name for name in names[:4]] == [
        path.name for path in sorted((own / "elsewhere").glob("n*.JPEG"))
    ]
    assert [name.removeprefix(f"train/{CLASSES[2]}/") for name in names[4:]] == [
        "z.BMP", "b/1.webp", "b/2.png",
    ]  # fmt: skip


def test_a_link_to_the_folder_itself_is_told(own):
    (own / "train" / CLASSES[0] / "again").symlink_to(own / "train" / CLASSES[0])
    with pytest.raises(DataError, match="listed already"):
        imagefolder.find(own)


def test_a_tree_may_have_many_classes(tmp_path):
    names = make_tree(tmp_path, classes=1000, train=1, val=1, size=(40, 50))
    tree = imagefolder.find(tmp_path)
    assert tree.classes == names == sorted(names)
    assert tree.train.labels.tolist() == tree.val.labels.tolist() == list(range(1000))


def test_scaling_averages_over_areas():
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    means = image.reshape(20, 3, 30, 3, 3).mean(axis=(1, 3))
    assert np.abs(imagefolder.shrunk(image, 30) - means).max() <= 0.5


def test_sixteen_bits_become_eight():
    levels = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    image = imagefolder.decoded(encoded(Image.fromarray(levels)))
    assert image.shape == (256, 256, 3) and (image == np.arange(256)[:, None, None]).all()
    with pytest.raises(ValueError, match="mode F"):
        imagefolder.decoded(encoded(Image.new("F", (9, 9)), "TIFF"))


def test_the_share_of_jpegs_is_a_function_of_the_index():
    indices = np.arange(10_000)
    jpegs = {x: imagefolder.Storage(500, 90, x).jpegs(indices) for x in (0.0, 0.3, 0.5, 1.0)}
    for share, chosen in jpegs.items():
        assert abs(chosen.mean() - share) < 0.02
    assert not jpegs[0.0].any() and jpegs[1.0].all() and jpegs[0.5][jpegs[0.3]].all()
    assert (imagefolder.Storage(9, 1, 0.5).jpegs(indices[77:80]) == jpegs[0.5][77:80]).all()


def flat_val(tree):
    for path in files(tree, "val"):
        path.rename(tree / "val" / path.name)
        if not list(path.parent.iterdir()):
            path.parent.rmdir()
    return "val has images outside of class folders, like ILSVRC2012_val_00000013.JPEG; expected"


def half_sorted_val(tree):
    path = files(tree, "val")[3]
    path.rename(tree / "val" / path.name)
    return f"val has images outside of class folders, like {path.name}; expected"


def unknown_class(tree):
    (tree / "val" / CLASSES[1]).rename(tree / "val" / "n99999999")
    return "val has classes that aren't in train: n99999999"


def empty_class(tree):
    (tree / "train" / "n00000001").mkdir()
    return "n00000001 holds no image"


def class_without_images(tree):
    for path in (tree / "val" / CLASSES[2]).iterdir():
        path.rename(path.with_suffix(".txt"))
    return f"{CLASSES[2]} holds no image"


def archives(tree):
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()
    (tree / "train" / "n01440764.tar").touch()
    return "train has no class folders; expected"


def no_val(tree):
    shutil.rmtree(tree / "val")
    return "val: No such file or directory; expected"


def no_tree(tree):
    shutil.rmtree(tree)
    return "train: No such file or directory; expected"


def a_file(tree):
    shutil.rmtree(tree)
    tree.touch()
    return "train: Not a directory; expected"


def a_circle(tree):
    (tree / "train" / CLASSES[0] / "again").symlink_to("..")
    return "is a link to a folder that is listed already"


LAYOUTS = [
    flat_val, half_sorted_val, unknown_class, empty_class, class_without_images, archives, no_val,
    no_tree, a_file, a_circle,
]  # fmt: skip


@pytest.mark.parametrize("change", LAYOUTS)
def test_a_tree_of_another_layout_is_one_line(own, tmp_path, capfd, change):
    expected = change(own)
    assert run(own, tmp_path / "out") == 2
    message = one_line(capfd.readouterr().err)
    assert str(own) in message and expected in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-size", 0), ("--max-size", 4097), ("--quality", 0), ("--quality", 101),
        ("--jpeg-share", 1.5), ("--jpeg-share", -0.1), ("--jpeg-share", "nan"), ("--workers", 0),
        ("--jpeg-share", 0.5, "--mode", "raw"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_one_line(tree, tmp_path, capfd, flags):
    assert run(tree, tmp_path / "out", *flags) == 2
    one_line(capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_twenty_broken_files_are_named_and_the_others_counted():
    broken = {f"train/{number}.JPEG": "empty" for number in range(123)}
    lines = str(imagefolder_source._broken(Path("tree"), broken, 1000)).split("\n")
    assert len(lines) == 22 and "123 of 1000" in lines[0] and "and 103 more" in lines[-1]
