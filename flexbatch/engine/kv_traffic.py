"""Carries the blocks of a KV cache on disk: read ahead of their use, a few at a time, and written behind it.

A layer's slots are blocks of a file, carried past the page cache. They come into rooms that all layers use in turn;
what the decode batch has attended to makes room for those of the next layer, and after the last one for those of the
first in the next pass. What changes on the disk meanwhile is read once more.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from flexbatch.engine.kv_blocks import NOTHING, BlockLayout, DiskBlocks
from flexbatch.engine.kv_form import Parts
from flexbatch.engine.kv_reading_rooms import ReadingRooms, Room
from flexbatch.memory.direct_io import AlignedBuffer
from flexbatch.memory.transfer import NO_STATISTICS, StreamStatistics
from flexbatch.plan.kv_rooms import OUTGOING_BLOCKS, reading_rooms

READ_BYTES = 8 << 20
READERS = 3


@dataclass(frozen=True)
class _Reading:
    """Some slots of a layer on their way into a room, and which blocks come, one after the other."""

    of: DiskBlocks
    slots: slice
    layout: BlockLayout
    places: list[int]
    room: Room
    reads: list[Future[None]]

    def covers(self, blocks: DiskBlocks, some: slice) -> bool:
        """Whether these slots are among those that are read, and still lie as they did then."""
        is_there = self.of is blocks and self.slots.start == some.start and self.slots.stop >= some.stop
        lies_so = blocks.layout(some.start) is self.layout and blocks.alike(some.start, some.stop) == some.stop
        return is_there and lies_so

    @property
    def is_there(self) -> bool:
        return all(each.done() for each in self.reads)


@dataclass(frozen=True)
class _Sent:
    """A block on its way to a place in a layer's file."""

    of: DiskBlocks
    place: int
    block: AlignedBuffer
    written: Future[None]


