"""The names of FFCV that this package uses, imported without FFCV's side effects.

Import FFCV from here only. Its import compiles a typed dictionary of two entries, which takes two
seconds in every process and ends some of them with a traceback from numba; a plain dictionary
serves. It also sets torch to one thread.
"""

from unittest.mock import patch

import numba.typed
import torch

_threads = torch.get_num_threads()
with patch.object(numba.typed, "Dict", dict):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
    from ffcv.libffcv import ctypes_imdecode, ctypes_resize
    from ffcv.loader import Loader, OrderOption
    from ffcv.loader import loader as loader_module
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.state import State
    from ffcv.reader import Reader
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, handle_sample
torch.set_num_threads(_threads)

JPEG = int(IMAGE_MODES["jpg"])
RAW = int(IMAGE_MODES["raw"])

__all__ = [
    "JPEG",
    "MIN_PAGE_SIZE",
    "RAW",
    "AllocationQuery",
    "Compiler",
    "DatasetWriter",
    "EpochIterator",
    "IntField",
    "Loader",
    "MemoryAllocator",
    "OSCacheContext",
    "OSCacheManager",
    "OrderOption",
    "RGBImageField",
    "Reader",
    "SimpleRGBImageDecoder",
    "State",
    "ctypes_imdecode",
    "ctypes_resize",
    "handle_sample",
    "loader_module",
]
