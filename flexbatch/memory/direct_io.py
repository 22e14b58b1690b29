"""Reading spans of files into persistent aligned buffers: direct (O_DIRECT) and buffered.

Direct reads bypass the page cache: the disk writes into our buffer, at about 0.015 core-seconds per GB, and the page
cache cannot grow past a memory limit. Buffered reads work on every filesystem; their pages are given back after use,
because a cyclic scan never finds them again. Which is faster depends on disk and filesystem, so it is measured
(`reader_choice.py`).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from flexbatch.errors import CapacityError, EngineError

PAGE = 4096
"""Bytes. Offsets, lengths and addresses of direct reads are multiples of this on every common disk and filesystem."""


def page_floor(nbytes: int) -> int:
    return nbytes - nbytes % PAGE


def page_ceil(nbytes: int) -> int:
    return nbytes + -nbytes % PAGE


class AlignedBuffer:
    """`nbytes` of page-aligned anonymous memory, allocated once and reused.

    A fresh buffer per read costs as much as the read: the kernel has to find and clear its pages. `pinned` registers
    the memory with CUDA, so that copies to the device run on their own. The memory lives until the last view is gone.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self.nbytes = page_ceil(max(nbytes, 1))
        try:
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise CapacityError(
                f"Main memory has no room for a buffer of {self.nbytes} bytes ({error}).",
                remedy="Lower offload.prefetch_bytes, or raise the memory limit.",
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without large pages: slower, not wrong
                # They make direct reads cheaper, which pin every page that they write to.
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = memoryview(self._map)
        self.tensor = torch.frombuffer(self.bytes, dtype=torch.uint8)
        self._pinned = pinned
        if pinned:
            code = _cuda_runtime().cudaHostRegister(self.tensor.data_ptr(), self.nbytes, 0)
            if int(code) != 0:
                raise EngineError(
                    f"CUDA could not pin a staging buffer of {self.nbytes} bytes (error {int(code)}).",
                    remedy="Raise the locked-memory limit (`ulimit -l`), or lower offload.prefetch_bytes.",
                )

    def view(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A tensor over the buffer's bytes from `offset` (a multiple of the item size); no copy."""
        count = 1
        for size in shape:
            count *= size
        return self.tensor[offset : offset + count * dtype.itemsize].view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Takes back the pinning; the memory itself goes with the last view. Safe to repeat."""
        if self._pinned:
            self._pinned = False
            _cuda_runtime().cudaHostUnregister(self.tensor.data_ptr())


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class ReadMeasurement:
    """What the start-up measurement saw of one way to read."""

    kind: str
    bytes_per_second: float
    cpu_seconds_per_byte: float
    bytes_read: int


class Reader(Protocol):
    """A way to read. `kind` is `direct` or `buffered`; `measurements` are those it was chosen by (may be empty)."""

    kind: str
    measurements: tuple[ReadMeasurement, ...]

    def read(self, file: Path, offset: int, nbytes: int, buffer: AlignedBuffer, buffer_offset: int) -> int:
        """Reads bytes `offset` to `offset + nbytes` of `file`; returns where in the buffer they start.

        That is `buffer_offset + offset % PAGE`; `buffer_offset` is a multiple of PAGE and the buffer has room for every
        page that the span touches (the rest of those pages may be overwritten). Raises EngineError with file and
        offset. Safe to call from several threads.
        """
        ...

    def close(self) -> None:
        """Closes the files. Reads must be over."""
        ...


class BufferedReader:
    """Through the page cache, whose pages are dropped right after each read."""

    kind = "buffered"

    def __init__(self, measurements: tuple[ReadMeasurement, ...] = ()) -> None:
        self.measurements = measurements
        self._files = _OpenFiles(os.O_RDONLY)

    def read(self, file: Path, offset: int, nbytes: int, buffer: AlignedBuffer, buffer_offset: int) -> int:
        start = buffer_offset + offset % PAGE
        descriptor = self._files.descriptor(file)
        _read_span(descriptor, file, offset, nbytes, nbytes, buffer.bytes[start : start + nbytes])
        if hasattr(os, "posix_fadvise"):
            first = page_floor(offset)
            os.posix_fadvise(descriptor, first, page_ceil(offset + nbytes) - first, os.POSIX_FADV_DONTNEED)
        return start

    def close(self) -> None:
        self._files.close()


class DirectReader:
    """Past the page cache (O_DIRECT), in whole pages. Where a filesystem refuses that (tmpfs, some network ones), the
    file is read buffered instead; `refused` lists such files."""

    kind = "direct"

    def __init__(self, measurements: tuple[ReadMeasurement, ...] = ()) -> None:
        self.measurements = measurements
        self.refused: set[Path] = set()
        self._files = _OpenFiles(os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        self._buffered = BufferedReader()

    def read(self, file: Path, offset: int, nbytes: int, buffer: AlignedBuffer, buffer_offset: int) -> int:
        if file not in self.refused:
            first = page_floor(offset)
            span = page_ceil(offset + nbytes) - first
            target = buffer.bytes[buffer_offset : buffer_offset + span]
            try:
                descriptor = self._files.descriptor(file)
                _read_span(descriptor, file, first, span, offset + nbytes - first, target)
                return buffer_offset + offset - first
            except _Refused:
                self.refused.add(file)
        return self._buffered.read(file, offset, nbytes, buffer, buffer_offset)

    def close(self) -> None:
        self._files.close()
        self._buffered.close()


class _Refused(Exception):
    """The filesystem does not take direct reads."""


def _read_span(descriptor: int, file: Path, offset: int, nbytes: int, needed: int, target: memoryview) -> None:
    """Fills `target` from `offset`; at least `needed` bytes must come (the file may end inside the last page)."""
    direct = nbytes % PAGE == 0 and offset % PAGE == 0
    done = 0
    while done < needed:
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL and direct:
                raise _Refused from error
            raise _failed(file, offset + done, nbytes - done, error.strerror or str(error)) from error
        if count == 0:
            raise _failed(file, offset + done, needed - done, "the file ends before that")
        done += count


def _failed(file: Path, offset: int, nbytes: int, why: str) -> EngineError:
    return EngineError(
        f"Reading {nbytes} bytes at byte {offset} of {file} failed: {why}.",
        remedy="Check the disk and that nobody changes the model's files, then start the same command again.",
    )


class _OpenFiles:
    """File descriptors by path, opened once and shared by threads (positional reads need no lock)."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, file: Path) -> int:
        found = self._descriptors.get(file)
        if found is not None:
            return found
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(file, self._flags | getattr(os, "O_CLOEXEC", 0))
                except OSError as error:
                    if error.errno == errno.EINVAL and self._flags & getattr(os, "O_DIRECT", 0):
                        raise _Refused from error
                    raise _failed(file, 0, 0, error.strerror or str(error)) from error
            return self._descriptors[file]

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
