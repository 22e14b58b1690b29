"""Slots of the KV cache in memory, on the device or on the host; `kv_disk.DiskSlots` are used like them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexbatch.engine.kv_form import Parts


@dataclass(frozen=True)
class MemorySlots:
    """`parts` are those of keys, then of values, `[slots, heads, columns, ...]`. Slots are numbered from 0 here."""

    parts: Parts

    def write_column(self, column: int, new: Parts) -> None:
        """One new token of the slots 0 to rows - 1: `[rows, heads, ...]` into `column`."""
        for part, tokens in zip(self.parts, new, strict=True):
            part[: tokens.shape[0], :, column] = tokens

    def read(self, rows: int, columns: slice) -> Iterator[tuple[slice, Parts]]:
        """The slots 0 to rows - 1 in these columns, some at a time: here all at once."""
        yield slice(0, rows), tuple(part[:rows, :, columns] for part in self.parts)

    def write_prompt(self, slot: int, columns: slice, new: Parts) -> None:
        """A prompt's tokens `[heads, width, ...]`."""
        for part, tokens in zip(self.parts, new, strict=True):
            part[slot, :, columns] = tokens

    def write_part(self, slot: int, columns: slice, new: Parts) -> Parts:
        """More tokens of a row; returns all columns of its slot."""
        self.write_prompt(slot, columns, new)
        return self.load(slot)

    def shift(self, by: int, slots: int) -> None:
        """Moves all columns of the first `slots` slots to the left by `by`, one by one so that the copy stays small."""
        for part in self.parts:
            for slot in part[: max(0, slots)]:
                slot[:, :-by] = slot[:, by:].clone()

    def load(self, slot: int) -> Parts:
        """All columns of a slot `[heads, columns, ...]`."""
        return tuple(part[slot] for part in self.parts)

    def store(self, slot: int, parts: Parts) -> None:
        """All columns of a slot become these."""
        for part, new in zip(self.parts, parts, strict=True):
            part[slot] = new
