"""One layer's part of the KV cache: slots by columns, cut into tiers by slot.

Layout of one segment: the parts of `KVForm`, `[slots, heads, columns, ...]`, token by token, so that all that moves
columns and slots is the same for plain and packed tokens. Everything starts as zeros, because a masked position still
multiplies its value by a weight of zero, which must not meet a NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial

import torch

from flexbatch.engine.carried_keys import OwnKeys, PackedKeys
from flexbatch.engine.kv_blocks import BlockLayout, DiskBlocks
from flexbatch.engine.kv_disk import DiskSlots
from flexbatch.engine.kv_expansion import Expansion
from flexbatch.engine.kv_form import Attend, KVForm, Parts
from flexbatch.engine.kv_memory import MemorySlots, Relayout, SomeRows
from flexbatch.engine.kv_traffic import DiskTraffic
from flexbatch.engine.storage import Storage
from flexbatch.kernels.prefill_attention import KeysAndValues
from flexbatch.kernels.threads import do_all
from flexbatch.plan.kv_rooms import TAIL_COLUMNS, brought_at_once
from flexbatch.plan.policy import Tier

KV, FROM_DISK = "KV cache", "KV from disk"
"""What its bytes are booked as, and those that are in memory of what is on disk."""


class Attended(Enum):
    """How the decode batch's attention takes keys and values: of all rows in one place, of some rows at a time, or some
    at a time and packed, as they are kept."""

    WHOLE = auto()
    IN_PARTS = auto()
    PACKED = auto()


@dataclass(frozen=True)
class Segment:
    """The slots `first` to `first + count - 1` of one layer, on one tier."""

    tier: Tier
    first: int
    count: int
    slots: MemorySlots | DiskSlots


class LayerStore:
    """One layer's arena. Its segments are made when the first keys arrive and show heads, sizes and type; with them,
    where all slots are on the device, those of the layer `following`, whose keys mostly look the same: so the system
    has time to find the memory."""

    following: LayerStore | None = None

    def __init__(
        self,
        index: int,
        slots: int,
        columns: int,
        counts: tuple[int, int],
        storage: Storage,
        forms: tuple[KVForm, KVForm],
        attend: Attend,
        expansion: Expansion,
        traffic: DiskTraffic,
        attended: Attended,
    ) -> None:
        self.index, self.slots, self.columns, self.attended = index, slots, columns, attended
        self.segments: list[Segment] = []
        self._counts = {Tier.DEVICE: counts[0], Tier.HOST: counts[1], Tier.DISK: slots - sum(counts)}
        self._storage, self._forms, self._expansion, self._traffic = storage, forms, expansion, traffic
        self._attend = attend
        self._dtype = torch.float32
        self._shapes: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
        self._at_once = slots

    def prepare(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes room for keys and values shaped like these `[rows, heads, tokens, head_dim]`."""
        self._make_room(keys, values)
        if self.following is not None and not self.following.segments and self.following._is_on_device:
            self.following._make_room(keys, values)

    def _make_room(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        look = keys.dtype, ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]))
        if self.segments and look == (self._dtype, self._shapes):
            return
        self._storage.release(self.on_device(slice(0, self.slots)), KV)  # room for keys like those of the layer before
        self.segments, (self._dtype, self._shapes) = [], look
        if self.attended is not Attended.WHOLE:
            numbers = self._expansion.span * sum(heads * size for heads, size in self._shapes)
            self._at_once = min(self.slots, brought_at_once(numbers * keys.dtype.itemsize))
        first = 0
        for tier, count in self._counts.items():
            columns = self._expansion.span if tier is Tier.DISK else self.columns
            if count:
                shapes = [
                    ((heads, columns, size), dtype)
                    for new, form in zip((keys, values), self._forms, strict=True)
                    for heads, size, dtype in form.stored(new.shape[1], new.shape[3], new.dtype)
                ]
                self.segments.append(Segment(tier, first, count, self._room(tier, first, count, BlockLayout(shapes))))
                first += count

    def _room(self, tier: Tier, first: int, count: int, layout: BlockLayout) -> MemorySlots | DiskSlots:
        if tier is not Tier.DISK:
            parts = tuple(self._storage.zeros(tier, (count, *sizes), dtype, KV) for sizes, dtype in layout.shapes)
            return MemorySlots.over(parts)
        file = self._storage.file(count * layout.nbytes, KV)
        tails = tuple(
            self._storage.zeros(self._storage.main_memory, (count, heads, TAIL_COLUMNS, size), dtype, FROM_DISK)
            for (heads, _, size), dtype in layout.shapes
        )
        # Attention to a compressed cache does not read what it does not see.
        is_cleared = not (self.attended is Attended.PACKED and self.is_compressed)
        return DiskSlots(DiskBlocks(first, layout, file, list(range(count)), is_cleared), tails, self._traffic)

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Parts:
        """Keys and values as they are stored."""
        return (*self._forms[0].pack(keys), *self._forms[1].pack(values))

    def seen(self, parts: Parts, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        """What attention gets for these keys and values: themselves, or what packing them to `parts` has left."""
        if self._forms[0].is_exact:
            return keys, values
        seen = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (keys, values)]
        self._unpack(parts, seen[0], seen[1])
        return seen[0], seen[1]

    def write_column(self, column: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """One new token of the slots 0 to rows - 1: `[rows, heads, 1, head_dim]` into `column`."""
        made = self.pack(keys, values)
        for segment, outside in self._blocks(keys.shape[0]):
            segment.slots.write_column(column, tuple(new[outside, :, 0] for new in made))

    def write_columns(self, columns: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """New tokens of the slots 0 to rows - 1: `[rows, heads, width, head_dim]`, each into its column of `[rows,
        width]`."""
        made = self.pack(keys, values)
        for segment, outside in self._blocks(keys.shape[0]):
            segment.slots.write_columns(columns[outside], tuple(new[outside] for new in made))

    @property
    def takes_guesses(self) -> bool:
        """Whether rows may gain several tokens at a time: what attention reads answers more than one query a row."""
        return self.attended is not Attended.PACKED or self.is_compressed

    def write_prompts(self, slots: Sequence[int], end: int, parts: Parts, lengths: Sequence[int]) -> None:
        """Packed prompts `[rows, heads, width, ...]`, of each the last so many tokens, into their slots, in the columns
        up to and including `end`."""
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            segment, columns = self._segment(slot), slice(end + 1 - length, end + 1)
            segment.slots.write_prompt(slot - segment.first, columns, tuple(part[row, :, -length:] for part in parts))

    def in_one_place(self, rows: int, first: int, end: int) -> KeysAndValues | None:
        """Keys and values of the slots 0 to `rows` - 1 in columns `first` to `end`, if they lie beside each other on
        the device, as they were made."""
        blocks = self._blocks(rows)
        if self._is_packed or len(blocks) > 1 or blocks[0][0].tier is not Tier.DEVICE:
            return None
        keys, values = next(self._decoded(rows, slice(first, end + 1)))[1].parts
        return keys, values

    def gathered(self, rows: int, first: int, end: int, device: torch.device) -> KeysAndValues:
        """The same, brought together on `device` if they are not there."""
        whole = self.in_one_place(rows, first, end)
        if whole is not None:
            return whole
        columns, width = slice(first, end + 1), end + 1 - first
        blocks = (each for _, some in self._decoded(rows, columns) for each in some.placed(width))
        if self._is_packed:
            return self._unpacked(blocks, rows, columns)
        keys, values = (
            torch.empty((rows, heads, width, size), dtype=self._dtype, device=device) for heads, size in self._shapes
        )
        for parts, outside in blocks:
            keys[outside], values[outside] = parts
        return keys, values

    def read(
        self, rows: int, first: int, end: int, device: torch.device, *, host_attention: bool = False
    ) -> Iterator[OwnKeys]:
        """The same, some rows at a time, tier by tier: views where that is possible, else on `device` until the next
        ones are asked for. With `host_attention` plain ones on the host stay there."""
        columns = slice(first, end + 1)
        for segment, some in self._decoded(rows, columns):
            stays = segment.tier is Tier.DEVICE or (host_attention and segment.tier is Tier.HOST)
            if stays and not self._is_packed:
                yield OwnKeys(some.parts[0], some.parts[1], some.slots, some.before)
                continue
            for mine in some.cut(self._at_once):
                count = mine.slots.stop - mine.slots.start
                if self._is_packed:
                    held = slice(0, mine.parts[0].shape[2])
                    keys, values = self._unpacked([(mine.parts, slice(0, count))], count, held)
                else:
                    keys, values = (part.to(device) for part in mine.parts)
                yield OwnKeys(keys, values, mine.slots, mine.before)

    def packed(self, rows: int, first: int, end: int) -> Iterator[PackedKeys]:
        """The same as they are kept, some rows at a time, tier by tier."""
        for _, some in self._decoded(rows, slice(first, end + 1)):
            half = len(some.parts) // 2
            is_single = not self.takes_guesses
            yield PackedKeys(some.parts[:half], some.parts[half:], some.slots, some.before, self._attend, is_single)

    def extend(self, slot: int, first: int, end: int, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        """More tokens of a row, `[1, heads, width, head_dim]`, in the columns up to and including `end`. Gives its keys
        and values in columns `first` to `end`, where the new ones are."""
        held = self._entering(slot, first, end)
        for pack in self._packing(keys, values, held):
            pack()
        if self._is_packed:
            return self._unpacked([(held, slice(0, 1))], 1, slice(first, end + 1))
        return held[0].to(keys.device), held[1].to(keys.device)

    def extend_behind(
        self, slot: int, first: int, end: int, keys: torch.Tensor, values: torch.Tensor
    ) -> KeysAndValues | None:
        """The same, of a compressed cache; gives those before the new ones, if there are any."""
        held, width = self._entering(slot, first, end), end + 1 - first - keys.shape[2]
        packing = self._packing(keys, values, held)
        if not width:
            do_all(*packing)
            return None
        before = self._room_for(1, width)
        do_all(*packing, *self._unpacking(tuple(part[:, :, :width] for part in held), *before))
        return before

    @property
    def is_compressed(self) -> bool:
        """Whether keys and values are packed, and come back as they were."""
        return self._forms[0].is_packed and self._forms[0].is_exact

    def _entering(self, slot: int, first: int, end: int) -> Parts:
        """The place of all that a row has once more of its tokens have come, `[1, heads, columns, ...]`."""
        segment = self._segment(slot)
        return tuple(part[None] for part in segment.slots.entering(slot - segment.first, slice(first, end + 1)))

    def _packing(self, keys: torch.Tensor, values: torch.Tensor, held: Parts) -> tuple[Callable[[], None], ...]:
        """What writes new keys and values to the last columns of `held`."""
        new, half = tuple(part[:, :, -keys.shape[2] :] for part in held), len(held) // 2
        return (
            partial(self._forms[0].pack_into, keys, new[:half]),
            partial(self._forms[1].pack_into, values, new[half:]),
        )

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` goes to slot `target`, which is before it."""
        old, new = self._segment(source), self._segment(target)
        if old is new:
            old.slots.move(source - old.first, target - old.first)
            return
        start, parts = old.slots.load(source - old.first)
        width = min(parts[0].shape[1], self.columns - start)
        held = tuple(part[:, :width] for part in parts)
        new.slots.write_prompt(target - new.first, slice(start, start + width), held)
        old.slots.vacate(source - old.first)

    def vacate(self, slot: int) -> None:
        """No row is in the slot any more."""
        segment = self._segment(slot)
        segment.slots.vacate(slot - segment.first)

    def shift(self, by: Sequence[int]) -> None:
        """Moves all columns of the first slots to the left by so many."""
        for segment in self.segments:
            segment.slots.shift(by[segment.first : segment.first + segment.count])

    @property
    def lies_together(self) -> bool:
        """Whether all slots are made, and in memory beside each other."""
        return len(self.segments) == 1 and isinstance(self.segments[0].slots, MemorySlots)

    def lay_out(self, new: Relayout) -> None:
        """Cuts the memory anew, which must lie together."""
        (segment,) = self.segments
        assert isinstance(segment.slots, MemorySlots)
        self.slots, self.columns = new.slots, new.columns
        self.segments = [Segment(segment.tier, 0, new.slots, segment.slots.laid_out(new))]

    def on_device(self, slots: slice) -> Iterator[torch.Tensor]:
        """The memory on the device of some slots."""
        for segment in self.segments:
            first, stop = max(slots.start - segment.first, 0), min(slots.stop - segment.first, segment.count)
            if segment.tier is Tier.DEVICE and stop > first and isinstance(segment.slots, MemorySlots):
                yield from (part[first:stop] for part in segment.slots.parts)

    @property
    def _is_on_device(self) -> bool:
        return self._counts[Tier.DEVICE] == self.slots

    @property
    def _is_packed(self) -> bool:
        return self._forms[0].is_packed

    def _unpack(self, parts: Parts, keys: torch.Tensor, values: torch.Tensor) -> None:
        for unpack in self._unpacking(parts, keys, values):
            unpack()

    def _unpacking(self, parts: Parts, keys: torch.Tensor, values: torch.Tensor) -> tuple[Callable[[], None], ...]:
        half = len(parts) // 2
        return (
            partial(self._forms[0].unpack, parts[:half], keys),
            partial(self._forms[1].unpack, parts[half:], values),
        )

    def _decoded(self, rows: int, columns: slice) -> Iterator[tuple[Segment, SomeRows]]:
        """What each segment has of the decode batch in these columns, some rows at a time; their slots are all
        segments'."""
        for segment, outside in self._blocks(rows):
            for some in segment.slots.read(outside.stop - outside.start, columns):
                slots = slice(segment.first + some.slots.start, segment.first + some.slots.stop)
                yield segment, replace(some, slots=slots)

    def _blocks(self, rows: int) -> list[tuple[Segment, slice]]:
        """The segments that have some of the slots 0 to `rows` - 1, and which of these."""
        return [
            (segment, slice(segment.first, stop))
            for segment in self.segments
            if (stop := min(rows, segment.first + segment.count)) > segment.first
        ]

    def _segment(self, slot: int) -> Segment:
        return next(s for s in self.segments if s.first <= slot < s.first + s.count)

    def _unpacked(self, blocks: Iterable[tuple[Parts, slice]], rows: int, columns: slice) -> KeysAndValues:
        """Packed tokens as rows of a batch (the second of a block), in the one room for that."""
        keys, values = self._room_for(rows, columns.stop - columns.start)
        for parts, outside in blocks:
            self._unpack(parts, keys[outside], values[outside])
        return keys, values

    def _room_for(self, rows: int, tokens: int) -> KeysAndValues:
        """The one room for keys and values that are unpacked."""
        most = 1 if self.attended is Attended.PACKED else self._at_once
        keys, values = (
            self._expansion.room(what, (rows, heads, tokens, size), self._dtype, most)
            for what, (heads, size) in zip(("keys", "values"), self._shapes, strict=True)
        )
        return keys, values
