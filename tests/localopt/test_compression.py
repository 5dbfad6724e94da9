"""localopt.compression: what a codec tells, what it leaves, and in how many bytes."""

from __future__ import annotations

import pytest
import torch

from localopt import BMUF, Average, BlockMomentum, DiLoCo, SlowMo
from localopt.compression import CODECS, PIECE, Bfloat16, Codec, Int8, codec

CODECS_OF_16 = [Bfloat16(16), Int8(16)]
TYPES = [torch.float32, torch.float64]


def send(codec_: Codec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What arrives of ``x``, and what is left of it."""
    left = x.clone()
    wire = torch.zeros(codec_.size(-(-len(x) // codec_.block) * codec_.block), dtype=torch.uint8)
    codec_.send_(left, wire)
    told = torch.full_like(x, 7)
    codec_.receive_(told, wire)
    twice = torch.ones_like(x)
    codec_.receive_(twice, wire, add=True)
    assert torch.equal(twice, 1 + told)
    return told, left


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("codec_", CODECS_OF_16, ids=repr)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 80, 1000])
def test_what_is_told_and_what_is_left_are_what_was_sent(
    codec_: Codec, dtype: torch.dtype, n: int
) -> None:
    x = torch.randn(n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    x *= torch.logspace(-6, 6, n).to(dtype)
    told, left = send(codec_, x)
    assert torch.allclose(told + left, x, rtol=1e-6, atol=0)
    if isinstance(codec_, Bfloat16):
        assert torch.equal(told, x.bfloat16().to(dtype))
    elif n:
        for a, b in zip(x.split(16), left.split(16), strict=True):
            assert (b.abs() <= a.abs().max() / 254 * (1 + 1e-5)).all()


def test_int8_by_hand() -> None:
    x = torch.zeros(32)
    x[:4] = torch.tensor([127.0, -63.4, 0.6, -0.4])
    x[16] = -254.0
    told, _ = send(Int8(16), x)
    assert told[:4].tolist() == [127, -63, 1, 0]
    assert told[16] == -254 and told[17:].abs().max() == 0


@pytest.mark.parametrize("codec_", [Bfloat16(), Int8()], ids=repr)
def test_pieces_are_blocks(codec_: Codec) -> None:
    """More than is looked at once, with an odd end: as when each block is sent alone."""
    x = torch.randn(PIECE + 3 * 512 + 5, generator=torch.Generator().manual_seed(0))
    told, _ = send(codec_, x)
    for start in (0, PIECE - 512, PIECE, PIECE + 512, len(x) - 5):
        part = x[start : start + 512]
        assert torch.equal(told[start : start + 512], send(codec_, part)[0])


@pytest.mark.parametrize("codec_", CODECS_OF_16, ids=repr)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
def test_extremes(codec_: Codec, value: float) -> None:
    """Nothing becomes NaN or infinite; what is too small to be told is left for later."""
    x = torch.full((16,), value)
    x[3] = 0
    told, left = send(codec_, x)
    assert torch.isfinite(told).all() and told[3] == 0
    assert torch.allclose(told.double() + left.double(), x.double(), rtol=1e-6, atol=0)


def test_sizes() -> None:
    n = 1_000_000 // 512 * 512
    assert Bfloat16().size(n) == 2 * n
    assert 1 < Int8().size(n) / n < 1.01


def test_names() -> None:
    assert codec(None) is None and codec("int8") == Int8() and codec("bf16") == Bfloat16()
    assert codec(Int8(32)) == Int8(32)
    assert set(CODECS) == {"bf16", "int8"}
    for make in (Average, BMUF, DiLoCo, lambda compress: SlowMo(0.5, compress=compress)):
        rule = make(compress="int8")
        assert rule.compress == "int8" and "compress='int8'" in repr(rule)
        with pytest.raises(ValueError, match=r"compress is 'int4': it must be None or one of bf16"):
            make(compress="int4")
    with pytest.raises(ValueError, match="block is 10"):
        Int8(10)
    with pytest.raises(ValueError, match="compress='bf16' and state_fields exclude each other"):
        Average(compress="bf16", state_fields=("exp_avg",))
    assert BlockMomentum(lambda p: torch.optim.SGD(p, lr=1.0)).compress is None
