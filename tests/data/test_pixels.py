"""data.loaders: crops, padding, flips and RandAugment, picture by picture."""

import cv2
import numpy as np
import pytest
import torch

from data import loaders, order
from data.loaders import Beton
from data.randaugment import RandAugment

from .pictures import SIDE, TRAIN, collected, pixels, same, train_data, val_data


def test_central_crop_has_the_pixels_of_opencv(folder, samples):
    data = val_data(folder, crop_ratio=0.875)
    found, labels = collected(data)
    assert labels.tolist() == [label for _, label in samples["val"]]
    for image, (stored, _) in zip(pixels(data, found), samples["val"], strict=True):
        height, width = stored.shape[:2]
        side = int(0.875 * min(height, width))
        top, left = (height - side) // 2, (width - side) // 2
        crop = stored[top : top + side, left : left + side]
        expected = cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        error = np.abs(image.astype(int) - expected)
        if folder.name.startswith("raw"):
            assert error.max() <= 1  # another release of OpenCV may round differently
        else:
            assert error.mean() < 6  # what JPEG loses


def test_boxes_and_flips_are_applied_exactly(raw, samples):
    """Crops of the output's size aren't resized, so every pixel can be told."""
    beton = Beton(raw / "train.beton", resolution=SIDE, batch_size=7, workers=2, device="cpu")
    indices = np.array([4, 1, 30, 49, 0, 7, 8, 9, 10])
    boxes = np.array([[i % 4, (i + 2) % 5, SIDE, SIDE] for i in range(len(indices))])
    flips = np.arange(len(indices)) % 2 == 0
    images, labels = collected(beton.batches(indices, boxes, flips))
    assert labels.tolist() == [int(i) % 5 for i in indices]
    for image, index, (top, left, h, w), mirrored in zip(
        pixels(beton, images), indices, boxes, flips, strict=True
    ):
        crop = samples["train"][index][0][top : top + h, left : left + w]
        assert (image == (crop[:, ::-1] if mirrored else crop)).all()


def test_flip_false_never_flips(raw):
    flipped, straight = train_data(raw), train_data(raw, flip=False)
    a, labels = collected(flipped.epoch(0))
    b, expected = collected(straight.epoch(0))
    assert torch.equal(labels, expected)
    mirrored = [torch.equal(x.flip(2), y) for x, y in zip(a, b, strict=True)]
    equal = [torch.equal(x, y) for x, y in zip(a, b, strict=True)]
    assert all(x or y for x, y in zip(mirrored, equal, strict=True))
    assert 10 < sum(mirrored) < 38


def padded(image, box):
    """The box's pixels in an image that black surrounds, by NumPy: (height, width, 3) uint8."""
    top, left, height, width = box
    margin = 60
    black = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    return black[top + margin :][:height, left + margin :][:, :width]


def test_padded_crops_picture_by_picture(raw, samples):
    """Resized to no size but their own, so every pixel can be told: shifts, black and flips."""
    beton = Beton(
        raw / "train.beton", resolution=SIDE, batch_size=7, workers=2, device="cpu", padding=25
    )
    rng = np.random.default_rng(0)
    indices = rng.permutation(TRAIN)
    tops = [rng.integers(-25, samples["train"][i][0].shape[0] + 25 - SIDE + 1) for i in indices]
    lefts = [rng.integers(-25, samples["train"][i][0].shape[1] + 25 - SIDE + 1) for i in indices]
    boxes = np.stack([tops, lefts, *[np.full(TRAIN, SIDE)] * 2], axis=1)
    flips = rng.random(TRAIN) < 0.5
    images, _ = collected(beton.batches(indices, boxes, flips))
    for image, index, box, mirrored in zip(
        pixels(beton, images), indices, boxes, flips, strict=True
    ):
        expected = padded(samples["train"][index][0], box)
        assert (image == (expected[:, ::-1] if mirrored else expected)).all()


def test_crop_padding_is_torchvisions_random_crop(squares):
    """At the stored size: pad with zeros, cut the drawn window, then mirror."""
    samples, folder = squares
    data = train_data(folder, resolution=32, padding=4)
    indices = order.epoch_order(TRAIN, 3, 2)[:48]
    draws = order.draws(3, 2, indices, 2, order.Stream.SHIFT)
    mirrored = order.draws(3, 2, indices, 1, order.Stream.FLIP)[:, 0] < 0.5
    found, labels = collected(data.epoch(2))
    assert labels.tolist() == [samples["train"][i][1] for i in indices]
    for image, index, draw, mirror in zip(
        pixels(data, found), indices, draws, mirrored, strict=True
    ):
        canvas = np.zeros((40, 40, 3), np.uint8)
        canvas[4:36, 4:36] = samples["train"][index][0]
        row, column = (int(9 * x) for x in draw)
        expected = canvas[row : row + 32, column : column + 32]
        assert (image == (expected[:, ::-1] if mirror else expected)).all()


