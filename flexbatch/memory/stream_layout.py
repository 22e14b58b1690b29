"""How streamed tensors lie in the stream's ring buffer, and which pieces of work bring them there. Pure arithmetic.

A unit becomes regions (contiguous stretches of the ring), a region becomes jobs (pieces that threads share). Positions
are virtual: they only grow, and the place in the ring is the position modulo the ring's size. A region never straddles
the ring's end, and a unit never spans more than the ring, so whatever is still held, a unit fits once it is the oldest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexbatch.errors import EngineError
from flexbatch.memory.direct_io import PAGE, page_ceil, page_floor
from flexbatch.memory.safetensors_header import TensorEntry

COALESCED_GAP = 64 << 10
"""Bytes between two tensors up to which reading on is cheaper than a second read."""
SMALL_READ = 1 << 20
"""Bytes up to which a read joins its neighbour even if the two are longer than a chunk."""


@dataclass(frozen=True)
class StreamTensor:
    """One tensor of a unit: `source` is a place in a file (tier disk) or a contiguous tensor in main memory (host).

    It is delivered in `target_dtype` (None: as stored).
    """

    name: str
    source: TensorEntry | torch.Tensor
    target_dtype: torch.dtype | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.source.dtype if isinstance(self.source, torch.Tensor) else self.source.torch_dtype

    @property
    def delivered_dtype(self) -> torch.dtype:
        return self.target_dtype or self.stored_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def count(self) -> int:
        return self.delivered_nbytes // self.delivered_dtype.itemsize

    @property
    def delivered_nbytes(self) -> int:
        nbytes = self.delivered_dtype.itemsize
        for size in self.shape:
            nbytes *= size
        return nbytes


@dataclass(frozen=True)
class StreamUnit:
    """What is needed at one moment: the streamed tensors of one decoder layer, of the embedding, of the head."""

    name: str
    tensors: tuple[StreamTensor, ...]


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes of a file that go to the ring as they are; `at` is relative to the region."""

    file: Path
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class FileConversion:
    """`count` items of a file that change their type (or only their alignment) on the way."""

    file: Path
    offset: int
    count: int
    stored: torch.dtype
    delivered: torch.dtype
    at: int

    @property
    def nbytes(self) -> int:
        return self.count * self.stored.itemsize


@dataclass(frozen=True)
class HostSpan:
    """Part of a tensor in main memory (one dimension), delivered as `delivered`."""

    source: torch.Tensor
    delivered: torch.dtype
    at: int

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


Job = FileSpan | FileConversion | HostSpan


@dataclass(frozen=True, slots=True)
class View:
    """A delivered tensor: `at` bytes into its region."""

    name: str
    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A contiguous stretch of the ring (`nbytes`, whole pages), the tensors in it, and the jobs that fill it."""

    nbytes: int
    views: tuple[View, ...]
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class PlacedUnit:
    """One turn of unit number `index`: its regions and their virtual positions, from `start` to `end`."""

    index: int
    regions: tuple[Region, ...]
    positions: tuple[int, ...]
    start: int
    end: int


Phase = Callable[[int], int]
"""From a file offset to where in a region's first page its byte goes."""


def page_phase(offset: int) -> int:
    """Same place in the page as in the file: what direct reads into the ring need."""
    return offset % PAGE


def item_phase(offset: int) -> int:
    """At the start of the page where the largest item type allows it: for copies, which may land anywhere."""
    return offset % 8


def unit_regions(unit: StreamUnit, chunk_bytes: int, phase: Phase) -> tuple[Region, ...]:
    """The regions of one unit: runs of neighbouring tensors of a file, then tensors that are converted or copied."""
    entries: list[tuple[StreamTensor, TensorEntry]] = []
    regions: list[Region] = []
    for tensor in unit.tensors:
        if isinstance(tensor.source, torch.Tensor):
            regions.append(_host_region(tensor, tensor.source, chunk_bytes))
        elif tensor.delivered_dtype != tensor.stored_dtype or tensor.source.offset % tensor.stored_dtype.itemsize:
            regions.append(_converted_region(tensor, tensor.source, chunk_bytes))
        else:
            entries.append((tensor, tensor.source))
    entries.sort(key=lambda pair: (str(pair[1].file), pair[1].offset))
    return (*(_run_region(run, chunk_bytes, phase) for run in _runs(entries, chunk_bytes)), *regions)


