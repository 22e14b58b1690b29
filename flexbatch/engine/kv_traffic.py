"""Carries the blocks of a KV cache on disk: read ahead of their use, a few at a time, and written behind it.

A layer's slots are blocks of a file, one after the other, carried past the page cache. They come into rooms that all
layers use in turn; what the decode batch has attended to makes room for those of the next layer.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from flexbatch.engine.kv_form import Parts
from flexbatch.memory.direct_io import AlignedBuffer, page_ceil
from flexbatch.memory.disk_file import DiskFile
from flexbatch.memory.transfer import NO_STATISTICS, StreamStatistics
from flexbatch.plan.kv_rooms import OUTGOING_BLOCKS, reading_rooms

READ_BYTES = 8 << 20
READERS = 3

PartShape = tuple[tuple[int, int, int], torch.dtype]
"""Heads, columns and numbers of a slot's part, and their type."""


@dataclass(frozen=True)
class BlockLayout:
    """A slot as bytes: its parts one after the other, in whole pages."""

    shapes: Sequence[PartShape]

    @property
    def columns(self) -> int:
        return self.shapes[0][0][1]

    @property
    def nbytes(self) -> int:
        return sum(page_ceil(_bytes_of(shape)) for shape in self.shapes)

    def views(self, buffer: AlignedBuffer, count: int) -> Parts:
        """The parts `[count, heads, columns, ...]` of the blocks in a buffer."""
        blocks = buffer.tensor[: count * self.nbytes].view(count, self.nbytes)
        views, start = [], 0
        for shape in self.shapes:
            (sizes, dtype), nbytes = shape, _bytes_of(shape)
            views.append(blocks[:, start : start + nbytes].view(dtype).view(count, *sizes))
            start += page_ceil(nbytes)
        return tuple(views)

    def slot(self, buffer: AlignedBuffer) -> Parts:
        """The parts `[heads, columns, ...]` of the first block in a buffer."""
        return tuple(part[0] for part in self.views(buffer, 1))


@dataclass(frozen=True, eq=False)
class DiskBlocks:
    """The blocks of one layer's slots from `first` on, numbered from 0 here."""

    first: int
    count: int
    layout: BlockLayout
    file: DiskFile


@dataclass(frozen=True)
class _Reading:
    """Some slots of a layer on their way into a room."""

    of: DiskBlocks
    slots: slice
    room: AlignedBuffer
    reads: list[Future[None]]


@dataclass(frozen=True)
class _Sent:
    """A block on its way to a slot of a layer."""

    of: DiskBlocks
    slot: int
    block: AlignedBuffer
    written: Future[None]


