"""Models by name: an entry is a function (number of classes, resolution) -> module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import methods
from .torchvision_repair import allow_torchvision_without_cuda
from .values import ConfigError, did_you_mean

Build = Callable[[int, int], nn.Module]  # (number of classes, resolution)

TORCHVISION = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip

def _simplevit(dim: int, heads: int, depth: int = 12, patch: int = 16, **sizes: int) -> Build:
    """SimpleViT with the usual proportions: heads of 64, an MLP four times as wide as the model.

    Source: Beyer, Zhai, Kolesnikov 2022, arXiv 2205.01580.
    """

    def build(classes: int, resolution: int) -> nn.Module:
        from vit_pytorch.simple_vit import SimpleViT

        return made_fast(SimpleViT(
            image_size=resolution, patch_size=patch, num_classes=classes,
            dim=dim, depth=depth, heads=heads, **{"mlp_dim": 4 * dim} | sizes,
        ))  # fmt: skip

    return build


def made_fast(model: nn.Module) -> nn.Module:
    """vit_pytorch's SimpleViT ``model`` with attention by one kernel; weights and results are its.

    Its position embedding becomes a buffer, which goes to the GPU with the model: it is a plain
    tensor, which each forward pass would copy there, and wait for.
    """
    from vit_pytorch.simple_vit import Attention

    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = MethodType(_attention, module)
    embedding = model.pos_embedding
    del model.pos_embedding
    model.register_buffer("pos_embedding", embedding, persistent=False)
    return model


def _attention(self: Any, x: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v of each head, (b, n, dim) -> (b, n, dim), never holding the n x n map.

    vit_pytorch's own writes the map out, its softmax in float32 under autocast.
    """
    qkv = self.to_qkv(self.norm(x))  # (b, n, 3 * heads * d)
    q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (b, heads, n, d)
    out = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
    return self.to_out(out.transpose(1, 2).flatten(2))


def _torchvision(name: str) -> Build:
    """A classifier of torchvision's by its name there, with torchvision's own initial weights."""

    def build(classes: int, resolution: int) -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None, num_classes=classes)

    return build


class ResNetDigits(nn.Sequential):
    """A CIFAR-style ResNet with 3 stages of one basic block: 16, 32 and 64 channels.

    Source: He et al. 2015, arXiv 1512.03385, section 4.2, n = 1.
    """

    def __init__(self, classes: int) -> None:
        from torchvision.models.resnet import BasicBlock

        def stage(inward: int, outward: int, stride: int) -> nn.Module:
            shortcut = None
            if stride != 1:
                shortcut = nn.Sequential(
                    nn.Conv2d(inward, outward, 1, stride, bias=False), nn.BatchNorm2d(outward)
                )
            return BasicBlock(inward, outward, stride, shortcut)

        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            stage(16, 16, 1),
            stage(16, 32, 2),
            stage(32, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, classes),
        )


def _resnet18_cifar(classes: int, resolution: int) -> nn.Module:
    """ResNet-18 for small images: a 3x3 first convolution of stride 1, and no max pooling.

    Source: He et al. 2015, arXiv 1512.03385, table 1, for the network; the change is the usual one
    for CIFAR-10, where the first two layers would leave 8 x 8 pixels of 32 x 32.
    """
    from torchvision.models import resnet18

    model = resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


MODELS: dict[str, Build] = {
    "simplevit-b16": _simplevit(dim=768, heads=12),
    "simplevit-s16": _simplevit(dim=384, heads=6),
    "simplevit-ti16": _simplevit(dim=192, heads=3),
    **{name: _torchvision(name) for name in TORCHVISION},
    "simplevit-digits": _simplevit(64, heads=4, depth=4, patch=4, mlp_dim=128, dim_head=16),
    "resnet-digits": lambda classes, resolution: ResNetDigits(classes),
    "resnet18-cifar": _resnet18_cifar,
}


def of(settings: Mapping[str, Any], classes: int) -> nn.Module:
    """The model of a run with these ``settings``; errors as those of `build`."""
    same = ("resolution", "blurpool", "squeeze_excite", "channels_last")
    given = {key: settings[key] for key in same}
    return build(settings["model"], classes=classes, seed=settings["init_model_by_seed"], **given)


def build(
    name: str,
    *,
    classes: int,
    resolution: int,
    seed: int,
    blurpool: bool = False,
    squeeze_excite: bool = False,
    channels_last: bool = False,
) -> nn.Module:
    """The named model with weights drawn from ``seed``.

    Images are (B, 3, R, R) with R the ``resolution``; ``blurpool`` and ``squeeze_excite`` change
    the model as `training.methods` says.

    Raises:
        ConfigError: for an unknown name, a resolution that the model cannot take, or a change that
            would change nothing.
    """
    if name not in MODELS:
        hint = did_you_mean(name, MODELS) or f"; known are {', '.join(MODELS)}"
        raise ConfigError(f"model is {name!r}: no such model{hint}")
    allow_torchvision_without_cuda()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(seed, 0))
        try:
            model = MODELS[name](classes, resolution)
        except AssertionError as error:
            raise ConfigError(f"model {name} at resolution {resolution}: {error}") from None
        if squeeze_excite:
            methods.squeeze_excite(model)
        if blurpool:
            methods.blurpool(model)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def gains_by_compiling(name: str) -> bool:
    """Whether ``torch.compile`` makes its training step faster on a GPU.

    On an H100, bf16: a ViT-B/16 in 50 ms instead of 78 (with attention written out), a ResNet-50 in
    42 instead of 38.
    """
    return name.startswith("simplevit-")


def takes_any_resolution(model: nn.Module) -> bool:
    """Whether images may be smaller than those that the model was built for."""
    return any(isinstance(module, nn.AdaptiveAvgPool2d) for module in model.modules())
