"""data.randaugment: the draws, the magnitudes and the pixels are composer's."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from data import randaugment_torch
from data.randaugment import SETS, Operation, RandAugment, transform
from training import methods

EVERY = [("all", number) for number in range(13)] + [("original", n) for n in range(9, 13)]


@cache
def pictures(height, width):
    """Pieces of two photographs, and four of fewer colours: (8, height, width, 3) uint8."""
    from sklearn.datasets import load_sample_images  # takes seconds to import

    rng = np.random.default_rng(0)
    images = []
    for photograph in [Image.fromarray(image) for image in load_sample_images().images] * 2:
        left, top, side = rng.integers(0, 200, 3)
        box = (left, top, left + 200 + side // 2, top + 120 + side // 2)
        images.append(np.asarray(photograph.resize((width, height), box=box)))
    colours = [np.full(3, 0), np.full(3, 255), [77, 0, 200]]
    flat = [np.broadcast_to(colour, (height, width, 3)) for colour in colours]
    two_valued = np.where(rng.random((height, width, 3)) < 0.3, 13, 240)
    return np.stack([*images, *flat, two_valued]).astype(np.uint8)


def composers(monkeypatch, image, draws, settings):
    """What composer makes of an image (height, width, 3), where its random numbers are `draws`."""
    randaugment_image = methods.composer().randaugment_image
    from composer.algorithms.utils.augmentation_primitives import augmentation_sets

    steps, now = iter(draws), []

    def choice(some):
        now[:] = next(steps)
        return some[int(now[0] * len(some))]

    def number(low=None, high=None):
        return now[2] if low is None else low + (high - low) * now[1]

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "choice", choice)
        patch.setattr(np.random, "uniform", number)
        patch.setattr(np.random, "random", number)
        result = randaugment_image(
            Image.fromarray(image),
            settings.severity,
            settings.depth,
            augmentation_sets[settings.operations],
        )
    return np.asarray(result)


def random_draws(count, depth, seed=0):
    """Uniform but for some that are 0, just below 1, and at the coin's edge."""
    draws = np.random.default_rng(seed).random((count, depth, 3))
    draws[0::7, :, 1], draws[1::7, :, 1], draws[2::7, :, 2] = 0, 1 - 1e-9, 0.5
    return draws


def check(monkeypatch, images, draws, settings):
    plan = settings.planned(draws, *images.shape[1:3])
    expected = np.stack(
        [composers(monkeypatch, *some, settings) for some in zip(images, draws, strict=True)]
    )
    compiled = images.copy()
    transform(compiled, *plan)
    batched = randaugment_torch.transform(torch.from_numpy(images), plan)
    assert np.array_equal(compiled, expected)
    assert np.array_equal(batched.numpy(), expected)


@pytest.mark.parametrize(("operations", "number"), EVERY)
@pytest.mark.parametrize(
    ("size", "severities"),
    [((224, 224), [10]), ((61, 40), [10, 1, 0]), ((1, 9), [10]), ((9, 1), [10]), ((2, 2), [10])],
)
def test_each_operation_equals_composers(monkeypatch, operations, number, size, severities):
    images = pictures(*size) if size[0] < 224 else pictures(*size)[1::2]
    for severity in severities:
        draws = random_draws(len(images), 1, number)
        draws[:, :, 0] = (number + 0.5) / len(SETS[operations])
        check(monkeypatch, images, draws, RandAugment(1, severity, operations))


@pytest.mark.parametrize(
    ("settings", "size", "rounds"),
    [
        (RandAugment(), (224, 224), 2),
        (RandAugment(), (61, 40), 30),
        (RandAugment(3, 4.5, "safe"), (31, 31), 20),
        (RandAugment(4, 7, "original"), (31, 32), 20),
        (RandAugment(0), (31, 31), 1),
    ],
)
def test_chains_equal_composers(monkeypatch, settings, size, rounds):
    images = np.concatenate([pictures(*size)] * rounds)
    check(monkeypatch, images, random_draws(len(images), settings.depth), settings)


def test_images_are_cut_into_parts_that_fit_the_memory(monkeypatch):
    monkeypatch.setattr(randaugment_torch, "_PIXELS", 3 * 31 * 31)
    images = np.concatenate([pictures(31, 31)] * 10)
    check(monkeypatch, images, random_draws(len(images), 2), RandAugment())


