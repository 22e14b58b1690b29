"""Slots of the KV cache that are on disk: read a layer ahead of the decode batch, written whole and behind it.

A layer's slots are blocks of a file, one after the other, carried past the page cache. The decode batch finds those of
the layer that it is at in one of two rooms, while the next layer's are on their way into the other one. A new token
would touch a page for each head, so the newest tokens wait in memory (the tail), as does a prompt that enters in parts.
Only whole blocks are ever written.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from flexbatch.engine.kv_form import Parts
from flexbatch.memory.direct_io import AlignedBuffer, page_ceil
from flexbatch.memory.disk_file import DiskFile
from flexbatch.memory.transfer import NO_STATISTICS, StreamStatistics
from flexbatch.plan.memory_need import OUTGOING_BLOCKS, TAIL_COLUMNS

READ_BYTES = 8 << 20
READERS = 3

PartShape = tuple[tuple[int, int, int], torch.dtype]
"""Heads, columns and numbers of a slot's part, and their type."""


@dataclass(frozen=True)
class BlockLayout:
    """A slot as bytes: its parts one after the other, in whole pages."""

    shapes: Sequence[PartShape]

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


class DiskSlots:
    """The slots of one layer from `first` on, numbered from 0 here. `tails` are `[slots, heads, TAIL_COLUMNS, ...]`."""

    def __init__(
        self, first: int, count: int, layout: BlockLayout, file: DiskFile, tails: Parts, traffic: DiskTraffic
    ) -> None:
        self.first, self.count, self.layout, self.file = first, count, layout, file
        self._tails, self._traffic = tails, traffic
        # Of each slot the columns from `since` on to `next - 1` are in the tail, column c at c % TAIL_COLUMNS.
        self._since: dict[int, int] = {}
        self._next = 0
        # The slot whose prompt enters in parts, and its block.
        self._entering: int | None = None
        self._room: AlignedBuffer | None = None
        traffic.add(self)

    def write_column(self, column: int, new: Parts) -> None:
        """One new token of the slots 0 to rows - 1: `[rows, heads, ...]` into `column`."""
        for tail, each in zip(self._tails, new, strict=True):
            tail[: each.shape[0], :, column % TAIL_COLUMNS] = each
        # Live rows gain a token in every pass: others that have some in the tail are gone.
        known = self._since if column == self._next else {}
        self._since = {slot: known.get(slot, column) for slot in range(new[0].shape[0])}
        self._next = column + 1

    def read(self, rows: int, columns: slice) -> Parts:
        """The slots 0 to rows - 1 in these columns, in memory until the layer after the next one is read."""
        parts = self._traffic.take(self, rows)
        for slot in range(rows):
            mine = tuple(part[slot] for part in parts)
            self._add_newer(slot, mine)
            if self._next - self._since.get(slot, self._next) == TAIL_COLUMNS:
                self.store(slot, mine)
        return tuple(part[:, :, columns] for part in parts)

    def write_prompt(self, slot: int, columns: slice, new: Parts) -> None:
        """All tokens of another row `[heads, width, ...]`; other columns of the slot are masked."""
        block, parts = self._outgoing()
        for part, tokens in zip(parts, new, strict=True):
            part[:, columns] = tokens
        self._send(slot, block)

    def write_part(self, slot: int, columns: slice, new: Parts) -> Parts:
        """More tokens of a row that enters in parts; returns the slot's parts `[heads, columns, ...]`, with all so far.
        A row that entered before is complete."""
        if self._entering is not None and self._entering != slot:
            self._put_entered(self._entering)
        self._entering = slot
        self._since.pop(slot, None)
        for part, tokens in zip(self._entered(), new, strict=True):
            part[:, columns] = tokens
        return self._entered()

    def shift(self, by: int, slots: int) -> None:
        """Moves all columns of the first `slots` slots to the left by `by`."""
        for slot in range(min(slots, self.count)):
            is_growing_in = slot == self._entering and slot not in self._since
            parts = self._entered() if is_growing_in else self.load(slot)
            for part in parts:
                part[:, :-by] = part[:, by:].clone()
            if not is_growing_in:
                self.store(slot, parts)

    def load(self, slot: int) -> Parts:
        """The slot's parts `[heads, columns, ...]` with all tokens, in memory that the next `load` or `read` takes."""
        parts = self.layout.slot(self._traffic.fetch(self, slot))
        self._add_newer(slot, parts)
        return parts

    def store(self, slot: int, parts: Parts) -> None:
        """Puts whole parts `[heads, columns, ...]` into the slot."""
        block, rooms = self._outgoing()
        for room, part in zip(rooms, parts, strict=True):
            room.copy_(part)
        self._send(slot, block)

    def _put_entered(self, slot: int) -> None:
        """The row that entered last goes to disk, with the tokens that it gained since."""
        block, parts = self._outgoing()
        self._add_newer(slot, parts)
        self._send(slot, block)

    def _outgoing(self) -> tuple[AlignedBuffer, Parts]:
        """A block to be filled and sent, and its parts `[heads, columns, ...]`."""
        block = self._traffic.outgoing(self.layout.nbytes)
        return block, self.layout.slot(block)

    def _send(self, slot: int, block: AlignedBuffer) -> None:
        self._since.pop(slot, None)
        if self._entering == slot:
            self._entering = None
        self._traffic.send(self, slot, block)

    def _entered(self) -> Parts:
        if self._room is None:
            self._room = self._traffic.admitted(self.layout.nbytes)
        return self.layout.slot(self._room)

    def _add_newer(self, slot: int, parts: Parts) -> None:
        """What is not on disk yet of a slot."""
        if slot == self._entering:
            for part, entered in zip(parts, self._entered(), strict=True):
                part.copy_(entered)
        since = self._since.get(slot, self._next)
        start = since % TAIL_COLUMNS
        before = min(self._next - since, TAIL_COLUMNS - start)
        for part, tail in zip(parts, self._tails, strict=True):
            part[:, since : since + before] = tail[slot, :, start : start + before]
            part[:, since + before : self._next] = tail[slot, :, : self._next - since - before]


