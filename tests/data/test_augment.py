"""data.augment: boxes and flips are pure functions of draws."""

import math

import numpy as np
import pytest

from data.augment import (
    ATTEMPTS,
    CROP_DRAWS,
    center_crop,
    flip,
    padded_crop,
    random_resized_crop,
)

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def scalar_crop(draws, height, width, scale, ratio):
    """torchvision's get_params, statement by statement, for one image."""
    draws = iter(draws)
    area = height * width
    log_ratio = [math.log(ratio[0]), math.log(ratio[1])]
    for _ in range(ATTEMPTS):
        share, aspect, top, left = (next(draws) for _ in range(4))
        target_area = area * (scale[0] + share * (scale[1] - scale[0]))
        aspect_ratio = math.exp(log_ratio[0] + aspect * (log_ratio[1] - log_ratio[0]))
        w = round(math.sqrt(target_area * aspect_ratio))
        h = round(math.sqrt(target_area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(top * (height - h + 1)), int(left * (width - w + 1)), h, w]
    in_ratio = width / height
    if in_ratio < min(ratio):
        w, h = width, round(width / min(ratio))
    elif in_ratio > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.fixture(scope="module")
def images():
    """Draws and sizes, among them images so long that no attempt fits."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 400, (3000, 2)).astype(np.uint16)
    sizes[:200] = [300, 20]
    sizes[200:400] = [20, 300]
    return rng.random((3000, CROP_DRAWS)), sizes[:, 0], sizes[:, 1]


@pytest.mark.parametrize("scale", [SCALE, (0.9, 1.0)])
def test_random_resized_crop_equals_torchvisions_algorithm(images, scale):
    draws, heights, widths = images
    boxes = random_resized_crop(draws, heights, widths, scale, RATIO)
    for i in range(len(draws)):
        expected = scalar_crop(draws[i], int(heights[i]), int(widths[i]), scale, RATIO)
        assert boxes[i].tolist() == expected


def test_random_boxes_lie_inside_even_at_the_largest_draw(images):
    draws, heights, widths = images
    for values in (draws, np.full_like(draws, np.nextafter(1, 0)), np.zeros_like(draws)):
        top, left, h, w = random_resized_crop(values, heights, widths, SCALE, RATIO).T
        assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
        assert (top + h <= heights).all() and (left + w <= widths).all()


def test_whole_image_when_scale_and_ratio_leave_no_choice():
    side = np.full(5, 32)
    boxes = random_resized_crop(np.random.rand(5, CROP_DRAWS), side, side, (1, 1), (1, 1))
    assert (boxes == [0, 0, 32, 32]).all()


def test_padded_crops_have_the_images_size_and_every_shift_equally_often():
    draws = np.random.default_rng(0).random((90_000, 2))
    heights, widths = np.full(90_000, 32, np.uint16), np.full(90_000, 48, np.uint16)
    top, left, h, w = padded_crop(draws, heights, widths, 4).T
    assert (h == 32).all() and (w == 48).all()
    for shift in (top, left):
        assert (shift.min(), shift.max()) == (-4, 4)
        assert np.abs(np.bincount(shift + 4) / 10_000 - 1).max() < 0.05


def test_padded_crops_stay_in_the_padding_at_the_extreme_draws():
    size = np.array([32, 32])
    draws = np.array([[0.0, 0.0], [np.nextafter(1, 0)] * 2])
    for padding in (1, 4, 65_535):
        shifts = padded_crop(draws, size, size, padding)[:, :2]
        assert shifts.tolist() == [[-padding, -padding], [padding, padding]]


def test_center_crop_is_ffcvs():
    boxes = center_crop(np.array([256, 300, 480]), np.array([256, 400, 333]), 224 / 256)
    assert boxes.tolist() == [[16, 16, 224, 224], [19, 69, 262, 262], [94, 21, 291, 291]]
    assert center_crop(np.array([1]), np.array([3]), 0.5).tolist() == [[0, 1, 1, 1]]


def test_half_of_the_draws_flip():
    assert flip(np.array([0.0, 0.499, 0.5, 0.999])).tolist() == [True, True, False, False]
