"""What the fork server imports and compiles once, so that a rank starts in milliseconds."""

import importlib
import os

# Asking CUDA itself whether there is a GPU would keep forked processes from using it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import numpy as np

from data import augment
from training import models

models.allow_torchvision_without_cuda()
for module in ("training.loop", "torchvision.models", "vit_pytorch.simple_vit"):
    importlib.import_module(module)

# The program's decoder, for the types that it is called with.
augment.decode_samples(
    np.empty(0, np.int64), np.empty(0, augment.SAMPLE), np.empty(0, np.uint8),
    np.empty((0, 1, 1, 3), np.uint8), None,
)  # fmt: skip
