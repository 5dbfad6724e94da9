"""data.order: who reads what is a pure function of its arguments."""

import numpy as np
import pytest

from data.order import bits, draws, epoch_order, shard, validation_shard


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


ORDER = [7, 1, 3, 0, 4, 2, 6, 5]
BITS = [[1830130602068100773, 6342056128980281955], [5188883459514840386, 4121653721653380497]]
