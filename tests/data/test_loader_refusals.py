"""data.loaders: requests that cannot be, and files that are not what was written, are refused."""

import numpy as np
import pytest

from data.dataset import DataError
from data.loaders import Beton, ValData

from .pictures import SIDE, VAL, collected, train_data, val_data


@pytest.mark.parametrize(
    ("indices", "box", "named"),
    [
        ([50], [0, 0, 5, 5], "50 images"),
        ([-1], [0, 0, 5, 5], "50 images"),
        ([3, 3], [0, 0, 5, 5], "twice"),
        ([3], [0, 0, 5, 100], "image 3"),
        ([3], [-1, 0, 5, 5], "image 3"),
        ([3], [0, 0, 0, 5], "image 3"),
    ],
)
def test_impossible_requests_are_refused(raw, indices, box, named):
    beton = Beton(raw / "train.beton", resolution=SIDE, batch_size=7, workers=1, device="cpu")
    with pytest.raises(ValueError, match=named):
        beton.batches(np.array(indices), np.array([box] * len(indices)))


def test_estimation_from_nothing_is_refused(raw):
    data = train_data(raw, world_size=3, physical_batch=2)
    with pytest.raises(ValueError, match=r"2 batches.*3 ranks"):
        data.estimation(0, 2)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"physical_batch": 5}, "local batch 12.*physical batch 5"),
        ({"world_size": 5}, "12.*5 ranks"),
        ({"total_batch": 60}, "60.*50"),
        ({"rank": 1}, "rank 1"),
        ({"workers": 0}, "workers"),
        ({"resolution": 0}, "resolution"),
        ({"physical_batch": 0}, "batch size"),
        ({"padding": -1}, "padding.*-1"),
        ({"total_batch": 51, "physical_batch": 1, "world_size": 3, "label_skew": 1.0}, "51.*50"),
        ({"label_skew": -1.0}, "concentration.*-1"),
        ({"rank": 3, "world_size": 3, "label_skew": 1.0}, "rank 3"),
    ],
)
def test_what_does_not_fit_together_is_named(raw, changed, named):
    with pytest.raises(ValueError, match=named):
        train_data(raw, **changed)


def test_crop_ratio_is_checked(raw):
    with pytest.raises(ValueError, match=r"1\.5"):
        val_data(raw, crop_ratio=1.5)


@pytest.fixture
def copy(raw, tmp_path):
    for file in raw.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refusal(folder):
    with pytest.raises(DataError) as error:
        val_data(folder)
    message = str(error.value)
    assert str(folder) in message and "python -m data.write" in message and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["val.beton", "dataset.json"])
def test_missing_files_are_named(copy, name):
    (copy / name).unlink()
    assert f"{name} is missing" in refusal(copy)


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}', '{"files": {"val.beton": 3}}'])
def test_a_broken_description_is_refused(copy, content):
    (copy / "dataset.json").write_text(content)
    assert "dataset.json" in refusal(copy)


def test_a_file_that_is_not_described_is_refused(copy):
    (copy / "val.beton").rename(copy / "other.beton")
    with pytest.raises(DataError, match=r"other.beton isn't described"):
        ValData(copy / "other.beton", rank=0, world_size=1, batch=6, resolution=8)


@pytest.mark.parametrize("size", [0, 10, 5000, 3_000_000, -1])
def test_truncated_files_are_refused(copy, size):
    content = (copy / "val.beton").read_bytes()
    (copy / "val.beton").write_bytes(content[:size])
    assert "bytes instead of" in refusal(copy)


def test_flipped_bits_are_found_in_small_files(copy):
    content = bytearray((copy / "val.beton").read_bytes())
    content[2**21 + 5] ^= 4
    (copy / "val.beton").write_bytes(content)
    assert "checksum" in refusal(copy)


@pytest.mark.parametrize("place", [0, 2, 8, 16, 24, 2100, 2110, -8, -20])
def test_tables_are_checked_in_files_too_large_for_a_checksum(copy, monkeypatch, place):
    """Version, counts, addresses and sizes: whatever is wrong, no wild pointer is followed."""
    monkeypatch.setattr("data.dataset.CHECKSUM_LIMIT", 0)
    content = bytearray((copy / "val.beton").read_bytes())
    content[place] ^= 0x41
    (copy / "val.beton").write_bytes(content)
    try:
        assert len(collected(val_data(copy))[1]) == VAL
    except DataError as error:
        assert str(copy) in str(error)


def test_an_undecodable_jpeg_is_reported(jpg, tmp_path, monkeypatch):
    monkeypatch.setattr("data.dataset.CHECKSUM_LIMIT", 0)
    for file in jpg.iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "val.beton":
            content[2**21 : 2**21 + 4] = bytes(4)  # the first image's first bytes
        (tmp_path / file.name).write_bytes(content)
    with pytest.raises(DataError, match="image 0"):
        list(val_data(tmp_path))
