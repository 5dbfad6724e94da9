"""Where these tests run: on the CPU as their own check, or as ranks that share one card."""

from __future__ import annotations

import pytest
import torch

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_a_gpu = [pytest.mark.gpu, needs_a_gpu]
GLOO, NCCL = (pytest.param(link, marks=on_a_gpu) for link in ("gloo", "nccl"))
GPU_LINKS = [GLOO, NCCL]


def device_of(link: str) -> str:
    """Where the tensors of ranks that talk so are."""
    return "cpu" if link == "cpu" else "cuda"
