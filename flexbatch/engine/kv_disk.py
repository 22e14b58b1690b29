"""Slots of the KV cache that are on disk, in blocks that are only ever read and written whole.

A new token would touch a page for each head, so the newest tokens wait in memory (the tail), as does a prompt that
enters in parts. A block begins with the row's first token, wherever in the arena's columns that is, so nothing is moved
when those move, and has room for what the row gains until it is written again: a short row is read in less time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from flexbatch.engine.kv_blocks import DiskBlocks
from flexbatch.engine.kv_form import Parts
from flexbatch.engine.kv_memory import SomeRows
from flexbatch.engine.kv_traffic import DiskTraffic
from flexbatch.kernels.newest_columns import add_newest, keep_newest
from flexbatch.memory.direct_io import AlignedBuffer
from flexbatch.plan.kv_rooms import TAIL_COLUMNS, block_columns

NOWHERE = 1 << 40
"""A column behind all that there can be."""


class DiskSlots:
    """The slots of one layer from `blocks.first` on, numbered from 0 here. `tails` are `[slots, heads, TAIL_COLUMNS,
    ...]`. Columns are the arena's, but where a place is spoken of: that is one in a block."""

    def __init__(self, blocks: DiskBlocks, tails: Parts, traffic: DiskTraffic) -> None:
        self._blocks, self._tails, self._traffic = blocks, tails, traffic
        # The column that is at the first place of each slot's block.
        self._starts = [NOWHERE] * blocks.count
        # The places of each slot that are in the tail, place p at p % TAIL_COLUMNS.
        self._newer: dict[int, range] = {}
        self._at_once = 1  # tokens that a slot has got at once so far
        # The slot whose prompt enters in parts, how many tokens that has there, and its block.
        self._entering: int | None = None
        self._entered_tokens = 0
        self._room: AlignedBuffer | None = None
        blocks.vacant.update(range(blocks.count))
        traffic.add(blocks)

    def write_column(self, column: int, new: Parts) -> None:
        """One new token of the slots 0 to rows - 1: `[rows, heads, ...]` into `column`."""
        columns = torch.full((len(new[0]), 1), column)
        self.write_columns(columns, tuple(each[:, :, None] for each in new))

    def write_columns(self, columns: torch.Tensor, new: Parts) -> None:
        """New tokens of the slots 0 to rows - 1: `[rows, heads, width, ...]`, each into its column of `[rows, width]`;
        a row's columns follow one another, and may be some that it has had before."""
        firsts = columns[:, 0].numpy() - np.array(self._starts[: len(columns)])
        for slot, first in enumerate(firsts.tolist()):
            self._grow(slot, range(first, first + columns.shape[1]))
        keep_newest(self._tails, [each.to(tail.device) for each, tail in zip(new, self._tails, strict=True)], firsts)

    def read(self, rows: int, columns: slice) -> Iterator[SomeRows]:
        """The slots 0 to rows - 1, some at a time, each until the next ones are asked for: as many places as their
        blocks have, and no more than there are columns."""
        for slots, parts in self._traffic.take(self._blocks, rows):
            self._complete(slots, parts)
            for row, slot in enumerate(range(slots.start, slots.stop)):
                if len(self._newer.get(slot, ())) > TAIL_COLUMNS - self._at_once:
                    self._store(slot, tuple(part[row] for part in parts), self._newer[slot].stop)
            before = tuple(start - columns.start for start in self._starts[slots])
            yield SomeRows(slots, tuple(part[:, :, : columns.stop - columns.start] for part in parts), before)

    def write_prompt(self, slot: int, columns: slice, new: Parts) -> None:
        """All tokens of another row `[heads, width, ...]`."""
        self._starts[slot] = columns.start
        self._store(slot, new, new[0].shape[1])

    def entering(self, slot: int, columns: slice) -> Parts:
        """The place of all tokens that a row that enters in parts has so far, `[heads, columns, ...]`, the newest of
        which come there now. A row that entered before is complete."""
        if self._entering is not None and self._entering != slot:
            self._put_entered(self._entering)
        self._entering, self._starts[slot] = slot, columns.start
        self._entered_tokens = columns.stop - columns.start
        self._blocks.resize(slot, self._blocks.largest.columns)
        self._newer.pop(slot, None)
        return tuple(part[:, : self._entered_tokens] for part in self._entered())

    def shift(self, by: Sequence[int]) -> None:
        """The columns of the first slots become ones so much further to the left (below 0: to the right)."""
        for slot, left in enumerate(by):
            self._starts[slot] -= left

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` goes to slot `target`, with its block: nothing is read or written."""
        self._blocks.move(source, target)
        self._starts[target] = self._starts[source]
        self._newer[target] = self._newer.pop(source, range(0))
        self._starts[source] = NOWHERE
        if self._entering in (source, target):
            self._entering = target if self._entering == source else None
        for tail in self._tails:
            tail[target] = tail[source]

    def vacate(self, slot: int) -> None:
        """No row is in the slot any more: it is neither read nor written until there is another."""
        self._blocks.vacant.add(slot)
        self._starts[slot] = NOWHERE
        self._newer.pop(slot, None)
        if self._entering == slot:
            self._entering = None

    def load(self, slot: int) -> tuple[int, Parts]:
        """The column where the slot's row begins, and its parts `[heads, places, ...]` with all tokens, in memory that
        the next `load` or `read` takes."""
        parts = self._blocks.layout(slot).views(self._traffic.fetch(self._blocks, slot), 1)
        self._complete(slice(slot, slot + 1), parts)
        return self._starts[slot], tuple(part[0] for part in parts)

    def _store(self, slot: int, parts: Parts, tokens: int) -> None:
        """Puts a row of so many tokens, `[heads, tokens and more, ...]`, into the slot, with zeros behind them: what a
        block that lay in another way has left there may be no numbers at all."""
        block, rooms = self._outgoing(slot, tokens)
        for room, part in zip(rooms, parts, strict=True):
            room[:, :tokens] = part[:, :tokens]
            room[:, tokens:] = 0
        self._send(slot, block)

    def _grow(self, slot: int, places: range) -> None:
        """These places of the slot come into its tail, behind those that are there, or over the last ones."""
        if places.start < 0 or places.stop > self._blocks.largest.columns:  # no row is in the slot
            self._newer.pop(slot, None)
            return
        self._at_once = max(self._at_once, len(places))
        known = self._newer.get(slot, places)
        is_same_row = known.start <= places.start <= known.stop
        since = known.start if is_same_row else places.start
        if places.stop - since > TAIL_COLUMNS:
            self._store(slot, self.load(slot)[1], known.stop)
            since = places.start
        self._newer[slot] = range(since, places.stop)

    def _put_entered(self, slot: int) -> None:
        """The row that entered last goes to disk, with the tokens that it gained since."""
        newer = self._newer.get(slot, range(0))
        block, parts = self._outgoing(slot, max(self._entered_tokens, newer.stop))
        self._complete(slice(slot, slot + 1), tuple(part[None] for part in parts))
        self._send(slot, block)

    def _outgoing(self, slot: int, tokens: int) -> tuple[AlignedBuffer, Parts]:
        """A block for a row of so many tokens, to be filled and sent, and its parts `[heads, columns, ...]`."""
        block, most = self._traffic.outgoing(self._blocks.largest.nbytes), self._blocks.largest.columns
        return block, self._blocks.resize(slot, block_columns(tokens, most)).slot(block)

    def _send(self, slot: int, block: AlignedBuffer) -> None:
        self._newer.pop(slot, None)
        if self._entering == slot:
            self._entering = None
        self._traffic.send(self._blocks, slot, block)

    def _entered(self) -> Parts:
        if self._room is None:
            self._room = self._traffic.admitted(self._blocks.largest.nbytes)
        return self._blocks.largest.slot(self._room)

    def _complete(self, slots: slice, parts: Parts) -> None:
        """Adds to what is on disk of some slots, `[slots, heads, places, ...]`, what is not there yet."""
        if self._entering in range(self._blocks.count)[slots]:
            for part, entered in zip(parts, self._entered(), strict=True):
                part[self._entering - slots.start].copy_(entered[:, : part.shape[2]])
        newer = (self._newer.get(slot, range(0)) for slot in range(self._blocks.count)[slots])
        places = np.array([(each.start, each.stop) for each in newer], np.int64)
        assert places.max(initial=0) <= parts[0].shape[2], "a row has outgrown its block"
        add_newest(parts, [tail[slots] for tail in self._tails], places)
