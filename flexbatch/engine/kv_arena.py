"""The KV cache of all rows in flight: for each layer an arena of slots by columns, cut into tiers by slot.

All live rows end at the same column `end`, so the decode batch is an ordinary left-padded batch at any moment; a
joining prompt writes its keys and values into the columns up to `end`. When the columns run out, the arena is shifted
to the left by what no live row needs any more.

Layout of one segment: the parts of `KVForm`, `[slots, heads, columns, ...]`, token by token, so that all that moves
columns and slots is the same for plain and packed tokens. Everything starts as zeros, because a masked position still
multiplies its value by a weight of zero, which must not meet a NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexbatch.engine.carried_keys import OwnKeys, PackedKeys
from flexbatch.engine.kv_disk import BlockLayout, DiskSlots, DiskTraffic
from flexbatch.engine.kv_form import KVForm, Parts, kv_forms
from flexbatch.engine.kv_memory import MemorySlots
from flexbatch.engine.storage import Storage
from flexbatch.kernels.prefill_attention import KeysAndValues
from flexbatch.memory.transfer import StreamStatistics
from flexbatch.plan.memory_need import TAIL_COLUMNS
from flexbatch.plan.policy import Tier

KV, FROM_DISK = "KV cache", "KV from disk"
"""What its bytes are booked as, and those that are in memory of what is on disk."""


@dataclass(frozen=True)
class Segment:
    """The slots `first` to `first + count - 1` of one layer, on one tier."""

    tier: Tier
    first: int
    count: int
    slots: MemorySlots | DiskSlots


class Expansion:
    """Room on the device in which packed keys and values are unpacked for one call at a time, layer after layer."""

    def __init__(self, slots: int, span: int, storage: Storage) -> None:
        self._tokens, self._storage = slots * span, storage
        self._rooms: dict[str, torch.Tensor] = {}

    def room(self, what: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for `what`, `[rows, heads, tokens, head_dim]`, overwritten the next time; admitted at first."""
        rows, heads, tokens, size = shape
        if what not in self._rooms:
            count = max(self._tokens, rows * tokens) * heads * size
            self._rooms[what] = self._storage.zeros(Tier.DEVICE, (count,), dtype, "KV of one layer, expanded")
        room = self._rooms[what]
        if room.numel() < rows * heads * tokens * size or room.dtype != dtype:
            return torch.empty(shape, dtype=dtype, device=room.device)  # a layer of another shape than the first
        return room[: rows * heads * tokens * size].view(shape)


