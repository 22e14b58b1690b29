"""Main memory that is given back to the system while the tensor that had it lives on, or brought in before its use."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from flexbatch.memory.direct_io import PAGE, AlignedBuffer, page_ceil, page_floor

POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, which Python's mmap does not name."""
CHUNK = 4 << 20
"""Bytes that are touched at a time, so that stopping takes little time."""


@cache
def gives_back() -> bool:
    """Whether the system takes back pages at once (Linux, madvise(2), MADV_DONTNEED)."""
    return sys.platform == "linux" and _madvise() is not None


def advise(start: int, nbytes: int, advice: int) -> bool:
    """Whether the system takes this advice about memory from `start` on, whole pages (Linux, madvise(2))."""
    return bool(_madvise()(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice) == 0)


def give_back(tensor: torch.Tensor) -> None:
    """Gives up the whole pages of a contiguous tensor in private anonymous memory; they are zeros when next used."""
    start, end = page_ceil(tensor.data_ptr()), page_floor(tensor.data_ptr() + tensor.nbytes)
    if end > start and not advise(start, end - start, mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise does not take pages back")


@cache
def populates() -> bool:
    """Whether the system brings memory in when asked (Linux 5.14, madvise(2), MADV_POPULATE_WRITE)."""
    page = AlignedBuffer(PAGE).tensor
    return gives_back() and advise(page.data_ptr(), PAGE, POPULATE_WRITE)


class TouchingAhead:
    """Has the system find and clear memory before it is used, on a thread of its own, where it `populates`.

    What the first use of memory costs stands in the way of a pass, and is much on a virtual machine whose host has to
    find the memory, too: 2.4 s a GiB in large pages on one of ours (docs/benchmarks.md).
    """

    def __init__(self, has_room: Callable[[int], bool]) -> None:
        """`has_room` says whether so many bytes more may be held now: at a limit the first use is early enough."""
        self._has_room, self._stopped = has_room, threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="touch")

    def touch(self, tensor: torch.Tensor) -> None:
        """A contiguous tensor in private anonymous memory; its numbers stay as they are, or become what is written
        meanwhile."""
        if tensor.nbytes >= CHUNK and populates() and not self._stopped.is_set():
            self._thread.submit(self._populate, tensor)

    def stop(self) -> None:
        """Nothing is touched any more once this returns. Safe to repeat."""
        self._stopped.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _populate(self, tensor: torch.Tensor) -> None:
        end = page_floor(tensor.data_ptr() + tensor.nbytes)
        for start in range(page_ceil(tensor.data_ptr()), end, CHUNK):
            length = min(CHUNK, end - start)
            if self._stopped.is_set() or not self._has_room(length):
                self._stopped.set()
            elif not advise(start, length, POPULATE_WRITE):
                self._stopped.set()  # no more memory: the first use will tell


@cache
def _madvise() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
