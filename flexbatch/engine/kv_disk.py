"""Slots of the KV cache that are on disk, in blocks that are only ever read and written whole.

A new token would touch a page for each head, so the newest tokens wait in memory (the tail), as does a prompt that
enters in parts. Columns are moved in the pass that reads them anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from flexbatch.engine.kv_form import Parts
from flexbatch.engine.kv_memory import move_columns
from flexbatch.engine.kv_traffic import DiskBlocks, DiskTraffic
from flexbatch.memory.direct_io import AlignedBuffer
from flexbatch.plan.kv_rooms import TAIL_COLUMNS


class DiskSlots:
    """The slots of one layer from `blocks.first` on, numbered from 0 here. `tails` are `[slots, heads, TAIL_COLUMNS,
    ...]`."""

    def __init__(self, blocks: DiskBlocks, tails: Parts, traffic: DiskTraffic) -> None:
        self._blocks, self._tails, self._traffic = blocks, tails, traffic
        # The columns of each slot that are in the tail, column c at c % TAIL_COLUMNS.
        self._newer: dict[int, range] = {}
        self._to_move = Counter[int]()  # by slot, how many columns too far right everything is on disk
        self._at_once = 1  # tokens that a slot has got at once so far
        # The slot whose prompt enters in parts, and its block.
        self._entering: int | None = None
        self._room: AlignedBuffer | None = None
        traffic.add(blocks)

    def write_column(self, column: int, new: Parts) -> None:
        """One new token of the slots 0 to rows - 1: `[rows, heads, ...]` into `column`."""
        for slot in range(new[0].shape[0]):
            self._grow(slot, range(column, column + 1))
        for tail, each in zip(self._tails, new, strict=True):
            tail[: each.shape[0], :, column % TAIL_COLUMNS] = each

    def write_columns(self, columns: torch.Tensor, new: Parts) -> None:
        """New tokens of the slots 0 to rows - 1: `[rows, heads, width, ...]`, each into its column of `[rows, width]`;
        a row's columns follow one another, and may be some that it has had before."""
        for slot, (first, *others) in enumerate(columns.tolist()):
            self._grow(slot, range(first, first + 1 + len(others)))
        for tail, each in zip(self._tails, new, strict=True):
            slots = torch.arange(len(columns), device=tail.device)[:, None]
            tail[slots, :, columns.to(tail.device) % TAIL_COLUMNS] = each.transpose(1, 2).to(tail.device)

    def read(self, rows: int, columns: slice) -> Iterator[tuple[slice, Parts]]:
        """The slots 0 to rows - 1 in these columns, some at a time, each until the next ones are asked for."""
        for slots, parts in self._traffic.take(self._blocks, rows):
            for row, slot in enumerate(range(slots.start, slots.stop)):
                mine = tuple(part[row] for part in parts)
                self._complete(slot, mine)
                if self._to_move[slot] or len(self._newer.get(slot, ())) > TAIL_COLUMNS - self._at_once:
                    self.store(slot, mine)
            yield slots, tuple(part[:, :, columns] for part in parts)

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
        self._newer.pop(slot, None)
        self._to_move.pop(slot, None)
        for part, tokens in zip(self._entered(), new, strict=True):
            part[:, columns] = tokens
        return self._entered()

    def shift(self, by: Sequence[int]) -> None:
        """Moves all columns of the first slots to the left by so many (below 0: to the right)."""
        for slot, left in enumerate(by):
            if not left:
                continue
            if slot == self._entering:
                for part in self._entered():
                    move_columns(part, left)
            else:
                self._to_move[slot] += left
            self._shift_newer(slot, left)

    def _shift_newer(self, slot: int, left: int) -> None:
        """The same of the columns in the slot's tail."""
        newer = self._newer.pop(slot, range(0))
        moved = range(newer.start - left, newer.stop - left)
        if newer and moved.start >= 0 and moved.stop <= self._blocks.layout.columns:  # else no row is in the slot
            self._newer[slot] = moved
            for tail in self._tails:
                tail[slot] = tail[slot].roll(-left, 1)

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` goes to slot `target`, with its block: nothing is read or written."""
        self._blocks.swap(source, target)
        self._newer[target] = self._newer.pop(source, range(0))
        self._to_move[target] = self._to_move.pop(source, 0)
        if self._entering in (source, target):
            self._entering = target if self._entering == source else None
        for tail in self._tails:
            tail[target] = tail[source]

    def load(self, slot: int) -> Parts:
        """The slot's parts `[heads, columns, ...]` with all tokens, in memory that the next `load` or `read` takes."""
        parts = self._blocks.layout.slot(self._traffic.fetch(self._blocks, slot))
        self._complete(slot, parts)
        return parts

    def store(self, slot: int, parts: Parts) -> None:
        """Puts whole parts `[heads, columns, ...]` into the slot."""
        block, rooms = self._outgoing()
        for room, part in zip(rooms, parts, strict=True):
            room.copy_(part)
        self._send(slot, block)

    def _grow(self, slot: int, columns: range) -> None:
        """These columns of the slot come into its tail, behind those that are there, or over the last ones."""
        self._at_once = max(self._at_once, len(columns))
        known = self._newer.get(slot, columns)
        is_same_row = known.start <= columns.start <= known.stop
        since = known.start if is_same_row else columns.start
        if columns.stop - since > TAIL_COLUMNS:
            self.store(slot, self.load(slot))
            since = columns.start
        self._newer[slot] = range(since, columns.stop)

    def _put_entered(self, slot: int) -> None:
        """The row that entered last goes to disk, with the tokens that it gained since."""
        block, parts = self._outgoing()
        self._complete(slot, parts)
        self._send(slot, block)

    def _outgoing(self) -> tuple[AlignedBuffer, Parts]:
        """A block to be filled and sent, and its parts `[heads, columns, ...]`."""
        block = self._traffic.outgoing(self._blocks.layout.nbytes)
        return block, self._blocks.layout.slot(block)

    def _send(self, slot: int, block: AlignedBuffer) -> None:
        self._newer.pop(slot, None)
        self._to_move.pop(slot, None)
        if self._entering == slot:
            self._entering = None
        self._traffic.send(self._blocks, slot, block)

    def _entered(self) -> Parts:
        if self._room is None:
            self._room = self._traffic.admitted(self._blocks.layout.nbytes)
        return self._blocks.layout.slot(self._room)

    def _complete(self, slot: int, parts: Parts) -> None:
        """Makes what is on disk of a slot what it should be: in its columns, with what is not there yet."""
        if slot == self._entering:
            for part, entered in zip(parts, self._entered(), strict=True):
                part.copy_(entered)
        elif left := self._to_move[slot]:
            for part in parts:
                move_columns(part, left)
        newer = self._newer.get(slot, range(0))
        start = newer.start % TAIL_COLUMNS
        before = min(len(newer), TAIL_COLUMNS - start)
        for part, tail in zip(parts, self._tails, strict=True):
            part[:, newer.start : newer.start + before] = tail[slot, :, start : start + before]
            if before < len(newer):
                part[:, newer.start + before : newer.stop] = tail[slot, :, : len(newer) - before]