class LayerStore:
    """One layer's arena. Its segments are made when the first keys arrive and show heads, sizes and type."""

    def __init__(
        self,
        index: int,
        slots: int,
        columns: int,
        counts: tuple[int, int],
        storage: Storage,
        forms: tuple[KVForm, KVForm],
        expansion: Expansion,
        traffic: DiskTraffic,
        attended_packed: bool,
    ) -> None:
        self.index, self.slots, self.columns, self.attended_packed = index, slots, columns, attended_packed
        self.segments: list[Segment] = []
        self._counts = {Tier.DEVICE: counts[0], Tier.HOST: counts[1], Tier.DISK: slots - sum(counts)}
        self._storage, self._forms, self._expansion, self._traffic = storage, forms, expansion, traffic
        self._dtype = torch.float32
        self._sizes: tuple[int, int] = (0, 0)

    def prepare(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes room for keys and values shaped like these `[rows, heads, tokens, head_dim]`."""
        if self.segments:
            return
        self._dtype, self._sizes = keys.dtype, (keys.shape[3], values.shape[3])
        first = 0
        for tier, count in self._counts.items():
            if count:
                shapes = [
                    ((new.shape[1], self.columns, size), dtype)
                    for new, form in zip((keys, values), self._forms, strict=True)
                    for size, dtype in form.stored(new.shape[3], new.dtype)
                ]
                self.segments.append(Segment(tier, first, count, self._room(tier, first, count, BlockLayout(shapes))))
                first += count

    def _room(self, tier: Tier, first: int, count: int, layout: BlockLayout) -> MemorySlots | DiskSlots:
        if tier is not Tier.DISK:
            parts = tuple(self._storage.zeros(tier, (count, *sizes), dtype, KV) for sizes, dtype in layout.shapes)
            return MemorySlots(parts)
        file = self._storage.file(count * layout.nbytes, KV)
        tails = tuple(
            self._storage.zeros(self._storage.main_memory, (count, heads, TAIL_COLUMNS, size), dtype, FROM_DISK)
            for (heads, _, size), dtype in layout.shapes
        )
        return DiskSlots(first, count, layout, file, tails, self._traffic)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Parts:
        """Keys and values as they are stored."""
        return (*self._forms[0].pack(keys), *self._forms[1].pack(values))

    def seen(self, parts: Parts, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        """What attention gets for these keys and values: themselves, or what packing them to `parts` has left."""
        if not self._is_packed:
            return keys, values
        seen = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (keys, values)]
        self._unpack(parts, seen[0], seen[1])
        return seen[0], seen[1]

    def write_column(self, column: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """One new token of the slots 0 to rows - 1: `[rows, heads, 1, head_dim]` into `column`."""
        made = self.pack(keys, values)
        for segment, outside in self._blocks(keys.shape[0]):
            segment.slots.write_column(column, tuple(new[outside, :, 0] for new in made))

    def write_prompts(self, slots: Sequence[int], end: int, parts: Parts) -> None:
        """Packed prompts `[rows, heads, width, ...]` into their slots, in the columns up to and including `end`."""
        columns = slice(end + 1 - parts[0].shape[2], end + 1)
        for row, slot in enumerate(slots):
            segment = self._segment(slot)
            segment.slots.write_prompt(slot - segment.first, columns, tuple(part[row] for part in parts))

    def read(
        self, rows: int, first: int, end: int, device: torch.device, *, host_attention: bool = False
    ) -> list[OwnKeys]:
        """Keys and values of the slots 0 to `rows` - 1 in columns `first` to `end`, on `device`: views where that is
        possible, tier by tier. With `host_attention` plain ones on the host stay there."""
        columns = slice(first, end + 1)
        if self._is_packed:
            blocks = [(parts, outside) for _, parts, outside in self._decoded(rows, columns)]
            return [OwnKeys(*self._unpacked(blocks, rows, columns), slice(0, rows))]
        read = []
        for segment, (keys, values), outside in self._decoded(rows, columns):
            if not (host_attention and segment.tier is Tier.HOST):
                keys, values = keys.to(device), values.to(device)
            read.append(OwnKeys(keys, values, outside))
        return read

    def packed(self, rows: int, first: int, end: int) -> list[PackedKeys]:
        """The same as they are kept, tier by tier."""
        return [
            PackedKeys(parts[: len(parts) // 2], parts[len(parts) // 2 :], outside)
            for _, parts, outside in self._decoded(rows, slice(first, end + 1))
        ]

    def extend(self, slot: int, first: int, end: int, parts: Parts, device: torch.device) -> KeysAndValues:
        """More packed tokens `[1, heads, width, ...]` of a row, in the columns up to and including `end`. Gives its
        keys and values `[1, heads, columns, head_dim]` in columns `first` to `end`, on `device`."""
        segment, columns = self._segment(slot), slice(end + 1 - parts[0].shape[2], end + 1)
        held = segment.slots.write_part(slot - segment.first, columns, tuple(part[0] for part in parts))
        seen = tuple(part[None, :, first : end + 1] for part in held)
        if self._is_packed:
            return self._unpacked([(seen, slice(0, 1))], 1, slice(first, end + 1))
        return seen[0].to(device), seen[1].to(device)

    def move(self, source: int, target: int) -> None:
        """Copies slot `source` over slot `target`."""
        old, new = self._segment(source), self._segment(target)
        new.slots.store(target - new.first, old.slots.load(source - old.first))

    def shift(self, by: int, slots: int) -> None:
        """Moves all columns of the first `slots` slots to the left by `by`."""
        for segment in self.segments:
            segment.slots.shift(by, slots - segment.first)

    def on_device(self, slots: slice) -> Iterator[torch.Tensor]:
        """The memory on the device of some slots."""
        for segment in self.segments:
            first, stop = max(slots.start - segment.first, 0), min(slots.stop - segment.first, segment.count)
            if segment.tier is Tier.DEVICE and stop > first and isinstance(segment.slots, MemorySlots):
                yield from (part[first:stop] for part in segment.slots.parts)

    @property
    def _is_packed(self) -> bool:
        return self._forms[0].is_packed

    def _unpack(self, parts: Parts, keys: torch.Tensor, values: torch.Tensor) -> None:
        half = len(parts) // 2
        self._forms[0].unpack(parts[:half], keys)
        self._forms[1].unpack(parts[half:], values)

    def _decoded(self, rows: int, columns: slice) -> Iterator[tuple[Segment, Parts, slice]]:
        """What each segment has of the decode batch in these columns, and which of its rows these are."""
        for segment, outside in self._blocks(rows):
            yield segment, segment.slots.read(outside.stop - outside.start, columns), outside

    def _blocks(self, rows: int) -> list[tuple[Segment, slice]]:
        """The segments that have some of the slots 0 to `rows` - 1, and which of these."""
        return [
            (segment, slice(segment.first, stop))
            for segment in self.segments
            if (stop := min(rows, segment.first + segment.count)) > segment.first
        ]

    def _segment(self, slot: int) -> Segment:
        return next(s for s in self.segments if s.first <= slot < s.first + s.count)

    def _unpacked(self, blocks: Sequence[tuple[Parts, slice]], rows: int, columns: slice) -> KeysAndValues:
        """Packed tokens as rows of a batch (the second of a block), in the one room for that."""
        packed, tokens = blocks[0][0], columns.stop - columns.start
        keys, values = (
            self._expansion.room(what, (rows, packed[at].shape[1], tokens, size), self._dtype)
            for what, at, size in zip(("keys", "values"), (0, len(packed) // 2), self._sizes, strict=True)
        )
        for parts, outside in blocks:
            self._unpack(parts, keys[outside], values[outside])
        return keys, values


class KVArena:
    """All layers' stores, and the column `end` at which every live row ends.

    `span` is the longest that a row can get (prompt and completion, in tokens), `slack` the columns between two shifts,
    `bits` 16 (as the model made them), 8 or 4. With `attended_packed` the decode batch's attention reads packed tokens
    as they are kept; else they are expanded for it.
    """

    def __init__(
        self,
        counts: Sequence[tuple[int, int]],
        slots: int,
        span: int,
        slack: int,
        storage: Storage,
        bits: int = 16,
        attended_packed: bool = False,
    ) -> None:
        self.span, self.slots, self.columns = span, slots, span + slack
        self.end = span - 1
        self._storage, self._in_use = storage, slots
        forms, expansion = kv_forms(bits), Expansion(1 if attended_packed else slots, span, storage)
        self._traffic = DiskTraffic(lambda nbytes: storage.budgets[storage.main_memory].reserve(nbytes, FROM_DISK))
        self.layers = [
            LayerStore(index, slots, self.columns, each, storage, forms, expansion, self._traffic, attended_packed)
            for index, each in enumerate(counts)
        ]

    def advance(self, slots: int) -> None:
        """The next pass's column; shifts the first `slots` slots where the columns have run out."""
        self.end += 1
        self.reserve(0, slots)

    def reserve(self, ahead: int, slots: int) -> None:
        """Sees to it that the columns up to `end + ahead` (`ahead` less than the slack) exist; else shifts the first
        `slots` slots, those that rows are in. Others would only take memory by it that they did not have yet."""
        if self.end + ahead < self.columns:
            return
        by = self.end - self.span
        for layer in self.layers:
            layer.shift(by, slots)
        self.end -= by

    def give_back(self, slots: int) -> int:
        """Gives up the device's memory of all but the first `slots` slots; returns how many bytes that are now."""
        rest, self._in_use = slice(slots, self._in_use), slots
        return sum(self._storage.give_back(part, KV) for layer in self.layers for part in layer.on_device(rest))

    def take_again(self) -> None:
        """All slots may be used again."""
        rest, self._in_use = slice(self._in_use, self.slots), self.slots
        for layer in self.layers:
            for part in layer.on_device(rest):
                self._storage.take_again(part, KV)

    def move(self, source: int, target: int) -> None:
        for layer in self.layers:
            layer.move(source, target)

    def statistics(self) -> StreamStatistics:
        """The traffic of rows that are on disk."""
        return self._traffic.statistics()

    def close(self) -> None:
        """Waits for what is on its way to the disk. Safe to repeat."""
        self._traffic.close()
