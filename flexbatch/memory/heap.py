"""What is freed and kept for its next use, by the C library's heap and by kernels, is given back before it counts
against the limit."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from flexbatch.kernels.result_memory import give_back_free

# What a process that stays near the limit may keep of its headroom as freed memory before that is given back again: in
# most cases the next call finds it and needs no more. Giving back costs time, because pages that are used again have to
# be found and cleared again: a step of less than a call takes made a tenth of a pass of OPT-1.3B (docs/benchmarks.md).
# The rest of the headroom is for blocks that are not found again. At least STEP bytes, where there is little headroom.
KEPT = 0.75
STEP = 16 << 20

# What a run touches of libraries' files, and what the kernel keeps for the process. A limit counts it even while the
# kernel has just taken pages of files away.
BESIDE = 64 << 20

_STATM = Path("/proc/self/statm")


class Heap:
    """Keeps a process below `limit` bytes from holding what it has freed: between two calls of `settle` it may take
    `headroom` more bytes.

    Before glibc 2.38 an aligned block that was freed is not found again for another of its size (glibc bug 14581): the
    heap grows instead. torch's tensors are such blocks; one pass over long prompts came to hold six times what it had
    in use. Elsewhere than with glibc on Linux nothing is done.
    """

    def __init__(self, limit: int = sys.maxsize, headroom: int = 0) -> None:
        self._limit, self._headroom, self._trim = limit, headroom, _malloc_trim()
        self.lend(0)

    def lend(self, nbytes: int) -> None:
        """So much of the headroom goes to others from now on, and with it what was freed."""
        self._left = self._headroom - nbytes
        self._threshold = self._enough = self._limit - self._left
        if self._trim is not None and nbytes:
            self._trim()

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes more leave the headroom as it is."""
        return counted_bytes() + nbytes <= self._enough

    def room(self) -> int:
        """So many bytes more leave the headroom as it is; none where the process holds more than was planned."""
        return max(0, self._enough - counted_bytes())

    def settle(self) -> None:
        """To be called wherever much may have been freed since the last time."""
        if self._trim is not None and counted_bytes() > self._threshold:
            self._trim()
            held = counted_bytes()
            self._threshold = max(self._enough, held + STEP, min(held, self._enough) + int(KEPT * self._left))


def give_back_freed() -> None:
    """Gives back what the process has freed and the heap keeps, where that can be done."""
    if (trim := _malloc_trim()) is not None:
        trim()


def counted_bytes() -> int:
    """Main memory that counts as this process's: its own, and files' pages or what stands for them (proc(5), statm)."""
    told = os.pread(_opened(_STATM, os.getpid()), 128, 0)
    resident, of_files = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in told.split()[1:3])
    return resident - of_files + max(of_files, BESIDE)


@cache
def _opened(path: Path, _process: int) -> int:
    """A file descriptor that stays open: opening the file takes longer than reading it, and it is read between any two
    stops. What it says is of the process that opened it."""
    return os.open(path, os.O_RDONLY)


def _malloc_trim() -> Callable[[], object] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    if not _STATM.exists():
        return None

    def give_back() -> None:
        give_back_free()
        trim(0)

    return give_back
