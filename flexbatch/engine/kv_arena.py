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

import torch

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

    def read(self, rows: int, first: int, end: int) -> list[Segment]:
        """Keys and values of the slots 0 to `rows` - 1 in columns `first` to `end`, tier by tier; views."""
        columns = slice(first, end + 1)
        return [
            Segment(
                s.tier,
                s.first,
                stop - s.first,
                s.keys[: stop - s.first, :, columns],
                s.values[: stop - s.first, :, columns],
            )
            for s in self.segments
            if (stop := min(rows, s.first + s.count)) > s.first
        ]

    def gather(
        self, slots: Sequence[int], first: int, end: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[slots, heads, columns, head_dim]` of these slots in columns `first` to `end`, on `device`; a
        view where that is possible."""
        columns = slice(first, end + 1)
        keys, values = [], []
        for slot in slots:
            segment = next(s for s in self.segments if s.first <= slot < s.first + s.count)
            here = slice(slot - segment.first, slot - segment.first + 1)
            keys.append(segment.keys[here, :, columns].to(device))
            values.append(segment.values[here, :, columns].to(device))
        return (keys[0], values[0]) if len(slots) == 1 else (torch.cat(keys), torch.cat(values))

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
        self.reserve(0)

    def reserve(self, ahead: int) -> None:
        """Sees to it that the columns up to `end + ahead` exist, `ahead` less than the slack; shifts the arena if not."""
        if self.end + ahead < self.columns:
            return
        by = self.end - self.span
        for layer in self.layers:
            layer.shift(by)
        self.end -= by

    def move(self, source: int, target: int) -> None:
        for layer in self.layers:
            layer.move(source, target)
