"""What the fork server imports and compiles once, so that a rank starts in milliseconds."""

import gc
import importlib
import os
from pathlib import Path

# Asking CUDA itself whether there is a GPU would keep forked processes from using it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import numpy as np
import torch

from data import augment
from training import methods

torch.set_num_threads(1)
methods.composer()
for module in (
    "training.loop", "torchvision.models", "vit_pytorch.simple_vit",
    "deepspeed.module_inject.auto_ep_layer", "torch.utils.serialization",  # imported when used
):  # fmt: skip
    importlib.import_module(module)

# The tests whose functions run on ranks.
for file in sorted(Path(__file__).parents[1].glob("*/test_*.py")):
    if "tests.support.ranks" in file.read_text():
        importlib.import_module(f"tests.{file.parent.name}.{file.stem}")

# The program's decoder, for the types that it is called with.
augment.decode_samples(
    np.empty(0, np.int64), np.empty(0, augment.SAMPLE), np.empty(0, np.uint8),
    np.empty((0, 1, 1, 3), np.uint8), None,
)  # fmt: skip

# What has been imported is nobody's garbage: ranks look for theirs without it.
gc.freeze()
