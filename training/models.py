"""Models by name: an entry is a function (number of classes, resolution) -> module."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import nn

from .config import ConfigError

_kept_alive: list[torch.library.Library] = []


def _allow_torchvision_without_cuda() -> None:
    """Define the operators that torchvision's CUDA build expects and a CPU build of torch lacks.

    vit_pytorch and the ResNets import torchvision; neither calls these operators.
    """
    if torch.version.cuda is None and not _kept_alive:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)


def _simplevit_digits(classes: int, resolution: int) -> nn.Module:
    from vit_pytorch.simple_vit import SimpleViT

    return SimpleViT(
        image_size=resolution, patch_size=4, num_classes=classes,
        dim=64, depth=4, heads=4, mlp_dim=128, dim_head=16,
    )  # fmt: skip


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


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "simplevit-digits": _simplevit_digits,
    "resnet-digits": lambda classes, resolution: ResNetDigits(classes),
    "resnet18-cifar": _resnet18_cifar,
}


def build(name: str, *, classes: int, resolution: int, seed: int) -> nn.Module:
    """The named model with weights drawn from ``seed``.

    Raises:
        ConfigError: for an unknown name, or a resolution that the model cannot take.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(MODELS)}"
        raise ConfigError(f"model is {name!r}: no such model{hint}")
    _allow_torchvision_without_cuda()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(seed, 0))
        try:
            return MODELS[name](classes, resolution)
        except AssertionError as error:
            raise ConfigError(f"model {name} at resolution {resolution}: {error}") from None
