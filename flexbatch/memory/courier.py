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

from flexbatch.memory.direct_io import PAGE, AlignedBuffer, Reader, page_ceil
from flexbatch.memory.stream_layout import FileConversion, FileSpan, HostSpan, Job, Region


class Courier:
    """Carries jobs to a ring in main memory. `bytes_moved` counts by link; `ring` is bytes (uint8)."""

    link_from_disk = "disk>device"

    def __init__(
        self, reader: Reader, ring: torch.Tensor, ring_buffer: AlignedBuffer | None, staging_bytes: int
    ) -> None:
        self.bytes_moved: Counter[str] = Counter()
        self._reader = reader
        self.ring = ring
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
            target = self.ring[place : place + source.numel() * dtype.itemsize].view(dtype)
            target.copy_(source, non_blocking=True)
        self._delivered()

    def _ordered(self, after: Sequence[torch.cuda.Event]) -> AbstractContextManager[object]:  # noqa: ARG002
        return nullcontext()

    def _delivered(self) -> None:
        """Called after each delivery."""


class CudaCourier(Courier):
    """Through two pinned staging buffers in turn, on a copy stream of its own."""

    link_from_disk = "disk>host"

    def __init__(self, reader: Reader, ring: torch.Tensor, staging_bytes: int) -> None:
        super().__init__(reader, ring, None, 0)
        self._pair = [AlignedBuffer(staging_bytes // 2, pinned=True) for _ in range(2 if staging_bytes else 0)]
        self._used: list[torch.cuda.Event | None] = [None] * len(self._pair)
        self._turn = 0
        self._stream: torch.cuda.Stream = torch.cuda.Stream(ring.device)  # type: ignore[no-untyped-call]

    def carry(self, job: Job, place: int, after: Sequence[torch.cuda.Event]) -> None:
        super().carry(job, place, after)
        if not isinstance(job, HostSpan):
            self.bytes_moved["host>device"] += job.nbytes

    def event(self) -> torch.cuda.Event | None:
        event: torch.cuda.Event = self._stream.record_event()
        return event

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
        if self.ring.device.type == "mps":
            torch.mps.synchronize()


def staging_bytes(regions: Sequence[Sequence[Region]], device: torch.device, threads: int, chunk_bytes: int) -> int:
    """Main memory for the couriers' own buffers: none where every byte can be read straight into the ring."""
    staged = [
        job.nbytes
        for unit in regions
        for region in unit
        for job in region.jobs
        if isinstance(job, FileConversion) or (device.type != "cpu" and not isinstance(job, HostSpan))
    ]
    if not staged:
        return 0
    one = page_ceil(min(chunk_bytes, max(staged))) + 2 * PAGE
    return one * threads * (2 if device.type == "cuda" else 1)


def staged_on_device(device: torch.device, staging_bytes: int) -> int:
    """What staging takes from the device's budget: on the CPU device and staging are the same memory."""
    return staging_bytes if device.type == "cpu" else 0


def make_courier(reader: Reader, ring: torch.Tensor, buffer: AlignedBuffer | None, staging_bytes: int) -> Courier:
    """The courier for the ring's device; `buffer` is the ring itself where it is main memory."""
    if buffer is not None:
        return Courier(reader, ring, buffer, staging_bytes)
    if ring.is_cuda:
        return CudaCourier(reader, ring, staging_bytes)
    return CopyingCourier(reader, ring, staging_bytes)
