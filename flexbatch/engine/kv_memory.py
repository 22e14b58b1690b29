"""Slots of the KV cache in memory, on the device or on the host; `kv_disk.DiskSlots` are used like them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexbatch.engine.kv_form import Parts


@dataclass(frozen=True)
class Relayout:
    """The same memory cut into `slots` of so many `columns`: of the first `kept` slots the columns `source` become the
    columns `target`."""

    slots: int
    columns: int
    kept: int
    source: slice
    target: slice


@dataclass(frozen=True, slots=True)
class SomeRows:
    """The slots of some rows, their parts `[rows, heads, columns, ...]`, and how many columns come `before` each row's
    first one here (below 0: after it). None: none."""

    slots: slice
    parts: Parts
    before: Sequence[int] | None = None

    def cut(self, at_once: int) -> Iterator[SomeRows]:
        """At most so many rows at a time."""
        first = self.slots.start
        for start in range(first, self.slots.stop, at_once):
            slots = slice(start, min(start + at_once, self.slots.stop))
            mine = slice(slots.start - first, slots.stop - first)
            yield SomeRows(slots, tuple(part[mine] for part in self.parts), self.before and self.before[mine])

    def placed(self, width: int) -> Iterator[tuple[Parts, slice]]:
        """The parts with so many columns, and their slots: where rows begin anywhere, each where it belongs, and zeros
        where it has nothing."""
        if self.before is None:
            yield self.parts, self.slots
            return
        for row, before in enumerate(self.before):
            start = min(max(0, before), width)
            count = min(self.parts[0].shape[2], width - start)
            placed = []
            for part in self.parts:
                whole = part.new_zeros(1, part.shape[1], width, *part.shape[3:])
                whole[0, :, start : start + count] = part[row, :, :count]
                placed.append(whole)
            yield tuple(placed), slice(self.slots.start + row, self.slots.start + row + 1)


def move_columns(part: torch.Tensor, left: int) -> None:
    """Moves the columns of a slot's part `[heads, columns, ...]` to the left by so many (below 0: to the right)."""
    if left > 0:
        part[:, :-left] = part[:, left:].clone()
    elif left < 0:
        part[:, -left:] = part[:, :left].clone()


@dataclass(frozen=True)
class MemorySlots:
    """`parts` are those of keys, then of values, `[slots, heads, columns, ...]`, and lie at the beginning of `memory`,
    `[numbers]` each. Slots are numbered from 0 here."""

    parts: Parts
    memory: Parts

    @classmethod
    def over(cls, parts: Parts) -> MemorySlots:
        """All of the memory of these tensors."""
        return cls(parts, tuple(part.view(-1) for part in parts))

    def laid_out(self, new: Relayout) -> MemorySlots:
        """What was kept stays, in its new place; other columns hold what happened to be there."""
        made = []
        for part, memory in zip(self.parts, self.memory, strict=True):
            shape = (new.slots, part.shape[1], new.columns, *part.shape[3:])
            target = memory[: math.prod(shape)].view(shape)
            # In the order in which no slot is written over before it is copied.
            for slot in range(new.kept) if new.columns <= part.shape[2] else reversed(range(new.kept)):
                target[slot, :, new.target] = part[slot, :, new.source].clone()
            made.append(target)
        return MemorySlots(tuple(made), self.memory)

    def write_column(self, column: int, new: Parts) -> None:
        """One new token of the slots 0 to rows - 1: `[rows, heads, ...]` into `column`."""
        for part, tokens in zip(self.parts, new, strict=True):
            part[: tokens.shape[0], :, column] = tokens

    def write_columns(self, columns: torch.Tensor, new: Parts) -> None:
        """New tokens of the slots 0 to rows - 1: `[rows, heads, width, ...]`, each into its column of `[rows,
        width]`."""
        for part, tokens in zip(self.parts, new, strict=True):
            slots = torch.arange(len(columns), device=part.device)[:, None]
            part[slots, :, columns.to(part.device)] = tokens.transpose(1, 2).to(part.device)

    def read(self, rows: int, columns: slice) -> Iterator[SomeRows]:
        """The slots 0 to rows - 1 in these columns, some at a time: here all at once."""
        yield SomeRows(slice(0, rows), tuple(part[:rows, :, columns] for part in self.parts))

    def write_prompt(self, slot: int, columns: slice, new: Parts) -> None:
        """A prompt's tokens `[heads, width, ...]`."""
        for part, tokens in zip(self.parts, new, strict=True):
            part[slot, :, columns] = tokens

    def entering(self, slot: int, columns: slice) -> Parts:
        """The place of all tokens that a row has so far, `[heads, columns, ...]`; the newest come there now."""
        return tuple(part[slot, :, columns] for part in self.parts)

    def shift(self, by: Sequence[int]) -> None:
        """Moves all columns of the first slots to the left by so many (below 0: to the right), one slot after the other
        so that the copy stays small."""
        for part in self.parts:
            for slot, left in zip(part, by, strict=False):
                move_columns(slot, left)

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` goes to slot `target`."""
        for part in self.parts:
            part[target] = part[source]

    def vacate(self, slot: int) -> None:
        """No row is in the slot any more, which changes nothing in memory."""

    def load(self, slot: int) -> tuple[int, Parts]:
        """The first column of a slot, and all of them, `[heads, columns, ...]`."""
        return 0, tuple(part[slot] for part in self.parts)
