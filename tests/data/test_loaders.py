"""data.loaders: what arrives is what was asked for, whoever reads it."""

import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data import loaders, order, write
from data.dataset import DataError, Dataset
from data.loaders import Beton, TrainData, ValData
from data.randaugment import RandAugment

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="session")
def samples():
    return {"train": pictures(TRAIN, 0), "val": pictures(VAL, 1)}


def write_pictures(samples, out, mode):
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
    return request.getfixturevalue(request.param)


def train_data(folder, **changed):
    arguments = {
        "total_batch": 12, "physical_batch": 4, "rank": 0, "world_size": 1, "seed": 3,
        "resolution": SIDE, "workers": 2,
    }  # fmt: skip
    return TrainData(folder / "train.beton", **(arguments | changed))


def val_data(folder, **changed):
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
    assert torch.allclose(values, values.round(), atol=1e-3)
    return values.round().to(torch.uint8).numpy()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_have_the_promised_form(folder):
    data = train_data(folder)
    assert (data.images, data.num_classes, data.steps_per_epoch, data.micro_batches) == (
        50,
        5,
        4,
        3,
    )
    batches = list(data.epoch(0))
    assert len(batches) == 12
    for images, labels in batches:
        assert images.shape == (4, 3, SIDE, SIDE) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (4,) and labels.dtype == torch.int64


def test_batches_own_their_memory(folder):
    """FFCV fills its five buffers again and again; what was yielded must not change."""
    kept, copies = [], []
    for batch in train_data(folder).epoch(0):
        kept.append(batch)
        copies.append([x.clone() for x in batch])
    assert len(kept) > loaders.BATCHES_AHEAD + 2
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))


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


def test_epochs_repeat_and_differ(folder):
    data = train_data(folder)
    assert same(collected(data.epoch(1)), collected(data.epoch(1)))
    assert same(collected(data.epoch(1)), collected(train_data(folder).epoch(1)))
    assert not same(collected(data.epoch(1)), collected(data.epoch(2)))
    assert not same(collected(data.epoch(1)), collected(train_data(folder, seed=4).epoch(1)))


