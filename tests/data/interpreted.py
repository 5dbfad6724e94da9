"""A program: data.randaugment_triton on the CPU, in Triton's interpreter, beside the compiled code.

It prints where pixels differ. In a process of its own, for Triton asks when it is imported whether
to interpret (TRITON_INTERPRET).
"""

import numpy as np
import torch

from data import randaugment_triton
from data.randaugment import SETS, RandAugment, transform

KINDS = 4


def pictures(count, size, first):
    """In turn noise of all values, of few, of two, and one colour: (count, *size, 3) uint8."""
    images = (
        np.random.default_rng(first).integers(0, 256, (KINDS, count, *size, 3)).astype(np.uint8)
    )
    kinds = images[0], 90 + images[1] % 21, np.where(images[2] < 80, 13, 240), images[3, :, :1, :1]
    whole = np.stack([np.broadcast_to(kind, kinds[0].shape) for kind in kinds])
    return whole[(np.arange(count) + first) % KINDS, np.arange(count)].astype(np.uint8)


def compare(images, settings, draws):
    plan = settings.planned(draws, *images.shape[1:3])
    given, expected = torch.from_numpy(images), np.array(images, order="C")
    transform(expected, *plan)
    before = given.clone()
    found = randaugment_triton.transform(given, plan)
    assert torch.equal(given, before) and (found.data_ptr() != given.data_ptr() or not len(given))
    wrong = found.numpy() != expected
    if wrong.any():
        print(settings, images.shape, plan.operations[wrong.any((1, 2, 3))].tolist())


def each_operation(size, operations, first):
    """Each is the first step of an image; the second is drawn."""
    count = len(SETS[operations])
    draws = np.random.default_rng(first).random((count, 2, 3))
    draws[:, 0, 0] = (np.arange(count) + 0.5) / count
    draws[first::5, :, 1], draws[first + 1 :: 5, :, 1] = 0, 1 - 1e-9
    compare(pictures(count, size, first), RandAugment(2, operations=operations), draws)


def main():
    # Several turns for images that the interpreter is through with in seconds.
    randaugment_triton._READ["BLOCK"] = 512
    for first in range(KINDS):
        each_operation((33, 24), "all", first)
    for operations in SETS:
        each_operation((24, 33), operations, 0)
    for size in ((7, 19), (1, 9), (9, 1), (2, 2), (3, 3), (1, 1)):
        each_operation(size, "all", 1)
    random = np.random.default_rng(0)
    for count, depth in ((4, 0), (0, 2), (4, 3)):
        images = pictures(count, (9, 11), 0).swapaxes(1, 2)  # not contiguous
        compare(images, RandAugment(depth), random.random((count, depth, 3)))


if __name__ == "__main__":
    main()