def _runs(
    entries: Sequence[tuple[StreamTensor, TensorEntry]], chunk_bytes: int
) -> Iterator[list[tuple[StreamTensor, TensorEntry]]]:
    """Neighbours of a file, joined while that stays within a chunk or one of the two is small."""
    run: list[tuple[StreamTensor, TensorEntry]] = []
    for tensor, entry in entries:
        if run:
            first, last = run[0][1], run[-1][1]
            gap = entry.offset - (last.offset + last.nbytes)
            length = last.offset + last.nbytes - first.offset
            near = entry.file == last.file and 0 <= gap <= COALESCED_GAP
            fits = length + entry.nbytes <= chunk_bytes or min(length, entry.nbytes) <= SMALL_READ
            if not (near and fits):
                yield run
                run = []
        run.append((tensor, entry))
    if run:
        yield run


def _run_region(run: Sequence[tuple[StreamTensor, TensorEntry]], chunk_bytes: int, phase: Phase) -> Region:
    first, last = run[0][1], run[-1][1]
    shift = phase(first.offset) - first.offset
    end = last.offset + last.nbytes
    jobs: list[Job] = []
    offset = first.offset
    while offset < end:
        # Cut at whole pages of the file, so that the pieces of a direct read do not overlap.
        cut = min(end, page_floor(offset) + max(PAGE, page_floor(chunk_bytes)))
        jobs.append(FileSpan(first.file, offset, cut - offset, offset + shift))
        offset = cut
    views = tuple(View(tensor.name, entry.offset + shift, entry.torch_dtype, entry.shape) for tensor, entry in run)
    return Region(page_ceil(end + shift), views, tuple(jobs))


def _converted_region(tensor: StreamTensor, entry: TensorEntry, chunk_bytes: int) -> Region:
    stored, delivered = tensor.stored_dtype, tensor.delivered_dtype
    jobs = tuple(
        FileConversion(
            entry.file, entry.offset + first * stored.itemsize, count, stored, delivered, first * delivered.itemsize
        )
        for first, count in _cuts(tensor.count, chunk_bytes // stored.itemsize)
    )
    view = View(tensor.name, 0, delivered, tensor.shape)
    return Region(page_ceil(tensor.delivered_nbytes), (view,), jobs)


def _host_region(tensor: StreamTensor, source: torch.Tensor, chunk_bytes: int) -> Region:
    if not source.is_contiguous():
        raise EngineError(f"The host tensor {tensor.name!r} is not contiguous, so it cannot be streamed.")
    flat, delivered = source.detach().view(-1), tensor.delivered_dtype
    jobs = tuple(
        HostSpan(flat[first : first + count], delivered, first * delivered.itemsize)
        for first, count in _cuts(tensor.count, chunk_bytes // flat.dtype.itemsize)
    )
    view = View(tensor.name, 0, delivered, tensor.shape)
    return Region(page_ceil(tensor.delivered_nbytes), (view,), jobs)


def _cuts(count: int, step: int) -> Iterator[tuple[int, int]]:
    step = max(1, step)
    for first in range(0, count, step):
        yield first, min(step, count - first)


def placements(units: Sequence[Sequence[Region]], ring_bytes: int) -> Iterator[PlacedUnit]:
    """Virtual positions of the units, pass after pass. Each unit must be no longer than the ring."""
    position = 0
    for index in itertools.cycle(range(len(units))):
        regions = tuple(units[index])
        positions, end = _positions(regions, position, ring_bytes)
        if positions and end - positions[0] > ring_bytes:
            positions, end = _positions(regions, position + -position % ring_bytes, ring_bytes)
        yield PlacedUnit(index, regions, positions, positions[0] if positions else end, end)
        position = end


def _positions(regions: Sequence[Region], position: int, ring_bytes: int) -> tuple[tuple[int, ...], int]:
    positions = []
    for region in regions:
        if position % ring_bytes + region.nbytes > ring_bytes:
            position += -position % ring_bytes
        positions.append(position)
        position += region.nbytes
    return tuple(positions), position
