"""Local SGD and Local AdamW: `LocalOptimizer` with torch's optimizers inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from .buffers import BufferPolicy
from .optimizer import LocalOptimizer
from .sync import Rule


class LocalSGD(LocalOptimizer):
    """`LocalOptimizer` around `torch.optim.SGD`: Local SGD.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate.
        period: when to synchronise.
        sync, model, buffers, process_group, auto, track_drift, check_finite, alone: see
            `LocalOptimizer`.

    The others are `torch.optim.SGD`'s.

    Source: Stich 2018, arXiv 1805.09767.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        period: Callable[[int, float], int],
        sync: Rule | None = None,
        model: nn.Module | None = None,
        buffers: BufferPolicy = "keep",
        process_group: dist.ProcessGroup | None = None,
        auto: bool = True,
        track_drift: bool = False,
        check_finite: bool = True,
        alone: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        inner = SGD(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize,
            foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(
            inner, period, sync, model=model, buffers=buffers, process_group=process_group,
            auto=auto, track_drift=track_drift, check_finite=check_finite, alone=alone,
        )  # fmt: skip


class LocalAdamW(LocalOptimizer):
    """`LocalOptimizer` around `torch.optim.AdamW`: Local AdamW. Moments stay local.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate.
        period: when to synchronise.
        sync, model, buffers, process_group, auto, track_drift, check_finite, alone: see
            `LocalOptimizer`.

    The others are `torch.optim.AdamW`'s.

    Source: Gu et al., ICLR 2024, arXiv 2310.14423.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        period: Callable[[int, float], int],
        sync: Rule | None = None,
        model: nn.Module | None = None,
        buffers: BufferPolicy = "keep",
        process_group: dist.ProcessGroup | None = None,
        auto: bool = True,
        track_drift: bool = False,
        check_finite: bool = True,
        alone: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        inner = AdamW(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        super().__init__(
            inner, period, sync, model=model, buffers=buffers, process_group=process_group,
            auto=auto, track_drift=track_drift, check_finite=check_finite, alone=alone,
        )  # fmt: skip
