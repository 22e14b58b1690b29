"""Memory of large results that the next ones get again.

The C library gives blocks of this size back to the system once they are free, so that the pages of the next one have to
be found and cleared anew, which took a quarter of a long pass's processor time (docs/benchmarks.md).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from typing import Any

import numpy as np
import torch

from flexbatch.errors import CapacityError

LEAST = 4 << 20
"""Bytes of a large result. The heap finds smaller ones again by itself."""
STEPS = 4
"""Sizes that memory may have between one and twice as much, so that a somewhat larger result fits."""

_own = threading.local()


def result(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of any numbers on the CPU; where it is large, its memory is the calling thread's, and goes
    to another result once nobody has this one any more."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST:
        return torch.empty(shape, dtype=dtype)
    free = _free()
    memory = _taken(free, nbytes)
    lent = memory[:nbytes]
    weakref.finalize(lent, free.append, memory).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def give_back_free() -> None:
    """Gives back what no result of the calling thread is in."""
    _free().clear()


def _free() -> list[Any]:
    if not hasattr(_own, "free"):
        _own.free = []
    return _own.free  # type: ignore[no-any-return]


def _taken(free: list[Any], nbytes: int) -> Any:
    """The smallest that is large enough, unless most of it would be idle; else new memory, in place of the largest that
    is too small. Others only append to `free`, at any moment."""
    sizes = [len(each) for each in free]
    fitting = [at for at, size in enumerate(sizes) if nbytes <= size <= 2 * nbytes]
    if fitting:
        return free.pop(min(fitting, key=lambda at: sizes[at]))
    outgrown = [at for at, size in enumerate(sizes) if size < nbytes]
    if outgrown:
        free.pop(max(outgrown, key=lambda at: sizes[at]))
    return _new(nbytes)


def _new(nbytes: int) -> Any:
    step = (1 << (nbytes.bit_length() - 1)) // STEPS
    try:
        pages = mmap.mmap(-1, -(-nbytes // step) * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise CapacityError(
            f"Main memory has no room for a result of {nbytes} bytes ({error}).",
            remedy="Lower offload.prefill_tokens, or raise the memory limit.",
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)
