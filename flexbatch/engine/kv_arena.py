"""The KV cache of all rows in flight: for each layer an arena of slots by columns, cut into tiers by slot.

All live rows end at the same column `end`, so the decode batch is an ordinary left-padded batch at any moment; a
joining prompt writes its keys and values into the columns up to `end`. When the columns run out, the arena is shifted
to the left by what no live row needs any more.

Layout of one segment: `[slots, heads, columns, head_dim]`. Everything starts as zeros, because a masked position still
multiplies its value by a weight of zero, which must not meet a NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from flexbatch.engine.storage import Storage
from flexbatch.plan.policy import Tier


@dataclass(frozen=True)
class Segment:
    """The slots `first` to `first + count - 1` of one layer, on one tier."""

    tier: Tier
    first: int
    count: int
    keys: torch.Tensor
    values: torch.Tensor


class LayerStore:
    """One layer's arena. Its segments are made when the first keys arrive and show heads, sizes and type."""

    def __init__(self, index: int, slots: int, columns: int, counts: tuple[int, int], storage: Storage) -> None:
        self.index, self.slots, self.columns = index, slots, columns
        self.segments: list[Segment] = []
        self._counts = {Tier.DEVICE: counts[0], Tier.HOST: counts[1], Tier.DISK: slots - sum(counts)}
        self._storage = storage

    def prepare(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes room for keys and values shaped like these `[rows, heads, tokens, head_dim]`."""
        if self.segments:
            return
        first = 0
        for tier, count in self._counts.items():
            if count:
                made = [
                    self._storage.zeros(tier, (count, new.shape[1], self.columns, new.shape[3]), new.dtype, "KV cache")
                    for new in (keys, values)
                ]
                self.segments.append(Segment(tier, first, count, made[0], made[1]))
                first += count

    def write_column(self, column: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """One new token of the slots 0 to rows - 1: `[rows, heads, 1, head_dim]` into `column`."""
        for segment in self.segments:
            stop = min(keys.shape[0], segment.first + segment.count)
            if stop > segment.first:
                rows = slice(segment.first, stop)
                segment.keys[: stop - segment.first, :, column] = keys[rows, :, 0]
                segment.values[: stop - segment.first, :, column] = values[rows, :, 0]

    def write_prompts(self, slots: Sequence[int], end: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Prompts `[rows, heads, width, head_dim]` into their slots, in the columns up to and including `end`."""
        columns = slice(end + 1 - keys.shape[2], end + 1)
        for row, slot in enumerate(slots):
            segment = next(s for s in self.segments if s.first <= slot < s.first + s.count)
            segment.keys[slot - segment.first, :, columns] = keys[row]
            segment.values[slot - segment.first, :, columns] = values[row]

    def read(self, rows: int, first: int, end: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slots 0 to `rows` - 1 in columns `first` to `end`; a view where one tier holds all."""
        columns = slice(first, end + 1)
        parts = [
            (s.keys[: rows - s.first, :, columns].to(device), s.values[: rows - s.first, :, columns].to(device))
            for s in self.segments
            if s.first < rows
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([keys for keys, _ in parts]), torch.cat([values for _, values in parts])

    def move(self, source: int, target: int) -> None:
        """Copies slot `source` over slot `target`."""
        of = {slot: next(s for s in self.segments if s.first <= slot < s.first + s.count) for slot in (source, target)}
        for name in ("keys", "values"):
            getattr(of[target], name)[target - of[target].first] = getattr(of[source], name)[source - of[source].first]

    def shift(self, by: int) -> None:
        """Moves all columns to the left by `by`, slot by slot so that the copy stays small."""
        for segment in self.segments:
            for store in (segment.keys, segment.values):
                for slot in store:
                    slot[:, : self.columns - by] = slot[:, by:].clone()


class KVArena:
    """All layers' stores, and the column `end` at which every live row ends.

    `span` is the longest that a row can get (prompt and completion, in tokens), `slack` the columns between two shifts.
    """

    def __init__(self, counts: Sequence[tuple[int, int]], slots: int, span: int, slack: int, storage: Storage) -> None:
        self.span, self.slots, self.columns = span, slots, span + slack
        self.end = span - 1
        self.layers = [LayerStore(index, slots, self.columns, each, storage) for index, each in enumerate(counts)]

    def advance(self) -> None:
        """The next pass's column; shifts the arena where the columns have run out."""
        self.end += 1
        if self.end == self.columns:
            by = self.columns - self.span
            for layer in self.layers:
                layer.shift(by)
            self.end -= by

    def move(self, source: int, target: int) -> None:
        for layer in self.layers:
            layer.move(source, target)

    def decode_cache(self, rows: int, first: int) -> Cache:
        """The cache of a decode batch: slots 0 to `rows` - 1, whose oldest live column is `first`."""
        return Cache(layers=[DecodeLayer(layer, rows, first, self.end) for layer in self.layers])

    def prefill_cache(self, slots: Sequence[int]) -> Cache:
        """The cache of joining prompts; they keep nothing but what they write into the arena. No slots: nothing."""
        return Cache(layers=[PrefillLayer(layer, slots, self.end) for layer in self.layers])


class _ArenaLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What both kinds share: they are views of the arena, so there is nothing to initialise."""

    is_sliding = False

    def __init__(self, store: LayerStore, end: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store, self.end, self.is_initialized = store, end, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:  # noqa: ARG002 - Transformers' signature
        self.is_initialized = True

    def get_max_length(self) -> int:
        return self.store.columns


class DecodeLayer(_ArenaLayer):  # type: ignore[no-untyped-call]
    """One token for every slot of the decode batch: written at column `end`, attending from column `first` on."""

    def __init__(self, store: LayerStore, rows: int, first: int, end: int) -> None:
        super().__init__(store, end)
        self.rows, self.first = rows, first

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.store.write_column(self.end, key_states, value_states)
        return self.store.read(self.rows, self.first, self.end, key_states.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end - self.first + query_length, 0

    def get_seq_length(self) -> int:
        return self.end - self.first


class PrefillLayer(_ArenaLayer):  # type: ignore[no-untyped-call]
    """Joining prompts: attention sees their own keys and values, which are also written into the arena."""

    def __init__(self, store: LayerStore, slots: Sequence[int], end: int) -> None:
        super().__init__(store, end)
        self.slots = slots

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.slots:
            self.store.prepare(key_states, value_states)
            self.store.write_prompts(self.slots, self.end, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0
