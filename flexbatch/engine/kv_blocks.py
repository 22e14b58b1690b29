"""How a KV cache lies on disk: a layer's slots as blocks of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from flexbatch.engine.kv_form import Parts
from flexbatch.memory.direct_io import AlignedBuffer, page_ceil
from flexbatch.memory.disk_file import DiskFile

NOTHING = -1
"""In place of a block: it is vacant, or has changed since it was read."""

PartShape = tuple[tuple[int, int, int], torch.dtype]
"""Heads, columns and numbers of a slot's part, and their type."""


@dataclass(frozen=True)
class BlockLayout:
    """A slot as bytes: its parts one after the other, in whole pages."""

    shapes: Sequence[PartShape]

    @property
    def columns(self) -> int:
        return self.shapes[0][0][1]

    @cached_property
    def nbytes(self) -> int:
        return sum(page_ceil(_bytes_of(shape)) for shape in self.shapes)

    def with_columns(self, columns: int) -> BlockLayout:
        """The same of a slot with so many columns."""
        return BlockLayout([((heads, columns, size), dtype) for (heads, _, size), dtype in self.shapes])

    def views(self, memory: torch.Tensor, count: int) -> Parts:
        """The parts `[count, heads, columns, ...]` of the blocks in some memory, uint8."""
        blocks = memory[: count * self.nbytes].view(count, self.nbytes)
        views, start = [], 0
        for shape in self.shapes:
            (sizes, dtype), nbytes = shape, _bytes_of(shape)
            views.append(blocks[:, start : start + nbytes].view(dtype).view(count, *sizes))
            start += page_ceil(nbytes)
        return tuple(views)

    def slot(self, buffer: AlignedBuffer) -> Parts:
        """The parts `[heads, columns, ...]` of the first block in a buffer."""
        return tuple(part[0] for part in self.views(buffer.tensor, 1))


@dataclass(frozen=True, eq=False)
class DiskBlocks:
    """One layer's slots from `first` on, numbered from 0 here; `places` says which block of the file is whose, and
    `vacant` of which slots nothing is there. What is not there `is_cleared` wherever it is read to, or anything.

    Blocks begin at multiples of the `largest` layout's size, and have as many columns as their rows need."""

    first: int
    largest: BlockLayout
    file: DiskFile
    places: list[int]
    is_cleared: bool = True
    vacant: set[int] = field(default_factory=set)
    _columns: list[int] = field(default_factory=list, init=False)
    _layouts: dict[int, BlockLayout] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._columns.extend(self.largest.columns for _ in self.places)

    @property
    def count(self) -> int:
        return len(self.places)

    def layout(self, slot: int) -> BlockLayout:
        """The same object for slots that lie in the same way."""
        columns = self._columns[slot]
        if columns not in self._layouts:
            self._layouts[columns] = self.largest.with_columns(columns)
        return self._layouts[columns]

    def resize(self, slot: int, columns: int) -> BlockLayout:
        """The slot's next block has so many columns; how that lies."""
        self._columns[slot] = columns
        return self.layout(slot)

    def alike(self, start: int, stop: int) -> int:
        """Behind which slot before `stop` the first one from `start` on comes that lies in another way."""
        columns = self._columns[start]
        return next((slot for slot in range(start, stop) if self._columns[slot] != columns), stop)

    def filled(self, some: slice) -> list[int]:
        """The places of some slots' blocks, `NOTHING` for vacant ones."""
        return [NOTHING if slot in self.vacant else self.places[slot] for slot in range(self.count)[some]]

    def move(self, source: int, target: int) -> None:
        """Slot `target` gets the block of slot `source`, which is vacant then."""
        for each in (self.places, self._columns):
            each[source], each[target] = each[target], each[source]
        if source not in self.vacant:
            self.vacant.discard(target)
            self.vacant.add(source)
        else:
            self.vacant.add(target)


def _bytes_of(shape: PartShape) -> int:
    (heads, columns, numbers), dtype = shape
    return heads * columns * numbers * dtype.itemsize
