"""Smooth pictures of five classes in .beton files, and the loaders that read them."""

import cv2
import numpy as np
import torch

from data import write
from data.loaders import TrainData, ValData

TRAIN, VAL, SIDE = 50, 23, 16


def pictures(count, seed):
    """Smooth colour images of different sizes; smooth, so that JPEG changes them little."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        height, width = rng.integers(20, 60, 2)
        coarse = rng.integers(0, 256, (3, 3, 3)).astype(np.uint8)
        images.append(cv2.resize(coarse, (int(width), int(height))))
    return [(image, i % 5) for i, image in enumerate(images)]


def write_pictures(samples, out, mode):
    """Both .beton files of the samples in a folder, as pixels or as JPEG."""
    content = write.Content(
        classes=list("abcde"),
        mean=[0.2, 0.4, 0.6],
        std=[0.3, 0.2, 0.1],
        train=samples["train"],
        val=samples["val"],
        mode=mode,
    )
    write.write_content("pictures", {}, content, out)
    return out


def train_data(folder, **changed):
    """The loader of the part to train on, for one replica if nothing else is said."""
    arguments = {
        "total_batch": 12, "physical_batch": 4, "rank": 0, "world_size": 1, "seed": 3,
        "resolution": SIDE, "workers": 2,
    }  # fmt: skip
    return TrainData(folder / "train.beton", **(arguments | changed))


def val_data(folder, **changed):
    """The loader of the part to evaluate on."""
    arguments = {"rank": 0, "world_size": 1, "batch": 6, "resolution": SIDE, "workers": 2}
    return ValData(folder / "val.beton", **(arguments | changed))


def collected(batches):
    """All images and labels of an iterator, one after the other."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def pixels(data, images):
    """Undo the normalisation: (m, R, R, 3) uint8."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (data.dataset.mean, data.dataset.std))
    values = ((images * std + mean) * 255).permute(0, 2, 3, 1)
    assert torch.allclose(values, values.round(), atol=1e-3), "levels are whole numbers"
    return values.round().to(torch.uint8).numpy()


def same(a, b):
    """Whether two rows of tensors are equal, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
