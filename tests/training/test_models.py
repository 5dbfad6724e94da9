"""Models by name."""

from __future__ import annotations

import pytest
import torch

from training import models
from training.config import ConfigError

# One of each kind: the larger ones differ in numbers only.
LARGE = {"simplevit-s16", "simplevit-b16", *models.TORCHVISION[1:]}


@pytest.mark.parametrize("name", [name for name in models.MODELS if name not in LARGE])
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


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # torchvision's documentation; for SimpleViT, the sum over its layers written out below
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        ("simplevit-ti16", None),
        ("simplevit-s16", None),
        ("simplevit-b16", None),
    ],
)
def test_imagenet_models_have_their_published_size(name: str, millions: int | None) -> None:
    with torch.device("meta"):
        model = models.build(name, classes=1000, resolution=224, seed=0)
    width = {"simplevit-ti16": 192, "simplevit-s16": 384, "simplevit-b16": 768}.get(name)
    if width:
        patch = 16 * 16 * 3
        embedding = 2 * patch + (patch + 1) * width + 2 * width
        attention = 2 * width + width * 3 * width + width * width
        mlp = 2 * width + (width + 1) * 4 * width + (4 * width + 1) * width
        head = (width + 1) * 1000
        millions = embedding + 12 * (attention + mlp) + 2 * width + head
    assert sum(p.numel() for p in model.parameters()) == millions


def test_a_vit_leaves_nothing_behind_when_it_moves() -> None:
    model = models.build("simplevit-digits", classes=10, resolution=32, seed=0)
    assert "pos_embedding" in dict(model.named_buffers())
    assert "pos_embedding" not in model.state_dict(), "files of weights stay vit_pytorch's"


def test_channels_last_weights_are_in_that_format() -> None:
    model = models.build("resnet18", classes=10, resolution=32, seed=0, channels_last=True)
    plain = models.build("resnet18", classes=10, resolution=32, seed=0)
    weight = model.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert torch.equal(weight, plain.layer1[0].conv1.weight)