def test_a_plan_is_a_function_of_each_images_own_word():
    seeds = np.random.default_rng(0).integers(0, 2**63, 500).astype(np.uint64)
    whole = RandAugment(3).plan(seeds, 50, 60)
    part = RandAugment(3).plan(seeds[100:7:-2], 50, 60)
    for a, b in zip(whole, part, strict=True):
        assert (a[100:7:-2] == b).all()
    assert len(np.unique(whole.magnitudes)) > 500
    longer = RandAugment(4).plan(seeds, 50, 60)
    assert (longer.operations[:, :3] == whole.operations).all()


def test_a_plan_never_changes():
    """Recorded values: a change would make old runs impossible to repeat or resume."""
    plan = RandAugment().plan(np.array([1, 2], np.uint64), 224, 224)
    assert plan.operations.tolist() == OPERATIONS
    assert plan.magnitudes.tolist() == MAGNITUDES


def test_draws_are_distributed_as_composers():
    """All operations equally often, signs and sides by a fair coin, levels uniform."""
    seeds = np.arange(130_000, dtype=np.uint64)
    operations, magnitudes, _ = RandAugment(1).plan(seeds, 224, 224)
    assert np.abs(np.bincount(operations[:, 0]) / 10_000 - 1).max() < 0.05

    def of(operation):
        return magnitudes[operations == operation]

    def uniform(values, low, high):
        values = np.sort((values - low) / (high - low))
        return np.abs(values - np.linspace(0, 1, len(values))).max() < 0.03

    for operation, high in ((Operation.SHEAR_X, 0.3), (Operation.SHEAR_Y, 0.3)):
        assert uniform(np.abs(of(operation)), 0.003, high)
        assert abs((of(operation) > 0).mean() - 0.5) < 0.03
    for operation, most in ((Operation.ROTATE, 29), (Operation.TRANSLATE_X, 74)):
        assert (of(operation).min(), of(operation).max()) == (-most, most)
        assert abs(of(operation).mean()) < 0.02 * most
    assert set(of(Operation.POSTERIZE)) == {1, 2, 3, 4}
    assert (of(Operation.SOLARIZE).min(), of(Operation.SOLARIZE).max()) == (1, 254)
    for operation in (Operation.COLOR, Operation.CONTRAST, Operation.SHARPNESS):
        more = of(operation) > 1
        assert abs(more.mean() - 0.5) < 0.03
        assert uniform(of(operation)[more], 1, 10) and uniform(of(operation)[~more], 0.1, 1)
    assert of(Operation.BRIGHTNESS).max() == pytest.approx(7.5, abs=0.01)


def test_consecutive_operations_and_draws_are_independent():
    operations, magnitudes, _ = RandAugment(2).plan(np.arange(169_000, dtype=np.uint64), 224, 224)
    pairs = np.bincount(operations[:, 0] * 13 + operations[:, 1].astype(int), minlength=169)
    assert np.abs(pairs / 1000 - 1).max() < 0.15
    both = (operations == Operation.SHEAR_X).all(axis=1)
    assert abs(np.corrcoef(magnitudes[both].T)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"depth": -1}, "depth.*-1"),
        ({"depth": 1.5}, "depth.*1.5"),
        ({"severity": -0.1}, "severity.*-0.1"),
        ({"severity": 10.5}, "severity.*10.5"),
        ({"severity": float("nan")}, "severity.*nan"),
        ({"operations": "most"}, "all, safe, original, got most"),
    ],
)
def test_settings_out_of_range_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        RandAugment(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [(224, 224), (61, 40), (1, 9)])
@pytest.mark.parametrize("by", ["torch", "triton"])
def test_a_gpu_makes_the_same_pixels_and_is_not_waited_for(by, size):
    there = pytest.importorskip(f"data.randaugment_{by}").transform
    images = np.concatenate([pictures(*size)] * 20)
    plan = RandAugment(3).plan(np.arange(len(images), dtype=np.uint64), *size)
    given = torch.from_numpy(images).cuda()
    there(given, plan)  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = there(given, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (given.cpu().numpy() == images).all()
    transform(images, *plan)
    assert (found.cpu().numpy() == images).all()


OPERATIONS = [[11, 9], [11, 6]]
MAGNITUDES = [[-55.0, -0.1349466161454283], [-56.0, 0.3804298184630028]]
