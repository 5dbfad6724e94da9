"""numba's njit for code that runs in the threads which decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, to run without the interpreter lock, and keep the code on disk.

    It is kept beside the function's file, or in the user's cache folder (NUMBA_CACHE_DIR), for this
    processor and version of the file; another process takes a tenth of a second to load what took
    this one seconds to compile. Where nothing can be written it is compiled in every process.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no place for it
        return njit(**options)(function)
