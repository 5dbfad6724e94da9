"""data.order: who reads what is a pure function of its arguments."""

import hashlib

import numpy as np
import pytest

from data.order import (
    bits,
    draws,
    epoch_order,
    label_counts,
    label_shards,
    log_dirichlet,
    shard,
    shard_order,
    validation_shard,
)


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    first = epoch_order(1000, 3, 5)
    assert first.dtype == np.int64
    assert (np.sort(first) == np.arange(1000)).all()
    assert (first == epoch_order(1000, 3, 5)).all()
    assert (first != epoch_order(1000, 3, 6)).any()
    assert (first != epoch_order(1000, 4, 5)).any()


def test_orders_and_draws_never_change():
    """Recorded values: a change would make old runs impossible to repeat or resume."""
    assert epoch_order(8, 1, 2).tolist() == ORDER
    assert bits(1, 2, np.array([3, 4]), 2, 1).tolist() == BITS


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_are_disjoint_and_their_union_is_the_global_batch(world_size):
    n, batch = 101, 12
    order = epoch_order(n, 0, 0)
    shards = [
        shard(order, rank=rank, world_size=world_size, total_batch=batch).reshape(8, -1)
        for rank in range(world_size)
    ]
    together = np.concatenate(shards, axis=1)
    for step in range(8):
        assert (together[step] == order[step * batch : (step + 1) * batch]).all()
    assert len(np.unique(together)) == 96


def test_start_step_and_steps_cut_the_epoch():
    order = epoch_order(101, 0, 0)
    place = {"rank": 1, "world_size": 3, "total_batch": 12}
    whole = shard(order, **place)
    assert (shard(order, **place, start_step=3) == whole[3 * 4 :]).all()
    assert (shard(order, **place, start_step=3, steps=2) == whole[3 * 4 : 5 * 4]).all()
    assert len(shard(order, **place, start_step=8)) == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"total_batch": 10}, "10.*3 ranks"),
        ({"total_batch": 0}, "0"),
        ({"total_batch": 102}, "102.*101"),
        ({"rank": 3}, "rank 3.*3"),
        ({"start_step": 9}, "9.*8 steps"),
        ({"start_step": 5, "steps": 4}, "5 to 9.*8 steps"),
        ({"start_step": -1}, "-1"),
    ],
)
def test_shard_names_what_does_not_fit(changed, named):
    arguments = {"rank": 0, "world_size": 3, "total_batch": 12} | changed
    with pytest.raises(ValueError, match=named):
        shard(np.arange(101), **arguments)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("n", [0, 3, 23])
def test_validation_shards_hold_each_image_once(n, world_size):
    parts = [validation_shard(n, rank, world_size) for rank in range(world_size)]
    assert np.concatenate(parts).tolist() == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_draws_depend_on_the_sample_and_not_on_who_asks():
    indices = np.arange(500)
    together = draws(7, 3, indices, 6, stream=1)
    assert together.shape == (500, 6)
    shuffled = epoch_order(500, 0, 0)
    assert (draws(7, 3, shuffled, 6, stream=1) == together[shuffled]).all()
    assert (draws(7, 3, indices[123:124], 6, stream=1)[0] == together[123]).all()
    assert (draws(7, 3, indices, 2, stream=1) == together[:, :2]).all()


