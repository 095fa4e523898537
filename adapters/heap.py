"""Returning freed host memory to the system.

Tensors of batches without padding differ in size, and so do adapters. glibc keeps the gaps between
those that live longer: without this a training run grows by some megabytes a step, and a service by
some hundreds of megabytes in thousands of uploads.
"""

import ctypes
from functools import cache
from typing import Any


def trim_heap() -> None:
    """Give back what is free, where the C library can; takes some milliseconds without the GIL."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
