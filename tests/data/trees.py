"""A tree of photographs, the command that writes it, and what is in the files then."""

import json
from io import BytesIO

import cv2
import numpy as np

from data import write
from data.ffcv_parts import JPEG, Reader
from data.loaders import TrainData

CLASSES = ["n01440764", "n01443843", "n01446922"]


def run(tree, out, *flags):
    """Write the tree's images to a folder by the command; its exit status."""
    command = ["imagefolder", "--folder", str(tree), "--out", str(out), "--workers", "2"]
    return write.main([*command, *map(str, flags)])


def written(tree, out, *flags):
    """The folder with what the command has written."""
    status = run(tree, out, *flags)
    assert status == 0, f"it ended with {status}"
    return out


def description(out):
    """What dataset.json says."""
    return json.loads((out / "dataset.json").read_text())


def stored(path):
    """Of each image in a .beton: mode, height, width, content, label."""
    reader, content = Reader(str(path)), path.read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"], strict=True))
    images = []
    for (mode, width, height, place), label in reader.metadata.tolist():
        images.append((mode, height, width, content[place : place + sizes[place]], label))
    return images


def pixels(path):
    """The images of a .beton as arrays."""
    arrays = []
    for mode, height, width, content, _ in stored(path):
        array = np.frombuffer(content, np.uint8)
        if mode == JPEG:
            arrays.append(cv2.imdecode(array, cv2.IMREAD_COLOR_RGB))
        else:
            arrays.append(array.reshape(height, width, 3))
    return arrays


def files(tree, part):
    """The photographs of a part, in the order of their labels."""
    return sorted((tree / part).glob("*/*"))


def add(tree, content, name="more.JPEG"):
    """One more image for the first class, as the first or, with this name, the last of it."""
    path = tree / "train" / CLASSES[0] / name
    path.write_bytes(content)
    return path


def encoded(image, kind="PNG", **options):
    """The file of a Pillow image."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def one_line(text):
    """The text, which must be a single line."""
    assert text.endswith("\n") and text.count("\n") == 1, text
    return text


def train_data(out, total_batch):
    """The loader of the part to train on, for one replica."""
    return TrainData(
        out / "train.beton", total_batch=total_batch, physical_batch=total_batch, rank=0,
        world_size=1, seed=0, resolution=32,
    )  # fmt: skip
