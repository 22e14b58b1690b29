"""Which way to read weights is the better one on this disk, by a short measurement at start-up."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from flexbatch.errors import ConfigError, EngineError
from flexbatch.memory.direct_io import AlignedBuffer, BufferedReader, DirectReader, ReadMeasurement

logger = logging.getLogger(__name__)

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
    if cheapest(best).kind == DirectReader.kind:
        return DirectReader(best)
    rates = ", ".join(f"{each.kind} {each.bytes_per_second / 1e9:.2f} GB/s" for each in best)
    logger.warning("Weights are read through the page cache, the faster way at the start (%s)", rates)
    return BufferedReader(best)


def fastest_rounds(measured: Sequence[ReadMeasurement]) -> tuple[ReadMeasurement, ...]:
    """Of each way the round that was the fastest one."""
    return tuple({each.kind: each for each in sorted(measured, key=lambda each: each.bytes_per_second)}.values())


def cheapest(ways: Sequence[ReadMeasurement]) -> ReadMeasurement:
    """The one that costs the fewest seconds for a byte: those that it takes, and those that it takes from arithmetic,
    because reader threads need the processor too (a copy out of the page cache 0.35 ns, half a core at 1.3 GB/s)."""
    threads = torch.get_num_threads()
    return min(ways, key=lambda way: 1 / max(way.bytes_per_second, 1e-9) + way.cpu_seconds_per_byte / threads)


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