def test_a_padded_window_is_resized_like_any_other_crop(folder, samples):
    data = train_data(folder, padding=9, flip=False)
    indices = order.epoch_order(TRAIN, 3, 0)[:48]
    shifts = order.draws(3, 0, indices, 2, order.Stream.SHIFT)
    found, _ = collected(data.epoch(0))
    for image, index, shift in zip(pixels(data, found), indices, shifts, strict=True):
        stored = samples["train"][index][0]
        top, left = (int(19 * x) - 9 for x in shift)
        window = padded(stored, (top, left, *stored.shape[:2]))
        expected = cv2.resize(window, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        error = np.abs(image.astype(int) - expected)
        if folder.name.startswith("raw"):
            assert error.max() <= 1  # another release of OpenCV may round differently
        else:
            assert error.mean() < 6  # what JPEG loses


def test_a_shift_beyond_the_image_is_black(raw):
    beton = Beton(
        raw / "train.beton", resolution=SIDE, batch_size=7, workers=1, device="cpu", padding=100
    )
    boxes = np.array([[-99, 0, 30, 30], [0, 90, 30, 30], [95, -95, 30, 30]])
    images, _ = collected(beton.batches(np.arange(3), boxes))
    assert (pixels(beton, images) == 0).all()


def test_estimation_is_padded_as_training_is(squares):
    _, folder = squares
    plain = collected(train_data(folder, padding=4).estimation(1, 12))
    assert same(plain, collected(train_data(folder, padding=4).estimation(1, 12)))
    assert not same(plain, collected(train_data(folder).estimation(1, 12)))
    black = -torch.tensor([0.2, 0.4, 0.6]) / torch.tensor([0.3, 0.2, 0.1])
    corners = plain[0][:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # (48, 3, 4)
    assert torch.isclose(corners, black[:, None]).all(dim=1).any(dim=1).float().mean() > 0.8


@pytest.mark.parametrize("padding", [0, 3])
def test_padding_does_not_depend_on_workers_or_world_size(folder, padding):
    expected = collected(train_data(folder, padding=padding).epoch(2))
    assert same(collected(train_data(folder, padding=padding, workers=5).epoch(2)), expected)
    assert same(
        collected(train_data(folder, padding=padding).epoch(2, start_step=3)),
        [x[36:] for x in expected],
    )


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    "settings", [RandAugment(), RandAugment(3, 5, "original"), RandAugment(0)], ids=str
)
def test_randaugment_follows_crop_and_flip(folder, monkeypatch, settings, on_device):
    """In the decoding threads or in batches on the device: the same."""
    monkeypatch.setattr(loaders, "_augments_batches", lambda device: on_device)
    plain = train_data(folder)
    images, labels = collected(plain.epoch(2))
    expected = pixels(plain, images)
    indices = order.epoch_order(TRAIN, 3, 2)[:48]
    settings.apply(expected, order.bits(3, 2, indices, 1, order.Stream.PIXELS)[:, 0])
    found, seen = collected(train_data(folder, randaugment=settings).epoch(2))
    assert torch.equal(seen, labels)
    assert (pixels(plain, found) == expected).all()


@pytest.mark.parametrize("on_device", [False, True])
def test_randaugment_does_not_depend_on_how_the_work_is_divided(raw, monkeypatch, on_device):
    monkeypatch.setattr(loaders, "_augments_batches", lambda device: on_device)
    data = train_data(raw, randaugment=RandAugment())
    whole = collected(data.epoch(1))
    assert same(collected(data.epoch(1, start_step=1, steps=2)), [x[12:36] for x in whole])
    for changed in ({"workers": 5}, {"physical_batch": 6}):
        other = train_data(raw, randaugment=RandAugment(), **changed)
        assert same(collected(other.epoch(1)), whole)


def test_estimation_is_augmented_as_training_is(raw):
    plain = collected(train_data(raw).estimation(1, 12))
    data = train_data(raw, randaugment=RandAugment())
    augmented = collected(data.estimation(1, 12))
    assert same(augmented, collected(data.estimation(1, 12)))
    assert torch.equal(augmented[1], plain[1])
    differ = (augmented[0] != plain[0]).flatten(1).any(dim=1)
    assert differ.float().mean() > 0.8
