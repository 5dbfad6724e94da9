"""Models by name."""

from __future__ import annotations

import pytest
import torch

from training import models
from training.config import ConfigError


@pytest.mark.parametrize("name", models.MODELS)
def test_a_model_maps_images_to_classes_and_depends_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    first = models.build(name, classes=7, resolution=32, seed=3)
    torch.manual_seed(2)
    second = models.build(name, classes=7, resolution=32, seed=3)
    other = models.build(name, classes=7, resolution=32, seed=4)
    assert first(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(
        torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )


def test_building_a_model_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    models.build("simplevit-digits", classes=2, resolution=32, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_resnet18_for_cifar_is_the_usual_variant() -> None:
    model = models.build("resnet18-cifar", classes=10, resolution=32, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    sizes = {}
    for name in ("conv1", "maxpool", "layer1", "layer4"):
        getattr(model, name).register_forward_hook(
            lambda module, inputs, output, name=name: sizes.update({name: tuple(output.shape[1:])})
        )
    model(torch.zeros(1, 3, 32, 32))
    assert sizes["conv1"] == sizes["maxpool"] == sizes["layer1"] == (64, 32, 32)
    assert sizes["layer4"] == (512, 4, 4)
    # All convolutions are initialised alike, the replaced one too: sqrt(2 / fan-out).
    assert float(model.conv1.weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'resnet-digit'.*'resnet-digits'"):
        models.build("resnet-digit", classes=2, resolution=32, seed=0)


def test_a_resolution_that_the_model_cannot_take_is_named() -> None:
    with pytest.raises(ConfigError, match=r"simplevit-digits at resolution 30"):
        models.build("simplevit-digits", classes=2, resolution=30, seed=0)
