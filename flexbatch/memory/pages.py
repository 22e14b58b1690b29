"""Main memory that is given back to the system while the tensor that had it lives on."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch

from flexbatch.memory.direct_io import page_ceil, page_floor


@cache
def gives_back() -> bool:
    """Whether the system takes back pages at once (Linux, madvise(2), MADV_DONTNEED)."""
    return sys.platform == "linux" and _madvise() is not None


def give_back(tensor: torch.Tensor) -> None:
    """Gives up the whole pages of a contiguous tensor in private anonymous memory; they are zeros when next used."""
    start, end = page_ceil(tensor.data_ptr()), page_floor(tensor.data_ptr() + tensor.nbytes)
    if end > start and _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise does not take pages back")


@cache
def _madvise() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
