"""Couriers carry one job's bytes into the ring; each worker thread has its own.

On the CPU files are read straight into the ring. Elsewhere they go through a staging buffer of the courier; on CUDA
that is pinned, the copies run on the courier's own stream, and events say when they are done: nobody waits for the
whole device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from flexbatch.memory.direct_io import PAGE, AlignedBuffer, Reader
from flexbatch.memory.stream_layout import FileConversion, FileSpan, HostSpan, Job


class Courier:
    """Carries jobs to a ring in main memory. `bytes_moved` counts by link."""

    link_from_disk = "disk>device"

    def __init__(
        self, reader: Reader, ring: torch.Tensor, ring_buffer: AlignedBuffer | None, staging_bytes: int
    ) -> None:
        self.bytes_moved: Counter[str] = Counter()
        self._reader = reader
        self._ring = ring
        self._ring_buffer = ring_buffer
        self._staging_bytes = staging_bytes
        self._staging = AlignedBuffer(staging_bytes) if staging_bytes else None

    def carry(self, job: Job, place: int, after: Sequence[torch.cuda.Event]) -> None:
        """Brings the job's bytes to byte `place` of the ring, once the events in `after` have passed."""
        if isinstance(job, HostSpan):
            self._deliver(job.source, place, job.delivered, after)
            self.bytes_moved["host>device"] += job.nbytes
            return
        self.bytes_moved[self.link_from_disk] += job.nbytes
        if isinstance(job, FileConversion):
            self._deliver(self._staged(job).view(job.stored), place, job.delivered, after)
        elif self._ring_buffer is not None:
            self._reader.read(job.file, job.offset, job.nbytes, self._ring_buffer, place - job.offset % PAGE)
        else:
            self._deliver(self._staged(job), place, torch.uint8, after)

    def event(self) -> torch.cuda.Event | None:
        """Passes when everything carried so far has arrived; None where `carry` returns only then."""
        return None

    def close(self) -> None:
        if self._staging is not None:
            self._staging.close()

    def _staged(self, job: FileSpan | FileConversion) -> torch.Tensor:
        """The job's bytes in the staging buffer, aligned for its type."""
        staging = self._free_staging()
        start = self._reader.read(job.file, job.offset, job.nbytes, staging, 0)
        found = staging.tensor[start : start + job.nbytes]
        if isinstance(job, FileConversion) and start % job.stored.itemsize:
            return found.clone()
        return found

    def _free_staging(self) -> AlignedBuffer:
        assert self._staging is not None
        return self._staging

    def _deliver(self, source: torch.Tensor, place: int, dtype: torch.dtype, after: Sequence[torch.cuda.Event]) -> None:
        with self._ordered(after):
            target = self._ring[place : place + source.numel() * dtype.itemsize].view(dtype)
            target.copy_(source, non_blocking=True)
        self._delivered()

    def _ordered(self, after: Sequence[torch.cuda.Event]) -> AbstractContextManager[object]:
        return nullcontext()

    def _delivered(self) -> None:
        """Called after each delivery."""


class CudaCourier(Courier):
    """Through two pinned staging buffers in turn, on a copy stream of its own."""

    link_from_disk = "disk>host"

    def __init__(self, reader: Reader, ring: torch.Tensor, staging_bytes: int) -> None:
        super().__init__(reader, ring, None, 0)
        self._pair = [AlignedBuffer(staging_bytes, pinned=True) for _ in range(2 if staging_bytes else 0)]
        self._used: list[torch.cuda.Event | None] = [None] * len(self._pair)
        self._turn = 0
        self._stream = torch.cuda.Stream(ring.device)

    def carry(self, job: Job, place: int, after: Sequence[torch.cuda.Event]) -> None:
        super().carry(job, place, after)
        if not isinstance(job, HostSpan):
            self.bytes_moved["host>device"] += job.nbytes

    def event(self) -> torch.cuda.Event | None:
        return self._stream.record_event()

    def close(self) -> None:
        self._stream.synchronize()
        for staging in self._pair:
            staging.close()

    def _free_staging(self) -> AlignedBuffer:
        self._turn = 1 - self._turn
        used = self._used[self._turn]
        if used is not None:
            used.synchronize()
        return self._pair[self._turn]

    def _ordered(self, after: Sequence[torch.cuda.Event]) -> AbstractContextManager[object]:
        for event in after:
            self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)

    def _delivered(self) -> None:
        if self._pair:
            self._used[self._turn] = self._stream.record_event()


class CopyingCourier(Courier):
    """For other accelerators: through a staging buffer, each copy finished before the next."""

    link_from_disk = "disk>device"

    def __init__(self, reader: Reader, ring: torch.Tensor, staging_bytes: int) -> None:
        super().__init__(reader, ring, None, staging_bytes)

    def _delivered(self) -> None:
        if self._ring.device.type == "mps":
            torch.mps.synchronize()
