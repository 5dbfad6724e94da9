"""Small data sets that several files of tests read; whoever changes one copies it first."""

import shutil

import cv2
import pytest

from tests.support.photographs import make_tree

from .pictures import TRAIN, VAL, pictures, write_pictures
from .trees import CLASSES


@pytest.fixture(scope="session")
def samples():
    """Images and labels of both parts."""
    return {"train": pictures(TRAIN, 0), "val": pictures(VAL, 1)}


@pytest.fixture(scope="session")
def raw(samples, tmp_path_factory):
    """A folder with both .beton files, uncompressed."""
    return write_pictures(samples, tmp_path_factory.mktemp("raw"), "raw")


@pytest.fixture(scope="session")
def jpg(samples, tmp_path_factory):
    """The same as JPEG."""
    return write_pictures(samples, tmp_path_factory.mktemp("jpg"), "jpg")


@pytest.fixture(params=["raw", "jpg"])
def folder(request):
    """Either of the two."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def squares(samples, tmp_path_factory):
    """Both .beton files with images of one size, as CIFAR's are."""
    resized = {part: [(cv2.resize(x, (32, 32)), y) for x, y in samples[part]] for part in samples}
    return resized, write_pictures(resized, tmp_path_factory.mktemp("squares"), "raw")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Three classes; 12 images of up to 100 x 130 pixels to train on, 6 to evaluate on."""
    folder = tmp_path_factory.mktemp("tree")
    assert make_tree(folder, classes=3, train=4, val=2, size=(100, 130)) == CLASSES
    return folder


@pytest.fixture
def own(tree, tmp_path):
    """A copy of the tree, to change."""
    return shutil.copytree(tree, tmp_path / "tree")
