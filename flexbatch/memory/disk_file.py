"""A file of ours for as long as the process lives: preallocated, nameless, read and written past the page cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from flexbatch.errors import EngineError
from flexbatch.memory.tiers import nameless_file


class DiskFile:
    """`nbytes` on the disk. Nothing is left of it however the process ends.

    Offsets, lengths and addresses are multiples of a page (`direct_io.PAGE`). Where a filesystem has no direct access
    (tmpfs, some network ones), or wants other multiples, the page cache is used. Reads and writes of different spans
    are safe from several threads. CapacityError if the disk has no room, OutputError if the folder cannot be written.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.nbytes, self._folder = nbytes, folder
        self._descriptor = nameless_file(folder, nbytes)
        self._is_direct = False
        with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux, and on tmpfs
            self._set_direct(True)

    def read(self, offset: int, target: memoryview) -> None:
        """Fills `target` from byte `offset` on. EngineError with folder and offset where the disk fails."""
        self._carry(os.preadv, "Reading", offset, target)

    def write(self, offset: int, source: memoryview) -> None:
        """Puts `source` at byte `offset`. EngineError likewise."""
        self._carry(os.pwritev, "Writing", offset, source)

    def close(self) -> None:
        """Gives the disk space back. Reads and writes must be over; safe to repeat."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _set_direct(self, wanted: bool) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        self._is_direct = wanted

    def _carry(
        self, call: Callable[[int, list[memoryview], int], int], what: str, offset: int, memory: memoryview
    ) -> None:
        done = 0
        while done < len(memory):
            was_direct = self._is_direct
            try:
                count = call(self._descriptor, [memory[done:]], offset + done)
                if not count:
                    raise OSError(errno.EIO, "the file ends there")
            except OSError as error:
                if error.errno == errno.EINVAL and was_direct:
                    self._set_direct(False)
                    continue
                span = f"{len(memory) - done} bytes at byte {offset + done} of a file for tensors in {self._folder}"
                raise EngineError(
                    f"{what} {span} failed: {error.strerror}.",
                    remedy="Check the disk, or set offload.disk_dir to another, and start the same command again.",
                ) from error
            done += count
