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
    `vacant` of which slots nothing is there. What is not there `is_cleared` wherever it is read to, or anything."""

    first: int
    layout: BlockLayout
    file: DiskFile
    places: list[int]
    is_cleared: bool = True
    vacant: set[int] = field(default_factory=set)

    @property
    def count(self) -> int:
        return len(self.places)

    def filled(self, some: slice) -> list[int]:
        """The places of some slots' blocks, `NOTHING` for vacant ones."""
        return [NOTHING if slot in self.vacant else self.places[slot] for slot in range(self.count)[some]]

    def move(self, source: int, target: int) -> None:
        """Slot `target` gets the block of slot `source`, which is vacant then."""
        self.places[source], self.places[target] = self.places[target], self.places[source]
        if source not in self.vacant:
            self.vacant.discard(target)
            self.vacant.add(source)
        else:
            self.vacant.add(target)


def _bytes_of(shape: PartShape) -> int:
    (heads, columns, numbers), dtype = shape
    return heads * columns * numbers * dtype.itemsize
