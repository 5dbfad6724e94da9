"""data.loaders: what arrives is what was asked for, whoever reads it."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data import loaders, order
from data.dataset import Dataset
from tests.support.patience import PATIENCE

from .pictures import SIDE, TRAIN, VAL, collected, pixels, same, train_data, val_data

ROOT = Path(__file__).parents[2]


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


def test_crops_have_torchvisions_shapes_where_none_are_asked_for(raw):
    """Widths from three quarters to four thirds of heights: torchvision's RandomResizedCrop."""
    default, asked = train_data(raw), train_data(raw, ratio=(3 / 4, 4 / 3))
    assert same(collected(default.epoch(1)), collected(asked.epoch(1)))
    other = train_data(raw, ratio=(1, 1))
    assert not same(collected(default.epoch(1)), collected(other.epoch(1)))


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
import atexit, threading
import torch
torch.set_num_threads(3)
# Run last: an epoch's thread that is still there could abort the process.
atexit.register(lambda: print(*(t for t in threading.enumerate() if t.daemon), end=""))
from data.loaders import TrainData, ValData
from data.randaugment import transform
val = ValData({str(raw / "val.beton")!r}, rank=0, world_size=1, batch=6, resolution=8, workers=1)
data = TrainData({str(raw / "train.beton")!r}, total_batch=4, physical_batch=4, rank=0,
                 world_size=1, seed=0, resolution=8, workers=2)
for epoch in range(2):
    for images, labels in data.epoch(epoch):
        assert torch.get_num_threads() == 3, torch.get_num_threads()
list(val)
left_open = TrainData({str(raw / "train.beton")!r}, total_batch=1, physical_batch=1, rank=0,
                      world_size=1, seed=0, resolution=8, workers=2).epoch(3)
next(left_open)
assert not transform.signatures  # nobody waits for the compilation of what isn't asked for
assert torch.get_num_threads() == 3, torch.get_num_threads()
"""
    result = subprocess.run(
        [sys.executable, "-W", "default", "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_numpys_random_state_is_left_alone(raw):
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    list(train_data(raw).epoch(0))
    assert np.random.rand() == expected


def test_the_description_survives_a_round_trip(folder):
    dataset = Dataset.load(folder / "dataset.json")
    assert dataset.dump() == (folder / "dataset.json").read_text()


def test_the_pace_tells_who_waits(folder, monkeypatch):
    """A slow loader is waited for, a slow step is not; the first batch does not count."""
    data, slow, fast = train_data(folder), 0.1, loaders.EpochIterator.run_pipeline

    def slowly(self, *args):
        time.sleep(slow)
        return fast(self, *args)

    for _ in data.epoch(0):
        time.sleep(slow)
    assert data.pace.images == 11 * 4
    ahead = data.pace.waited
    monkeypatch.setattr(loaders.EpochIterator, "run_pipeline", slowly)
    for _ in data.epoch(0):
        pass
    assert data.pace.images == 11 * 4 and data.pace.seconds > 11 * slow
    assert data.pace.waited > max(ahead, 11 * slow / 2)
    list(data.estimation(0, 2))
    assert data.pace.images == 11 * 4, "of the epoch"
