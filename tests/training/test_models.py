"""Models by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import profile

from training import checks, models, optimizers
from training.lr import Schedule
from training.settings import load
from training.values import ConfigError

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


@pytest.mark.parametrize("name", ["simplevit-digits", "simplevit-ti16"])
def test_a_vit_is_vit_pytorchs_to_rounding(name: str) -> None:
    """Forward and backward in float64, with weights that go both ways."""
    from vit_pytorch.simple_vit import SimpleViT

    size, patch, dim, depth, heads, d = {
        "simplevit-digits": (8, 4, 64, 4, 4, 16), "simplevit-ti16": (32, 16, 192, 12, 3, 64)
    }[name]  # fmt: skip
    mlp = 128 if d == 16 else 4 * dim
    theirs = SimpleViT(
        image_size=size, patch_size=patch, num_classes=5, dim=dim, depth=depth, heads=heads,
        mlp_dim=mlp, dim_head=d,
    ).double()  # fmt: skip
    ours = models.build(name, classes=5, resolution=size, seed=0).double()
    ours.load_state_dict(theirs.state_dict())
    theirs.pos_embedding = ours.pos_embedding = theirs.pos_embedding.double()
    moved = copy.deepcopy(ours)
    for p in ours.parameters():
        p.data.zero_()  # the copy has weights of its own
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    grads = []
    for model in (theirs, moved):
        logits = model(images)
        logits.square().sum().backward()
        grads.append([logits, *(p.grad for p in model.parameters())])
    for theirs_, ours_ in zip(*grads, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-12, atol=1e-12)
    theirs.load_state_dict(moved.state_dict())


def test_a_vit_never_holds_the_attention_map() -> None:
    model = models.build("simplevit-digits", classes=5, resolution=8, seed=0)
    with profile() as seen:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    names = {event.name for event in seen.events()}
    assert "aten::scaled_dot_product_attention" in names
    assert not any("softmax" in name for name in names)


@pytest.mark.parametrize("optimizer", ["adamw", "localadamw", "sgd", "localsgd"])
def test_the_optimizer_is_one_kernel(optimizer: str) -> None:
    """And steps as torch's own, to rounding."""
    config = load(["--optimizer", optimizer, "--nesterov", "--wd", "0.1", "--max-lr", "0.01"])
    model = models.build("simplevit-digits", classes=5, resolution=8, seed=0).double()
    plain = copy.deepcopy(model)
    fused = optimizers.build(config, model, Schedule.of(config, 10))
    if optimizer.endswith("sgd"):
        other = torch.optim.SGD(plain.parameters(), 0.01, 0.9, weight_decay=0.1, nesterov=True)
    else:
        other = torch.optim.AdamW(plain.parameters(), 0.01, weight_decay=0.1)
    for number in range(4):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.grad, q.grad = (torch.cos(number + x.detach()) for x in (p, q))
        with profile() as seen:
            getattr(fused, "inner", fused).step()
        other.step()
    assert any("_fused_" in event.name for event in seen.events())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_compiling_is_left_to_the_device_and_the_model() -> None:
    card, cpu = torch.device("cuda"), torch.device("cpu")
    for given, name, device, expected in (
        (["--compile", "auto"], "simplevit-b16", card, True),
        ([], "simplevit-b16", cpu, False),
        ([], "resnet50", card, False),
        (["--compile"], "resnet50", cpu, True),
        (["--no-compile"], "simplevit-b16", card, False),
    ):
        config = load(["--model", name, *given])
        assert checks.with_compile(config, device).compile is expected
    with pytest.raises(ConfigError, match="compile is 'perhaps': it must be true, false or auto"):
        load(["--compile", "perhaps"])


def test_channels_last_weights_are_in_that_format() -> None:
    model = models.build("resnet18", classes=10, resolution=32, seed=0, channels_last=True)
    plain = models.build("resnet18", classes=10, resolution=32, seed=0)
    weight = model.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert torch.equal(weight, plain.layer1[0].conv1.weight)
