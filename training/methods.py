"""Methods of composer's that a recipe can switch on; the only file that knows composer."""

from __future__ import annotations

import functools
import math
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from data import order

from .torchvision_repair import allow_torchvision_without_cuda
from .values import ConfigError

Batch = tuple[Tensor, Tensor]


@functools.cache
def composer() -> ModuleType:
    """composer's functions; imported where a method is switched on, for that takes seconds."""
    allow_torchvision_without_cuda()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    import composer.functional

    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)  # composer, imported, takes them over for the process
    return composer.functional


def blurpool(model: nn.Module) -> None:
    """Blur before strided convolutions and max pooling, in place.

    Source: Zhang 2019, arXiv 1904.11486.

    Raises:
        ConfigError: if the model has nothing of that kind.
    """
    apply = composer().apply_blurpool
    from composer.algorithms.warnings import NoEffectWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        try:
            apply(model)
        except NoEffectWarning:
            raise ConfigError(
                "blurpool is true: the model has neither strided convolutions nor max pooling"
            ) from None


def squeeze_excite(model: nn.Module) -> None:
    """Let the channels of wide convolutions be weighed by the image's own mean channels, in place.

    Source: Hu, Shen, Sun 2018, arXiv 1709.01507.

    Raises:
        ConfigError: if the model has no convolution of 128 channels in and out.
    """
    before = sum(1 for _ in model.modules())
    composer().apply_squeeze_excite(model)
    if sum(1 for _ in model.modules()) == before:
        raise ConfigError("squeeze_excite is true: the model has no convolution of 128 channels")


class Mixup:
    """Each image takes up to a half of its neighbour's: x_i ← (1 - w_i) x_i + w_i x_j.

    Likewise the targets, which become probabilities. Positions of the global batch are paired 2k
    with 2k + 1, which in an epoch's random order is a random pairing; w_i = min(λ, 1 - λ) with
    λ ~ Beta(α, α), a function of (seed, step, position in the global batch). So what a step sees
    does not depend on how many replicas and micro-steps share it.

    Source: Zhang, Cissé, Dauphin, Lopez-Paz 2018, arXiv 1710.09412; there, and in composer, a
    whole batch shares one λ.

    Args:
        alpha: α, positive.
        first: position in the global batch at which this rank's share begins.
        physical_batch: images per micro-batch, an even number: neighbours are paired.
    """

    def __init__(
        self, alpha: float, *, seed: int, classes: int, first: int, physical_batch: int
    ) -> None:
        self._alpha, self._seed, self._classes, self._first = alpha, seed, classes, first
        self._partner, self._mix = torch.arange(physical_batch) ^ 1, composer().mixup_batch

    def weights(self, step: int, positions: np.ndarray) -> np.ndarray:
        """w of the positions (b,) in the global batch; (b,) in [0, 1/2]."""
        from scipy.special import betaincinv  # takes a while to import

        uniform = order.draws(self._seed, step, positions, 1, order.Stream.MIXUP)[:, 0]
        share = betaincinv(self._alpha, self._alpha, uniform)
        return np.minimum(share, 1 - share)

    def __call__(self, batch: Batch, step: int, micro_step: int) -> Batch:
        """From labels (b,) to targets (b, classes)."""
        images, labels = batch
        begin = self._first + micro_step * len(labels)
        weights = torch.from_numpy(self.weights(step, np.arange(begin, begin + len(labels))))
        weight = _sent(weights.float(), images.device)
        self._partner = self._partner.to(images.device)
        images, partners, _ = self._mix(
            images, labels, mixing=weight.view(-1, 1, 1, 1), indices=self._partner
        )
        own, other = (one_hot(x, self._classes) for x in (labels, partners))
        return images, torch.lerp(own.float(), other.float(), weight[:, None])


class ProgressiveResizing:
    """Small images first: their side grows linearly from ``initial_scale`` to the whole.

    It is whole, a multiple of 4 pixels before that, for the last ``finetune_fraction`` of the run.
    """

    def __init__(
        self, initial_scale: float, finetune_fraction: float, resolution: int, total_steps: int
    ) -> None:
        self._initial, self._resolution = initial_scale, resolution
        self._resize = composer().resize_batch
        self._growing = (1 - finetune_fraction) * total_steps

    def side(self, step: int) -> int:
        """Pixels."""
        t = min(1.0, step / self._growing) if self._growing else 1.0
        side = 4 * round((self._initial + (1 - self._initial) * t) * self._resolution / 4)
        return min(max(side, 4), self._resolution) if t < 1 else self._resolution

    def __call__(self, batch: Batch, step: int, micro_step: int) -> Batch:
        """Images (b, 3, R, R) to (b, 3, side, side)."""
        side = self.side(step)
        if side == self._resolution:
            return batch
        scale = side / self._resolution
        if self._resolution * scale < side:  # torch would round down to a pixel less
            scale = math.nextafter(scale, 1)
        return self._resize(*batch, scale_factor=scale)


class Ema:
    """An exponential moving average of the synchronised model: e ← s^n e + (1 - s^n) x.

    It is updated where replicas agree, n steps after the time before, so that s is the smoothing
    per step however long rounds are, and all have the same average without a collective for it.
    Buffers are averaged too.
    """

    def __init__(self, model: nn.Module, smoothing: float) -> None:
        self._model, self._smoothing, self._step = model, smoothing, 0
        self._follow = composer().compute_ema
        from composer.algorithms.ema.ema import EMAParameters

        self._average = EMAParameters(model)

    def start_at(self, step: int) -> None:
        """The model that it was built with is that of ``step``."""
        self._step = step

    def update(self, step: int) -> bool:
        """The model is what the replicas agree on after ``step`` steps; whether that is news."""
        if step == self._step:
            return False
        self._follow(self._model, self._average, self._smoothing ** (step - self._step))
        self._step = step
        return True

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context the model holds the average."""
        self._average.swap_params(self._model)
        try:
            yield
        finally:
            self._average.swap_params(self._model)

    def state_dict(self) -> dict[str, Any]:
        """The average, by name, and the step it is of."""
        return {
            "step": self._step,
            "parameters": dict(self._average.named_parameters_dict),
            "buffers": dict(self._average.named_buffers_dict),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        mine = self.state_dict()
        self._step = state["step"]
        for kind in ("parameters", "buffers"):
            for name, tensor in mine[kind].items():
                tensor.copy_(state[kind][name])


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    if device.type != "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
