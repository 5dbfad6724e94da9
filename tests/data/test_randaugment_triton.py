"""data.randaugment_triton and data.randaugment_gpu: Triton's pixels, and when they are trusted."""

import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import randaugment_gpu, randaugment_torch
from data.randaugment import Operation
from tests.support.patience import PATIENCE

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@needs_triton
@pytest.mark.slow
@pytest.mark.long
def test_tritons_pixels_equal_the_compiled_codes():
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.interpreted"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def triton_is(monkeypatch, transform):
    monkeypatch.setitem(
        sys.modules, "data.randaugment_triton", SimpleNamespace(transform=transform)
    )


def test_the_sample_has_every_operation_and_changes_in_each():
    images, plan = randaugment_gpu._sample()
    there = torch.from_numpy(images)
    changed = (randaugment_torch.transform(there, plan) != there).flatten(1).any(1).numpy()
    assert set(plan.operations[changed, 0]) == set(Operation)


def test_equal_pixels_are_trusted(monkeypatch, recwarn):
    def transform(images, plan):
        return randaugment_torch.transform(images, plan)

    triton_is(monkeypatch, transform)
    assert randaugment_gpu._compared(CPU) is transform
    assert not recwarn.list


def test_one_pixel_is_enough_to_prefer_torch(monkeypatch):
    def transform(images, plan):
        result = randaugment_torch.transform(images, plan)
        last = np.flatnonzero(plan.operations[:, 0] == Operation.ROTATE)[-1]
        result[last, -1, -1, -1] ^= 1
        return result

    triton_is(monkeypatch, transform)
    with pytest.warns(UserWarning, match=r"slower on cpu, .*: its pixels differ in ROTATE$"):
        assert randaugment_gpu._compared(CPU) is randaugment_torch.transform


def test_the_sample_shows_products_that_are_fused_with_sums(monkeypatch):
    def blend(degenerate, images, factor):
        start = degenerate.float().double()  # holds these products exactly
        mixed = start + factor.float().double() * (images.double() - start)
        return mixed.float().clamp_(0, 255).to(torch.uint8)

    def between(a, b, share):
        a, more, share = (x.numpy().astype(np.longdouble) for x in (a, b - a, share))
        return torch.from_numpy((a + more * share).astype(np.float64))

    def fused(images, plan):
        with monkeypatch.context() as patch:
            patch.setattr(randaugment_torch, "_blend", blend)
            patch.setattr(randaugment_torch, "_between", between)
            return randaugment_torch.transform(images, plan)

    triton_is(monkeypatch, fused)
    with pytest.warns(UserWarning, match=r"differ in CONTRAST, COLOR, SHARPNESS, SHEAR_X$"):
        randaugment_gpu._compared(CPU)


def fails(images, plan):
    raise RuntimeError("at 3:4:\n    x = y\n        ^\ny is not defined\n")


def test_a_kernel_that_fails_is_told_in_one_line(monkeypatch):
    triton_is(monkeypatch, fails)
    with pytest.warns(UserWarning, match=r"^[^\n]*: RuntimeError: y is not defined$"):
        assert randaugment_gpu._compared(CPU) is randaugment_torch.transform


def test_triton_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "data.randaugment_triton", None)
    with pytest.warns(UserWarning, match=r"ModuleNotFoundError: [^\n]*$"):
        assert randaugment_gpu._compared(CPU) is randaugment_torch.transform


def test_a_gpu_is_warned_of_once_and_the_cpu_never(monkeypatch):
    triton_is(monkeypatch, fails)
    randaugment_gpu.transform_for.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for device in (CPU, torch.device("cuda"), torch.device("cuda")):
                found = randaugment_gpu.transform_for(device)
                assert found is randaugment_torch.transform
    finally:
        randaugment_gpu.transform_for.cache_clear()
    assert len(seen) == 1 and seen[0].filename == __file__


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_tritons(recwarn):
    from data import randaugment_triton

    found = randaugment_gpu.transform_for(torch.device("cuda"))
    assert found is randaugment_triton.transform, [str(x.message) for x in recwarn.list]
