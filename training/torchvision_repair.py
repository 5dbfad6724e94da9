"""What lets torchvision's CUDA build be imported with a CPU build of torch."""

from __future__ import annotations

import torch

_kept_alive: list[torch.library.Library] = []


def allow_torchvision_without_cuda() -> None:
    """Define the operators that torchvision's CUDA build expects and a CPU build of torch lacks.

    vit_pytorch, the ResNets and composer import torchvision; none calls these operators.
    """
    if torch.version.cuda is None and not _kept_alive:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