class DiskTraffic:
    """Carries all layers' blocks: rooms to read into, which all use in turn, a few blocks for what is to be written,
    and the threads. To be used by one thread. `admit` is asked for bytes of memory before they are taken."""

    def __init__(self, admit: Callable[[int], None]) -> None:
        self._admit = admit
        self._layers: list[DiskBlocks] = []
        self._room_bytes = 0
        self._rooms: list[AlignedBuffer] = []
        self._ahead: deque[_Reading] = deque()
        self._free: list[AlignedBuffer] = []
        self._sent: deque[_Sent] = deque()
        self._made = 0
        self._waited, self._moved = 0.0, Counter[str]()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="kv-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-writer")

    def add(self, blocks: DiskBlocks) -> None:
        """The next layer's, in the order of use."""
        self._layers.append(blocks)

    def admitted(self, nbytes: int) -> AlignedBuffer:
        self._admit(nbytes)
        return AlignedBuffer(nbytes)

    def take(self, blocks: DiskBlocks, rows: int) -> Iterator[tuple[slice, Parts]]:
        """The slots 0 to rows - 1 of the layer as they are on disk, some at a time; what comes after them, here and in
        the next layers, is read meanwhile."""
        for some in self._cut(blocks, 0, rows):
            reading = self._arriving(blocks, some)
            try:
                self._read_ahead(reading, blocks.first + rows)
                self._await(reading.reads)
                yield some, blocks.layout.views(reading.room, some.stop - some.start)
            finally:
                self._rooms.append(reading.room)

    def fetch(self, blocks: DiskBlocks, slot: int) -> AlignedBuffer:
        """One slot's block as it is on disk, at once."""
        self._discard()
        reading = self._begin(blocks, slice(slot, slot + 1))
        self._rooms.append(reading.room)
        self._await(reading.reads)
        return reading.room

    def outgoing(self, nbytes: int) -> AlignedBuffer:
        """A block to be filled and sent; waits where all are under way."""
        while not self._free and self._made >= OUTGOING_BLOCKS:
            self._land()
        if not self._free:
            self._made += 1
            return self.admitted(nbytes)
        block = self._free.pop()
        return block if block.nbytes >= nbytes else self.admitted(nbytes)

    def send(self, blocks: DiskBlocks, slot: int, block: AlignedBuffer) -> None:
        if any(ahead.of is blocks and ahead.slots.start <= slot < ahead.slots.stop for ahead in self._ahead):
            self._discard()  # it was read too early
        size = blocks.layout.nbytes
        written = self._writer.submit(blocks.file.write, slot * size, block.bytes[:size])
        self._moved["device>disk"] += size
        self._sent.append(_Sent(blocks, slot, block, written))

    def statistics(self) -> StreamStatistics:
        """Bytes by link and seconds that the walk waited, since the start; nothing else is counted."""
        return replace(NO_STATISTICS, bytes_moved=Counter(self._moved), wait_seconds=self._waited)

    def close(self) -> None:
        """Waits for what is under way. Safe to repeat."""
        self._readers.shutdown()
        self._writer.shutdown()

    def _land(self) -> None:
        sent = self._sent.popleft()
        self._free.append(sent.block)
        self._await([sent.written])

    def _arriving(self, blocks: DiskBlocks, some: slice) -> _Reading:
        """These slots on their way: read ahead, or as of now."""
        if self._ahead and self._ahead[0].of is blocks and self._ahead[0].slots == some:
            return self._ahead.popleft()
        self._discard()
        return self._begin(blocks, some)

    def _read_ahead(self, current: _Reading, live: int) -> None:
        """Into all free rooms what comes after `current` and what is read already, of a decode batch of `live` rows."""
        last = self._ahead[-1] if self._ahead else current
        for blocks in self._layers[self._layers.index(last.of) :]:
            start = last.slots.stop if blocks is last.of else 0
            for some in self._cut(blocks, start, min(blocks.count, live - blocks.first)):
                if not self._rooms:
                    return
                self._ahead.append(self._begin(blocks, some))

    def _discard(self) -> None:
        """What was read ahead is not needed."""
        while self._ahead:
            reading = self._ahead.popleft()
            self._rooms.append(reading.room)
            self._await(reading.reads)

    def _cut(self, blocks: DiskBlocks, start: int, stop: int) -> Iterator[slice]:
        """The slots from `start` on to `stop` - 1, as many at a time as a room takes."""
        self._make_rooms()
        at_once = self._room_bytes // blocks.layout.nbytes
        for first in range(start, stop, at_once):
            yield slice(first, min(first + at_once, stop))

    def _make_rooms(self) -> None:
        """At first use, when all layers are known."""
        if self._room_bytes:
            return
        block = max(blocks.layout.nbytes for blocks in self._layers)
        at_once, rooms = reading_rooms(max(blocks.count for blocks in self._layers), block)
        self._rooms = [self.admitted(at_once * block) for _ in range(rooms)]
        self._room_bytes = at_once * block

    def _begin(self, blocks: DiskBlocks, some: slice) -> _Reading:
        """Reads some slots into a free room, once what was sent to them is there."""
        while any(sent.of is blocks and some.start <= sent.slot < some.stop for sent in self._sent):
            self._land()
        self._make_rooms()
        room, size = self._rooms.pop(), blocks.layout.nbytes
        start, end = some.start * size, some.stop * size
        cuts = [(offset, min(offset + READ_BYTES, end)) for offset in range(start, end, READ_BYTES)]
        reads = [self._readers.submit(blocks.file.read, at, room.bytes[at - start : stop - start]) for at, stop in cuts]
        self._moved["disk>device"] += end - start
        return _Reading(blocks, some, room, reads)

    def _await(self, work: Iterable[Future[None]]) -> None:
        started = time.perf_counter()
        for each in work:
            each.result()
        self._waited += time.perf_counter() - started


def _bytes_of(shape: PartShape) -> int:
    (heads, columns, numbers), dtype = shape
    return heads * columns * numbers * dtype.itemsize
