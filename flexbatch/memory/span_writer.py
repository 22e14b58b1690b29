"""Writing spans of a named file past the page cache, wherever they begin and end."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from flexbatch.memory.direct_io import AlignedBuffer, page_ceil, page_floor

STEP_BYTES = 8 << 20
"""Written in one go, out of an aligned buffer."""


class SpanWriter:
    """Writes to an existing file of its final size. Not for several threads at once; OSError where the disk fails.

    A write through the page cache waits for the disk when it is asked for, at a third of the rate of one past it
    (docs/benchmarks.md). Whole pages go past it, what a span has of other pages through it. Where the filesystem has no
    direct access all goes through it.
    """

    def __init__(self, file: Path) -> None:
        self._step = AlignedBuffer(STEP_BYTES)
        self._buffered = os.open(file, os.O_RDWR)
        self._direct: int | None = None
        with contextlib.suppress(OSError, AttributeError):  # tmpfs, or elsewhere than on Linux
            self._direct = os.open(file, os.O_RDWR | os.O_DIRECT)

    def write(self, span: memoryview, offset: int) -> None:
        """Puts the bytes of `span` at byte `offset`."""
        nbytes = len(span)
        first = min(page_ceil(offset) - offset, nbytes)
        last = max(first, page_floor(offset + nbytes) - offset)
        _write_at(self._buffered, span[:first], offset)
        for begin in range(first, last, STEP_BYTES):
            self._write_pages(span[begin : min(begin + STEP_BYTES, last)], offset + begin)
        _write_at(self._buffered, span[last:], offset + last)

    def sync(self) -> None:
        """Returns when all that was written is on the medium."""
        os.fsync(self._buffered)

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)

    def _write_pages(self, span: memoryview, offset: int) -> None:
        if self._direct is None:
            _write_at(self._buffered, span, offset)
            return
        self._step.bytes[: len(span)] = span
        try:
            _write_at(self._direct, self._step.bytes[: len(span)], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(self._direct)
            self._direct = None
            _write_at(self._buffered, span, offset)


def _write_at(descriptor: int, span: memoryview, offset: int) -> None:
    while span:
        written = os.pwrite(descriptor, span, offset)
        span, offset = span[written:], offset + written