def test_draws_are_uniform_and_differ_in_every_argument():
    indices = np.arange(20_000)
    base = draws(7, 3, indices, 4, stream=1)
    assert base.min() >= 0 and base.max() < 1
    assert np.abs(base.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(base.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(base[:-1, 0], base[1:, 0])[0, 1]) < 0.03
    for other in ((8, 3, 1), (7, 4, 1), (7, 3, 2)):
        seed, epoch, stream = other
        changed = draws(seed, epoch, indices, 4, stream)
        assert (changed == base).mean() < 1e-3
        assert abs(np.corrcoef(changed[:, 0], base[:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (5, -1, 0), (5, 0, -1)])
def test_negative_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="-1"):
        epoch_order(*arguments)


def spread(counts):
    """How skewed shards are: their class mixes' mean total variation from that of all samples."""
    mixes = counts / counts.sum(axis=1, keepdims=True)
    return 0.5 * np.abs(mixes - counts.sum(axis=0) / counts.sum()).sum(axis=1).mean()


@pytest.mark.parametrize("concentration", [1e-6, 0.01, 0.6, 30.0, 1e6])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_skewed_shards_are_disjoint_and_of_equal_size(world_size, concentration):
    labels = (np.arange(605) % 11) ** 2 // 20  # six classes of different sizes
    shards = label_shards(labels, world_size, concentration, seed=5)
    assert shards.dtype == np.int64 and shards.shape == (world_size, 605 // world_size)
    assert len(np.unique(shards)) == shards.size
    assert shards.min() >= 0 and shards.max() < 605
    assert (np.diff(shards, axis=1) > 0).all()


@pytest.mark.parametrize("concentration", [0.01, 0.6, 30.0])
def test_a_shard_has_the_classes_that_were_counted(concentration):
    labels = np.array([9, 4, 4, 2, 4, 9, 2, 4] * 40)
    totals = np.array([80, 160, 80])
    seeds = bits(3, 0, np.array([0]), 2, 6)[0].tolist()
    counts = label_counts(totals, 4, concentration, seeds[0])
    assert (counts.sum(axis=1) == 80).all() and (counts.sum(axis=0) == totals).all()
    for row, own in zip(counts, label_shards(labels, 4, concentration, seed=3), strict=True):
        assert [(labels[own] == name).sum() for name in (2, 4, 9)] == row.tolist()


def test_shards_are_more_skewed_at_smaller_concentrations():
    totals = np.full(10, 500)
    found = [
        np.mean([spread(label_counts(totals, 8, concentration, seed)) for seed in range(20)])
        for concentration in (0.05, 0.6, 6, 60, 1e6)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.6 and found[-1] < 0.05


@pytest.mark.slow
def test_no_rank_is_left_with_what_the_others_did_not_draw():
    totals = np.full(10, 500)
    counts = np.stack([label_counts(totals, 8, 6.0, seed) for seed in range(200)])
    mixes = np.abs(counts / 625 - 0.1).sum(axis=2).mean(axis=0)  # by rank
    assert mixes.max() / mixes.min() < 1.2


def test_samples_of_a_class_are_shared_out_at_random():
    labels = np.zeros(4000, int)
    places = label_shards(labels, 4, 1.0, seed=0).mean(axis=1)
    assert np.abs(places - 2000).max() < 150


def test_log_dirichlet_has_the_distributions_moments():
    shape = np.array([0.2, 0.5, 2.0, 0.3])
    logs = log_dirichlet(shape, 100_000, np.random.RandomState(0))
    draws = np.exp(logs - logs.max(axis=1, keepdims=True))
    draws /= draws.sum(axis=1, keepdims=True)
    p = shape / shape.sum()
    assert np.abs(draws.mean(axis=0) - p).max() < 0.005
    assert np.abs(draws.var(axis=0) - p * (1 - p) / (shape.sum() + 1)).max() < 0.005


def test_log_dirichlet_survives_parameters_that_underflow():
    logs = log_dirichlet(np.full(10, 1e-9), 3000, np.random.RandomState(0))
    assert np.isfinite(logs).all()
    largest = np.bincount(logs.argmax(axis=1), minlength=10)  # each class as often as the others
    assert largest.min() > 200
    ordered = np.sort(logs, axis=1)
    assert ((ordered[:, -1] - ordered[:, -2]) > 50).mean() > 0.99


def test_skewed_shards_never_change():
    """Recorded values: a change would make old runs impossible to repeat or resume."""
    labels = np.arange(1000) % 10
    shards = label_shards(labels, 8, 0.6, seed=1)
    assert label_counts(np.full(3, 40), 4, 0.6, seed=1).tolist() == COUNTS
    assert hashlib.sha256(shards.astype("<i8").tobytes()).hexdigest() == SHARDS
    assert shard_order(shards[2], 2, 1, 0)[:6].tolist() == OWN
    assert (shards == label_shards(labels, 8, 0.6, seed=1)).all()
    assert (shards != label_shards(labels, 8, 0.6, seed=2)).any()


def test_an_own_epoch_is_a_permutation_of_seed_epoch_and_rank():
    own = np.arange(3, 903, 3)
    first = shard_order(own, 2, 7, 5)
    assert (np.sort(first) == own).all()
    assert (first == shard_order(own, 2, 7, 5)).all()
    for other in ((1, 7, 5), (2, 8, 5), (2, 7, 6)):
        assert (first != shard_order(own, *other)).mean() > 0.9


@pytest.mark.parametrize("concentration", [0.0, -1.0, 1e-7, 1e7, float("nan"), float("inf")])
def test_a_concentration_out_of_range_is_refused(concentration):
    with pytest.raises(ValueError, match=r"concentration.*got"):
        label_shards(np.arange(10), 2, concentration, seed=0)


def test_shards_for_nobody_are_refused():
    with pytest.raises(ValueError, match=r"shards.*got 0"):
        label_shards(np.arange(10), 0, 1.0, seed=0)


ORDER = [7, 1, 3, 0, 4, 2, 6, 5]
BITS = [[1830130602068100773, 6342056128980281955], [5188883459514840386, 4121653721653380497]]
COUNTS = [[13, 7, 10], [3, 18, 9], [12, 6, 12], [12, 9, 9]]
SHARDS = "3d2289780c7d73a697d21d760e92e42bbca891014d26a8ea979509430ba7e1b6"
OWN = [5, 365, 375, 185, 708, 348]