@pytest.mark.parametrize("changed", [{"workers": 1}, {"workers": 5}, {"physical_batch": 6}])
def test_images_do_not_depend_on_workers_or_micro_batches(folder, changed):
    expected = collected(train_data(folder).epoch(2))
    assert same(collected(train_data(folder, **changed).epoch(2)), expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_world_size_sees_the_same_images_at_each_step(folder, world_size):
    whole = collected(train_data(folder).epoch(1))
    local = 12 // world_size
    ranks = [
        collected(train_data(folder, rank=r, world_size=world_size, physical_batch=2).epoch(1))
        for r in range(world_size)
    ]
    for expected, *parts in zip(whole, *ranks, strict=True):
        steps = [part.view(4, local, *part.shape[1:]) for part in parts]
        assert torch.equal(torch.cat(steps, dim=1).flatten(0, 1), expected)


def test_a_resumed_epoch_is_the_tail_of_the_whole_one(folder):
    data = train_data(folder)
    whole = collected(data.epoch(1))
    assert same(collected(data.epoch(1, start_step=1)), [x[12:] for x in whole])
    assert same(collected(data.epoch(1, start_step=1, steps=2)), [x[12:36] for x in whole])
    assert list(data.epoch(1, start_step=4)) == []


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


@pytest.fixture(scope="session")
def squares(samples, tmp_path_factory):
    """Both .beton files with images of one size, as CIFAR's are."""
    resized = {part: [(cv2.resize(x, (32, 32)), y) for x, y in samples[part]] for part in samples}
    return resized, write_pictures(resized, tmp_path_factory.mktemp("squares"), "raw")


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


def owned(folder, rank, **changed):
    """Three ranks with shards of 16 images and batches of 4."""
    settings = {"world_size": 3, "label_skew": 0.6, "flip": False, "scale": (1, 1), "ratio": (1, 1)}
    return train_data(folder, rank=rank, **(settings | changed))


def test_each_rank_goes_through_its_own_shard(squares):
    samples, folder = squares
    labels = np.array([label for _, label in samples["train"]])
    shards = order.label_shards(labels, 3, 0.6, seed=3)
    resized = [cv2.resize(x, (SIDE, SIDE), interpolation=cv2.INTER_AREA).tobytes()
               for x, _ in samples["train"]]  # fmt: skip
    for rank, shard in enumerate(shards):
        data = owned(folder, rank)
        assert (data.images, data.steps_per_epoch, data.micro_batches) == (50, 4, 1)
        for epoch in range(3):
            images, found = collected(data.epoch(epoch))
            seen = order.shard_order(shard, rank, 3, epoch)
            assert sorted(seen) == sorted(shard)
            assert found.tolist() == labels[seen].tolist()
            assert [x.tobytes() for x in pixels(data, images)] == [resized[i] for i in seen]


def test_an_own_epoch_resumes_where_it_stopped(folder):
    data = owned(folder, 1, flip=True, scale=(0.08, 1), ratio=(3 / 4, 4 / 3))
    whole = collected(data.epoch(2))
    assert same(collected(data.epoch(2, start_step=1)), [x[4:] for x in whole])
    assert same(collected(data.epoch(2, start_step=1, steps=2)), [x[4:12] for x in whole])
    assert list(data.epoch(2, start_step=4)) == []
    with pytest.raises(ValueError, match="5 do not lie in an epoch of 4 steps"):
        data.epoch(2, steps=5)


def test_estimation_draws_from_all_images_whatever_the_shards(raw):
    for rank in range(3):
        plain = owned(raw, rank, label_skew=0.0).estimation(1, 12)
        assert same(collected(owned(raw, rank).estimation(1, 12)), collected(plain))


def test_one_rank_owns_all_images(folder):
    data = train_data(folder, total_batch=10, physical_batch=5, label_skew=0.1)
    _, labels = collected(data.epoch(0))
    assert sorted(labels.tolist()) == sorted(i % 5 for i in range(TRAIN))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_validation_sees_every_image_once(folder, world_size):
    parts = [val_data(folder, rank=r, world_size=world_size) for r in range(world_size)]
    assert len(parts[0]) == parts[0].images == VAL
    images, labels = collected([batch for part in parts for batch in part])
    assert same((images, labels), collected(val_data(folder, batch=23)))
    assert len(labels) == VAL


def test_a_rank_without_validation_images_has_no_batches(raw):
    sizes = [sum(len(y) for _, y in val_data(raw, rank=r, world_size=30)) for r in range(30)]
    assert sum(sizes) == VAL and min(sizes) == 0


@pytest.mark.parametrize("batches", [5, 30])
@pytest.mark.parametrize("world_size", [2, 3])
def test_estimation_is_split_over_ranks(raw, batches, world_size):
    """30 micro-batches of 4 are two and a half passes through the file."""
    batch = {"total_batch": 4 * world_size, "world_size": world_size}
    whole = list(train_data(raw).estimation(1, batches))
    assert len(whole) == batches
    for rank in range(world_size):
        part = train_data(raw, rank=rank, **batch).estimation(1, batches)
        expected = whole[rank::world_size]
        assert all(same(a, b) for a, b in zip(part, expected, strict=True))


def test_estimation_has_its_own_stream(folder):
    data = train_data(folder)
    estimate = collected(data.estimation(1, 12))
    assert same(estimate, collected(data.estimation(1, 12)))
    assert not same(estimate, collected(data.estimation(2, 12)))
    assert not same(estimate, collected(data.epoch(1)))


def test_estimation_from_nothing_is_refused(raw):
    data = train_data(raw, world_size=3, physical_batch=2)
    with pytest.raises(ValueError, match=r"2 batches.*3 ranks"):
        data.estimation(0, 2)


def test_interleaved_iterators_do_not_disturb_each_other(folder):
    data, val = train_data(folder), val_data(folder)
    first, second = collected(data.epoch(1)), collected(data.epoch(2))
    pairs = list(zip(data.epoch(1), data.epoch(2), strict=True))
    assert same(collected([a for a, _ in pairs]), first)
    assert same(collected([b for _, b in pairs]), second)
    images = collected(val)
    for _ in data.epoch(1):
        assert same(collected(val), images)


def test_abandoned_iterators_leave_no_threads(folder):
    data = train_data(folder, total_batch=1, physical_batch=1)
    expected = collected(data.epoch(0))
    for step in range(8):
        for count, _ in enumerate(data.epoch(step)):
            if count == step:
                break
        assert not any(isinstance(thread, loaders._Epoch) for thread in threading.enumerate())
    assert same(collected(data.epoch(0)), expected)


def test_compiled_augmentations_get_a_seed_per_sample(raw, monkeypatch):
    seen = {}

    def record(indices, samples, *_):
        seen.update(zip(indices.tolist(), samples["seed"][indices].tolist(), strict=True))
        return -1

    data = train_data(raw)
    monkeypatch.setattr("data.augment.decode_samples", record)
    list(data.epoch(2))
    indices = np.array(sorted(seen))
    assert len(indices) == 48
    expected = order.bits(3, 2, indices, 1, order.Stream.PIXELS)[:, 0]
    assert [seen[i] for i in indices.tolist()] == expected.tolist()


def test_an_error_in_the_decoding_thread_reaches_the_reader(raw, monkeypatch):
    data = train_data(raw)

    def fail(*_):
        raise MemoryError("no memory for images")

    monkeypatch.setattr("data.augment.decode_samples", fail)
    with pytest.raises(MemoryError, match="no memory for images"):
        list(data.epoch(0))


@pytest.mark.slow
def test_torch_keeps_its_threads_and_the_process_ends_quietly(raw):
    program = f"""
import torch
torch.set_num_threads(3)
from data.loaders import TrainData, ValData
from data.randaugment import transform
val = ValData({str(raw / "val.beton")!r}, rank=0, world_size=1, batch=6, resolution=8, workers=1)
data = TrainData({str(raw / "train.beton")!r}, total_batch=4, physical_batch=4, rank=0,
                 world_size=1, seed=0, resolution=8, workers=2)
for epoch in range(2):
    for images, labels in data.epoch(epoch):
        assert torch.get_num_threads() == 3, torch.get_num_threads()
list(val)
left_open = data.epoch(3)
next(left_open)
assert not transform.signatures  # nobody waits for the compilation of what isn't asked for
assert torch.get_num_threads() == 3, torch.get_num_threads()
"""
    result = subprocess.run(
        [sys.executable, "-W", "default", "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_numpys_random_state_is_left_alone(raw):
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    list(train_data(raw).epoch(0))
    assert np.random.rand() == expected


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


def test_the_description_survives_a_round_trip(folder):
    dataset = Dataset.load(folder / "dataset.json")
    assert dataset.dump() == (folder / "dataset.json").read_text()