@dataclass
class _Reading:
    """The slots 0 to `rows` - 1 of a layer on their way into a room."""

    of: DiskSlots
    rows: int
    room: AlignedBuffer
    reads: list[Future[None]]


class DiskTraffic:
    """Carries all layers' blocks: two rooms for a layer's slots, which all use in turn, a few blocks for what is to be
    written, and the threads. To be used by one thread. `admit` is asked for bytes of memory before they are taken."""

    def __init__(self, admit: Callable[[int], None]) -> None:
        self._admit = admit
        self._layers: list[DiskSlots] = []
        self._rooms: list[AlignedBuffer] = []
        self._ahead: _Reading | None = None
        self._free: list[AlignedBuffer] = []
        self._sent: deque[tuple[DiskSlots, AlignedBuffer, Future[None]]] = deque()
        self._made = 0
        self._waited, self._moved = 0.0, Counter[str]()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="kv-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-writer")

    def add(self, slots: DiskSlots) -> None:
        """The next layer, in the order of use."""
        self._layers.append(slots)

    def admitted(self, nbytes: int) -> AlignedBuffer:
        self._admit(nbytes)
        return AlignedBuffer(nbytes)

    def take(self, slots: DiskSlots, rows: int) -> Parts:
        """The slots 0 to rows - 1 of the layer as they are on disk; the next layer's are read meanwhile."""
        reading = self._ahead
        if reading is None or reading.of is not slots:
            self._discard()
            reading = self._begin(slots, rows, self._room(0))
        self._ahead = None
        following = self._layers.index(slots) + 1
        if following < len(self._layers):
            later = self._layers[following]
            expected = max(0, min(later.count, slots.first + rows - later.first))
            other = self._room(1) if reading.room is self._room(0) else self._room(0)
            self._ahead = self._begin(later, expected, other)
        self._await([*reading.reads, *self._reads(slots, reading.rows, rows, reading.room)])
        return slots.layout.views(reading.room, rows)

    def fetch(self, slots: DiskSlots, slot: int) -> AlignedBuffer:
        """One slot's block as it is on disk, at once."""
        self._discard()
        self._finish(slots)
        size, room = slots.layout.nbytes, self._room(0)
        self._await([self._reader_of(slots, slot * size, room.bytes[:size])])
        return room

    def outgoing(self, nbytes: int) -> AlignedBuffer:
        """A block to be filled and sent; waits where all are under way."""
        while not self._free and self._made >= OUTGOING_BLOCKS:
            self._land()
        if not self._free:
            self._made += 1
            return self.admitted(nbytes)
        block = self._free.pop()
        return block if block.nbytes >= nbytes else self.admitted(nbytes)

    def send(self, slots: DiskSlots, slot: int, block: AlignedBuffer) -> None:
        size = slots.layout.nbytes
        written = self._writer.submit(slots.file.write, slot * size, block.bytes[:size])
        self._moved["device>disk"] += size
        self._sent.append((slots, block, written))

    def statistics(self) -> StreamStatistics:
        """Bytes by link and seconds that the walk waited, since the start; nothing else is counted."""
        return replace(NO_STATISTICS, bytes_moved=Counter(self._moved), wait_seconds=self._waited)

    def close(self) -> None:
        """Waits for what is under way. Safe to repeat."""
        self._readers.shutdown()
        self._writer.shutdown()

    def _land(self) -> None:
        _, block, written = self._sent.popleft()
        self._free.append(block)
        self._await([written])

    def _finish(self, slots: DiskSlots) -> None:
        """What was sent to the layer is there."""
        while any(of is slots for of, _, _ in self._sent):
            self._land()

    def _discard(self) -> None:
        """What was read ahead is not needed."""
        ahead, self._ahead = self._ahead, None
        self._await(ahead.reads if ahead is not None else ())

    def _room(self, number: int) -> AlignedBuffer:
        if not self._rooms:
            nbytes = max(slots.count * slots.layout.nbytes for slots in self._layers)
            self._rooms = [self.admitted(nbytes), self.admitted(nbytes)]
        return self._rooms[number]

    def _begin(self, slots: DiskSlots, rows: int, room: AlignedBuffer) -> _Reading:
        self._finish(slots)
        return _Reading(slots, rows, room, self._reads(slots, 0, rows, room))

    def _reads(self, slots: DiskSlots, first: int, stop: int, room: AlignedBuffer) -> list[Future[None]]:
        start, end = first * slots.layout.nbytes, stop * slots.layout.nbytes
        return [
            self._reader_of(slots, offset, room.bytes[offset : min(offset + READ_BYTES, end)])
            for offset in range(start, end, READ_BYTES)
        ]

    def _reader_of(self, slots: DiskSlots, offset: int, target: memoryview) -> Future[None]:
        self._moved["disk>device"] += len(target)
        return self._readers.submit(slots.file.read, offset, target)

    def _await(self, work: Iterable[Future[None]]) -> None:
        started = time.perf_counter()
        for each in work:
            each.result()
        self._waited += time.perf_counter() - started


def _bytes_of(shape: PartShape) -> int:
    (heads, columns, numbers), dtype = shape
    return heads * columns * numbers * dtype.itemsize