class DiskTraffic:
    """Carries all layers' blocks: rooms to read into, which all use in turn, a few blocks for what is to be written,
    and the threads. To be used by one thread. `admit` is asked for bytes of memory before they are taken."""

    def __init__(self, admit: Callable[[int], None]) -> None:
        self._admit = admit
        self._layers: list[DiskBlocks] = []
        self._made_rooms: ReadingRooms | None = None
        self._ahead: deque[_Reading] = deque()
        self._free: list[AlignedBuffer] = []
        self._sent: deque[_Sent] = deque()
        self._made = 0
        # Slots in use: of the decode batch in this pass, and with those that have got a block in it.
        self._live = self._gained = 0
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
        """The slots 0 to rows - 1 of the layer as they are on disk, some at a time; what comes after them, here, in the
        next layers and in the next pass, is read meanwhile."""
        self._live = blocks.first + rows
        if blocks is self._layers[0]:
            self._gained = 0
        start = 0
        while start < rows:
            some = self._next(blocks, start, rows)
            arrived = [self._arriving(blocks, some)]
            try:
                self._read_ahead(arrived[0])
                self._await(arrived[0].reads)
                stop = self._add_arrived(arrived, some.stop, rows)
                memory = self._rooms.together([each.room for each in arrived])
                yield slice(start, stop), arrived[0].layout.views(memory, stop - start)
                start = stop
            finally:
                for each in arrived:
                    self._rooms.give_back(each.room)
        while self._ahead and self._ahead[0].of is blocks and self._ahead[0].slots.start >= rows:
            self._drop(self._ahead.popleft())

    def fetch(self, blocks: DiskBlocks, slot: int) -> torch.Tensor:
        """One slot's block as it is on disk, at once, uint8."""
        some = slice(slot, slot + 1)
        reading = self._begin(blocks, some)
        self._rooms.give_back(reading.room)
        self._await(reading.reads)
        self._clear(reading, some)
        return reading.room.tensor

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
        place, size = blocks.places[slot], blocks.layout(slot).nbytes
        for ahead in self._ahead:
            if ahead.of is blocks and place in ahead.places:
                ahead.places[ahead.places.index(place)] = NOTHING
        blocks.vacant.discard(slot)
        self._gained = max(self._gained, blocks.first + slot + 1)
        written = self._writer.submit(blocks.file.write, place * blocks.largest.nbytes, block.bytes[:size])
        self._moved["device>disk"] += size
        self._sent.append(_Sent(blocks, place, block, written))

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
        """These slots on their way: read ahead, or as of now, where they lie in another way since. What comes after
        them stays under way."""
        while self._ahead and self._ahead[0].of is blocks and self._ahead[0].slots.start < some.stop:
            reading = self._ahead.popleft()
            if reading.covers(blocks, some):
                break
            self._drop(reading)
        else:
            reading = self._begin(blocks, some)
        if wanted := self._changed(reading, some):
            self._await(reading.reads)  # they go to the same memory
            reading.reads.extend(self._order(blocks, wanted, reading.layout.nbytes, reading.room))
        self._clear(reading, some)
        return reading

    def _changed(self, reading: _Reading, some: slice) -> list[tuple[int, int]]:
        """Which of these slots have another block than the one that was read, and where that is."""
        places = enumerate(reading.of.filled(some))
        return [(at, place) for at, place in places if place not in (NOTHING, reading.places[at])]

    def _clear(self, reading: _Reading, some: slice) -> None:
        """Makes zeros of these slots if nothing was read, because nothing is there."""
        if not reading.of.is_cleared:
            return
        size = reading.layout.nbytes
        for at, place in enumerate(reading.of.filled(some)):
            if place == NOTHING == reading.places[at]:
                reading.room.tensor[at * size : (at + 1) * size] = 0

    def _add_arrived(self, arrived: list[_Reading], end: int, rows: int) -> int:
        """Adds what follows in memory too, and is there already, of the slots from `end` on before `rows`: the fewer
        the calls, the less there is around them. Behind which slot it ends now."""
        blocks, layout = arrived[0].of, arrived[0].layout
        while self._ahead and len(arrived) < self._rooms.at_most_together and end < rows:
            last, following, count = arrived[-1], self._ahead[0], end - arrived[-1].slots.start
            is_beside = following.room.number == last.room.number + 1 and count * layout.nbytes == self._rooms.size
            after = self._next(blocks, end, rows)
            is_like = following.layout is layout and following.covers(blocks, after) and following.is_there
            if not (is_beside and is_like) or self._changed(following, after):
                break
            self._await(following.reads)  # what failed is told here
            self._clear(following, after)
            arrived.append(self._ahead.popleft())
            end += after.stop - after.start
        return end

    def _read_ahead(self, current: _Reading) -> None:
        """Into all free rooms what comes after `current` and what is read already."""
        last = self._ahead[-1] if self._ahead else current
        here, begun, start = self._layers.index(current.of), self._layers.index(last.of), last.slots.stop
        for number in (*range(begun, len(self._layers)), *range(begun)):
            blocks = self._layers[number]
            live = self._live if number >= here else max(self._live, self._gained)
            for some in self._cut(blocks, start, min(blocks.count, live - blocks.first)):
                if not len(self._rooms):
                    return
                self._ahead.append(self._begin(blocks, some))
            start = 0

    def _drop(self, reading: _Reading) -> None:
        """What was read ahead is not needed."""
        self._rooms.give_back(reading.room)
        self._await(reading.reads)

    def _cut(self, blocks: DiskBlocks, start: int, stop: int) -> Iterator[slice]:
        """The slots from `start` on to `stop` - 1, as many at a time as lie in the same way and a room takes."""
        while start < stop:
            some = self._next(blocks, start, stop)
            yield some
            start = some.stop

    def _next(self, blocks: DiskBlocks, start: int, stop: int) -> slice:
        """The first of these."""
        at_once = self._rooms.size // blocks.layout(start).nbytes
        return slice(start, blocks.alike(start, min(start + at_once, stop)))

    @property
    def _rooms(self) -> ReadingRooms:
        """Made at first use, when all layers are known."""
        if self._made_rooms is None:
            block = max(blocks.largest.nbytes for blocks in self._layers)
            at_once, count = reading_rooms(max(blocks.count for blocks in self._layers), block)
            self._made_rooms = ReadingRooms(self.admitted(count * at_once * block), at_once * block, count)
        return self._made_rooms

    def _begin(self, blocks: DiskBlocks, some: slice) -> _Reading:
        """Reads some slots into a free room; if there is none, into that of what would be needed last."""
        if not len(self._rooms):
            self._drop(self._ahead.pop())
        room, places = self._rooms.take(), blocks.filled(some)
        wanted = [(at, place) for at, place in enumerate(places) if place != NOTHING]
        layout = blocks.layout(some.start)
        return _Reading(blocks, some, layout, places, room, self._order(blocks, wanted, layout.nbytes, room))

    def _order(
        self, blocks: DiskBlocks, wanted: Sequence[tuple[int, int]], size: int, room: Room
    ) -> list[Future[None]]:
        """Reads blocks of one size, which are at some place each, to where they belong in a room, once what was sent to
        them is there."""
        places, apart, reads = {place for _, place in wanted}, blocks.largest.nbytes, []
        while any(sent.of is blocks and sent.place in places for sent in self._sent):
            self._land()

        def stretch(numbered: tuple[int, tuple[int, int]]) -> tuple[int, int]:
            """The same for blocks that follow one another in the room and, if there are no gaps, in the file."""
            number, (at, place) = numbered
            return (at - number, place - number) if size == apart else (at, place)

        for _, each in groupby(enumerate(wanted), stretch):
            together = [pair for _, pair in each]
            (first, place), nbytes = together[0], len(together) * size
            for at in range(0, nbytes, READ_BYTES):
                target = room.bytes[first * size + at : first * size + min(at + READ_BYTES, nbytes)]
                reads.append(self._readers.submit(blocks.file.read, place * apart + at, target))
        self._moved["disk>device"] += len(wanted) * size
        return reads

    def _await(self, work: Iterable[Future[None]]) -> None:
        started = time.perf_counter()
        for each in work:
            each.result()
        self._waited += time.perf_counter() - started
