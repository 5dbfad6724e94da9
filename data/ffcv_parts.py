"""The names of FFCV that this package uses, imported without FFCV's side effects.

Import FFCV from here only. Its import compiles a typed dictionary of two entries, which takes two
seconds in every process and ends some of them with a traceback from numba; a plain dictionary
serves. It also sets torch to one thread. Where there is a GPU its epochs make streams there, even
in a run on the CPU, and fail where the GPU is hidden later; here pixels stay in memory of the host.

Code that calls FFCV's C functions through ctypes holds their addresses, so numba compiles it anew
in every process. `imdecode` and `resize` are the same functions under names that are looked up when
compiled code is loaded: what calls them can be kept on disk.
"""

import ctypes
from unittest.mock import patch

import numba.typed
import torch
from llvmlite import binding
from numba import types
from numba.core.typing import signature

_threads = torch.get_num_threads()
with patch.object(numba.typed, "Dict", dict):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
    from ffcv.libffcv import ctypes_imdecode, ctypes_resize
    from ffcv.loader import Loader, OrderOption, epoch_iterator
    from ffcv.loader import loader as loader_module
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.state import State
    from ffcv.reader import Reader
    from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, handle_sample
epoch_iterator.IS_CUDA = False
torch.set_num_threads(_threads)


def _by_name(function: ctypes._CFuncPtr, *arguments: types.Type) -> types.ExternalFunction:
    """A C function that returns an int, for compiled code."""
    name = f"localopt_ffcv_{function.__name__}"
    binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return types.ExternalFunction(name, signature(types.int32, *arguments))


# The file's bytes and their number, the image's size, the pixels and their size, a box, a scale,
# and whether to crop and to flip.
imdecode = _by_name(
    ctypes_imdecode, types.intp, types.uint64, types.uint32, types.uint32, types.intp,
    *8 * (types.uint32,),
)  # fmt: skip
# Interpolation, the pixels and their size, a box, the result and its size.
resize = _by_name(ctypes_resize, *11 * (types.int64,))

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
    "handle_sample",
    "imdecode",
    "loader_module",
    "resize",
]
