"""Methods that a recipe switches on: each does what its equation says."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from tests.support.patience import PATIENCE
from training import models
from training.checks import with_fitting_batches
from training.methods import Ema, Mixup, ProgressiveResizing
from training.settings import load
from training.values import ConfigError

BATCH, CLASSES = 16, 5


def global_batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 4, 4, generator=random)
    return images, torch.randint(CLASSES, (BATCH,), generator=random)


def mixed(replicas: int, physical: int, step: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """What all replicas together see of the global batch."""
    images, labels = global_batch()
    share = BATCH // replicas
    parts = []
    for rank in range(replicas):
        first = rank * share
        mixup = Mixup(0.4, seed=7, classes=CLASSES, first=first, physical_batch=physical)
        for micro_step, begin in enumerate(range(first, first + share, physical)):
            batch = images[begin : begin + physical], labels[begin : begin + physical]
            parts.append(mixup(batch, step, micro_step))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


@pytest.mark.slow
def test_importing_the_methods_leaves_signals_alone() -> None:
    """composer takes over those that end a process."""
    imported = "import signal; from training import methods; methods.composer()"
    command = [sys.executable, "-c", f"{imported}; signal.raise_signal(signal.SIGTERM)"]
    process = subprocess.run(command, timeout=PATIENCE, check=False)
    assert process.returncode == -signal.SIGTERM


def test_mixup_mixes_neighbours_and_their_labels() -> None:
    images, labels = global_batch()
    mixup = Mixup(0.4, seed=7, classes=CLASSES, first=0, physical_batch=BATCH)
    w = torch.from_numpy(mixup.weights(3, np.arange(BATCH)))
    got_images, got_targets = mixup((images, labels), 3, 0)
    one_hot = functional.one_hot(labels, CLASSES).double()
    for i in range(BATCH):
        j = i + 1 if i % 2 == 0 else i - 1
        image = (1 - w[i]) * images[i].double() + w[i] * images[j].double()
        target = (1 - w[i]) * one_hot[i] + w[i] * one_hot[j]
        torch.testing.assert_close(got_images[i].double(), image, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got_targets[i].double(), target, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("replicas", "physical"), [(1, 4), (2, 8), (2, 2), (4, 4)])
def test_what_a_step_sees_does_not_depend_on_replicas_and_micro_steps(replicas, physical) -> None:
    whole, some = mixed(1, BATCH), mixed(replicas, physical)
    assert torch.equal(whole[0], some[0]) and torch.equal(whole[1], some[1])


def test_mixups_draws_are_of_seed_step_and_position() -> None:
    def weights(seed: int = 7, step: int = 3) -> np.ndarray:
        mixup = Mixup(0.2, seed=seed, classes=2, first=0, physical_batch=2)
        return mixup.weights(step, np.arange(64))

    assert (weights() == weights()).all()
    assert (weights() != weights(step=4)).any() and (weights() != weights(seed=8)).any()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixups_weight_is_the_smaller_part_of_a_beta_variable(alpha: float) -> None:
    mixup = Mixup(alpha, seed=1, classes=2, first=0, physical_batch=2)
    weights = mixup.weights(0, np.arange(20_000))
    assert weights.min() >= 0 and weights.max() <= 0.5
    # P(min(λ, 1 - λ) <= w) = 2 P(λ <= w), for λ and 1 - λ have the same distribution.
    assert stats.kstest(weights, lambda w: 2 * stats.beta.cdf(w, alpha, alpha)).pvalue > 1e-3


def test_mixup_refuses_micro_batches_that_leave_one_without_a_neighbour() -> None:
    config = load(["--mixup", "0.2", "--total-batch-size", "12", "--physical-batch-size", "3"])
    with pytest.raises(ConfigError, match="physical_batch_size is 3"):
        with_fitting_batches(config, replicas=2)


def test_progressive_resizing_grows_linearly_and_ends_whole() -> None:
    resize = ProgressiveResizing(0.5, 0.2, 224, total_steps=100)
    sides = [resize.side(step) for step in range(100)]
    assert sides[0] == 112 and sides[40] == 168
    assert all(side % 4 == 0 for side in sides) and sides == sorted(sides)
    assert set(sides[80:]) == {224} and sides[70] < 224
    images = torch.arange(3.0 * 224 * 224).reshape(1, 3, 224, 224)
    for step in range(80):
        small, labels = resize((images, torch.tensor([1])), step, 0)
        side = sides[step]
        assert small.shape == (1, 3, side, side) and labels.tolist() == [1]
        nearest = (torch.arange(side) * 224 // side).tolist()
        chosen = images[:, :, nearest][:, :, :, nearest]
        assert (small - chosen).abs().max() <= 225, "the nearest pixel, or where it ties, the next"
        assert small.shape == (1, 3, side, side) and labels.tolist() == [1]
        if 224 % side == 0:
            assert torch.equal(small, images[:, :, nearest][:, :, :, nearest])
    assert resize((images, torch.tensor([1])), 80, 0)[0] is images


def test_the_moving_average_is_per_step_however_long_rounds_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema, expected, before = Ema(model, 0.9), model[0].weight.detach().double().clone(), 0
    for step in (1, 4, 6, 20):
        with torch.no_grad():
            model[0].weight.normal_()
        ema.update(step)
        kept = 0.9 ** (step - before)
        expected = kept * expected + (1 - kept) * model[0].weight.detach().double()
        before = step
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.in_place():
        held = model[0].weight.detach().double()
        torch.testing.assert_close(held, expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())

    late = Ema(model, 0.9)
    late.start_at(1000)
    kept = 0.9**4 * model[0].weight.detach().double()
    with torch.no_grad():
        model[0].weight.zero_()
    assert late.update(1004) and not late.update(1004)
    average = late.state_dict()["parameters"]["0.weight"].double()
    torch.testing.assert_close(average, kept, rtol=1e-6, atol=1e-7)

    again = Ema(model, 0.9)
    again.load_state_dict(ema.state_dict())
    for average in (ema, again):
        average.update(25)
    ours, theirs = (x.state_dict()["parameters"] for x in (ema, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("change", ["blurpool", "squeeze_excite"])
def test_a_change_to_the_model_shows_or_is_refused(change: str) -> None:
    shape = {"classes": 10, "resolution": 32, "seed": 0}
    changed = models.build("resnet18", **shape, **{change: True})
    kinds = {type(module).__name__ for module in changed.modules()}
    assert kinds & {"BlurConv2d", "SqueezeExciteConv2d"}
    assert changed(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ConfigError, match=change):
        models.build("simplevit-digits", **shape, **{change: True})
