"""Small ImageFolder trees of real photographs, laid out and named as ImageNet is.

The photographs are crops of the two that come with scikit-learn.
"""

from __future__ import annotations

from functools import cache
from io import BytesIO
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

DISTINCT = 40


def make_tree(
    folder: Path, classes: int = 3, train: int = 4, val: int = 2, size: tuple[int, int] = (400, 500)
) -> list[str]:
    """Write FOLDER/train/CLASS/*.JPEG and FOLDER/val/CLASS/*.JPEG.

    A large tree repeats the same DISTINCT files, so 2000 images take a second or two.

    Args:
        folder: made if missing.
        classes: how many.
        train, val: images of each class in either part.
        size: height and width of most images; others are upright or square. None is larger.

    Returns:
        The names of the classes, in order.
    """
    names = [f"n{1440764 + 3079 * number:08d}" for number in range(classes)]
    photographs, numbers = jpegs(size), count(1)
    for part, images in (("train", train), ("val", val)):
        for name in names:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for _ in range(images):
                number = next(numbers)
                stem = f"{name}_{number}" if part == "train" else f"ILSVRC2012_val_{number:08d}"
                path = folder / part / name / f"{stem}.JPEG"
                path.write_bytes(photographs[number % DISTINCT])
    return names


@cache
def jpegs(size: tuple[int, int]) -> list[bytes]:
    """DISTINCT files, the same at every call: crops, some mirrored, some darker or brighter."""
    from sklearn.datasets import load_sample_images  # takes seconds to import

    random = np.random.RandomState(0)
    originals = [Image.fromarray(image) for image in load_sample_images().images]
    files = []
    for number in range(DISTINCT):
        height, width = (size, size[::-1], size, (min(size), min(size)))[number // 2 % 4]
        original = originals[number % 2]
        scale = random.uniform(0.5, 1) * min(original.width / width, original.height / height)
        left = random.uniform(0, original.width - scale * width)
        top = random.uniform(0, original.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        image = original.resize((width, height), Image.Resampling.BICUBIC, box)
        if random.random_sample() < 0.5:
            image = ImageOps.mirror(image)
        image = ImageEnhance.Brightness(image).enhance(random.uniform(0.7, 1.3))
        file = BytesIO()
        image.save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    return files
