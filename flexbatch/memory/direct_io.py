"""Reading spans of files into persistent aligned buffers: direct (O_DIRECT) and buffered, and the choice between them.

Direct reads bypass the page cache: the disk writes into our buffer, at about 0.015 core-seconds per GB, and the page
cache cannot grow past a memory limit. Buffered reads work on every filesystem; their pages are given back after use,
because a cyclic scan never finds them again. Which is faster depends on disk and filesystem, so it is measured.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from flexbatch.errors import CapacityError, ConfigError, EngineError

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


PROBE_BYTES = 8 << 20
PROBE_ROUNDS = 2
PROBE_LIMIT_BYTES = 64 << 20
PROBE_SECONDS = 0.1
"""Of a round: at most so many bytes, or so long."""


def choose_reader(
    sample_files: Sequence[Path], mode: str = "auto", *, threads: int = 4
) -> DirectReader | BufferedReader:
    """The reader for these files: the one that `mode` names (`direct`, `buffered`), or the better one (`auto`).

    The measurement reads at most 128 MiB and 0.2 s each way, in two rounds, of which the faster one counts: disks
    pause. The way that costs less wins (`cheapest`). Under 32 MiB of files mean direct.
    """
    if mode not in ("auto", "direct", "buffered"):
        raise ConfigError(f"offload.reader is {mode!r}.", remedy="Use auto, direct or buffered.")
    if mode == "buffered":
        return BufferedReader()
    spans = [
        (file, offset)
        for file in sample_files
        for offset in range(0, file.stat().st_size - PROBE_BYTES + 1, PROBE_BYTES)
    ]
    if mode == "direct" or len(spans) < 2 * PROBE_ROUNDS:
        return DirectReader()
    # Every round of each way gets its own spans, so that none finds another's pages in a cache.
    parts = [spans[first :: 2 * PROBE_ROUNDS] for first in range(2 * PROBE_ROUNDS)]
    readers = [way() for _ in range(PROBE_ROUNDS) for way in (DirectReader, BufferedReader)]
    measured = [_measure(reader, part, threads) for reader, part in zip(readers, parts, strict=True)]
    best = fastest_rounds(measured)
    return DirectReader(best) if cheapest(best).kind == DirectReader.kind else BufferedReader(best)


def fastest_rounds(measured: Sequence[ReadMeasurement]) -> tuple[ReadMeasurement, ...]:
    """Of each way the round that was the fastest one."""
    best: dict[str, ReadMeasurement] = {}
    for each in sorted(measured, key=lambda each: each.bytes_per_second):
        best[each.kind] = each
    return tuple(best[kind] for kind in dict.fromkeys(each.kind for each in measured))


def cheapest(ways: Sequence[ReadMeasurement]) -> ReadMeasurement:
    """The one that costs the fewest seconds for a byte: those that it takes, and those that it takes from arithmetic,
    because reader threads need the processor too (a copy out of the page cache 0.35 ns, half a core at 1.3 GB/s)."""
    cores = os.cpu_count() or 1
    return min(ways, key=lambda way: 1 / max(way.bytes_per_second, 1e-9) + way.cpu_seconds_per_byte / cores)


def _measure(reader: DirectReader | BufferedReader, spans: Sequence[tuple[Path, int]], threads: int) -> ReadMeasurement:
    """Reads spans with several threads until time or bytes run out; pages cached by others are dropped first."""
    spans = spans[: PROBE_LIMIT_BYTES // PROBE_BYTES]
    for file, offset in spans:
        _drop_cached(file, offset, PROBE_BYTES)
    buffer = AlignedBuffer(threads * PROBE_BYTES)
    buffer.tensor.zero_()  # touched beforehand, as the stream's own buffer is after its first round
    remaining, lock = iter(spans), threading.Lock()
    done: list[tuple[int, float]] = []
    errors: list[EngineError] = []
    started = time.perf_counter()

    def work(position: int) -> None:
        cpu_started = time.thread_time()
        nbytes = 0
        try:
            for file, offset in _shared(remaining, lock):
                reader.read(file, offset, PROBE_BYTES, buffer, position * PROBE_BYTES)
                nbytes += PROBE_BYTES
                if time.perf_counter() - started > PROBE_SECONDS:
                    break
        except EngineError as error:
            errors.append(error)
        done.append((nbytes, time.thread_time() - cpu_started))

    workers = [threading.Thread(target=work, args=(position,), daemon=True) for position in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    reader.close()
    if errors:
        raise errors[0]
    total = sum(nbytes for nbytes, _ in done)
    elapsed = time.perf_counter() - started
    return ReadMeasurement(reader.kind, total / elapsed, sum(cpu for _, cpu in done) / max(total, 1), total)


def _shared(spans: Iterator[tuple[Path, int]], lock: threading.Lock) -> Iterator[tuple[Path, int]]:
    while True:
        with lock:
            span = next(spans, None)
        if span is None:
            return
        yield span


def _drop_cached(file: Path, offset: int, nbytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
