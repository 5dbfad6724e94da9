"""Compressed synchronisations on a GPU: replicas are equal to the bit, and near the plain mean."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import nn

from localopt import BMUF, Average, Constant, DiLoCo, LocalSGD, SlowMo
from localopt.compression import PIECE, Bfloat16, Int8
from tests.gpu.links import GPU_LINKS, device_of
from tests.localopt.test_compressed_rules import alike_and_finite, of_all_types
from tests.support.ranks import run

pytestmark = pytest.mark.slow

# What a codec loses of a number at most, as a share of the largest that it belongs with.
LOSS = {"bf16": 2**-8, "int8": 1 / 254}
# With the most by which a rule makes an error of the mean larger.
RULES = {
    "average": (lambda compress: Average(compress=compress), 1),
    "bmuf": (lambda compress: BMUF(0.5, compress=compress), 2),
    "diloco": (lambda compress: DiLoCo(0.5, 0.5, compress), 1),
    "slowmo": (lambda compress: SlowMo(0.5, compress=compress), 2),
}
ROUNDS, H = 3, 2


def beside_plain(
    rank: int, m: int, rule: str, compress: str, device: str, numbers: int
) -> list[tuple[str, float, float]]:
    """After each round: the bits, the distance to the same without compression, and the largest
    change that this rank has made. In the last round it makes none, but sends what it owes."""
    parameters = [nn.Parameter(torch.ones(numbers, device=device)) for _ in range(2)]
    optimizers = [
        LocalSGD([p], lr=1.0, period=Constant(H), sync=RULES[rule][0](codec))
        for p, codec in zip(parameters, (compress, None), strict=True)
    ]
    generator = torch.Generator(device).manual_seed(rank)
    seen = []
    for i in range(ROUNDS):
        change = torch.zeros(numbers, device=device)
        for _ in range(H):
            gradient = torch.randn(numbers, device=device, generator=generator) / 16
            gradient *= i < ROUNDS - 1
            change += gradient
            for p, optimizer in zip(parameters, optimizers, strict=True):
                p.grad = gradient.clone()
                optimizer.step()
        ours, plain = (p.detach() for p in parameters)
        bits = hashlib.sha256(ours.cpu().numpy().tobytes()).hexdigest()
        seen.append((bits, float((ours - plain).abs().max()), float(change.abs().max())))
    return seen


@pytest.mark.parametrize("link", ["cpu", *GPU_LINKS])
@pytest.mark.parametrize("compress", LOSS)
@pytest.mark.parametrize("rule", RULES)
def test_replicas_are_equal_and_near_the_plain_mean(rule: str, compress: str, link: str) -> None:
    """More numbers than a codec looks at at once, with an odd end."""
    numbers = 2 * PIECE + 3 * 512 + 5 if link == "cpu" else 2**23 + 5
    ranks: list[Any] = run(beside_plain, 2, rule, compress, device_of(link), numbers, on=link)
    loss, gain = LOSS[compress], RULES[rule][1]
    largest = max(change for seen in ranks for _, _, change in seen)
    # What is lost of a rank's change, and of the mean; both come on top of the next changes.
    bound = 2 * loss * (1 + 4 * loss) * largest
    for (bits, distance, _), (others, also, _) in zip(*ranks, strict=True):
        assert bits == others and distance == also
        assert 0 < distance <= gain * bound
    if rule == "average":
        assert ranks[0][-1][1] <= 2 * loss * bound + 1e-6, "what was owed has been told"


@pytest.mark.parametrize("link", GPU_LINKS)
@pytest.mark.parametrize("codec", [Bfloat16(16), Int8(16)], ids=repr)
def test_every_type_of_parameter(codec: Any, link: str) -> None:
    """As on CPUs."""
    alike_and_finite(run(of_all_types, 3, codec, "cuda", on=link))
