"""The KV cache of all rows in flight: for each layer a store of slots by columns.

All live rows end at the same column `end`, so the decode batch is an ordinary left-padded batch at any moment; a
joining prompt writes its keys and values into the columns up to `end`. Only where rows gain several tokens at a time
(`guessing.py`) do others lag behind. When the columns run out, the arena is shifted to the left by what no live row
needs any more, and all end at the same column again. Where rows are shorter than its slots, it is cut into more of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from flexbatch.engine.kv_expansion import Expansion
from flexbatch.engine.kv_form import attention_to, kv_forms
from flexbatch.engine.kv_memory import Relayout
from flexbatch.engine.kv_traffic import DiskTraffic
from flexbatch.engine.layer_store import FROM_DISK, KV, Attended, LayerStore
from flexbatch.engine.storage import Storage
from flexbatch.memory.transfer import StreamStatistics
from flexbatch.plan.slot_layout import SlotLayout


class KVArena:
    """All layers' stores, and the column `end` behind which no live row has a token.

    `span` is the longest that a row can get (prompt and completion, in tokens), `slack` the columns between two shifts,
    `bits` 16 (as the model made them), 8, 4 or `COMPRESSED`.
    """

    def __init__(
        self,
        counts: Sequence[tuple[int, int]],
        slots: int,
        span: int,
        slack: int,
        storage: Storage,
        bits: int = 16,
        attended: Attended = Attended.IN_PARTS,
    ) -> None:
        self.span, self.slots, self.columns = span, slots, span + slack
        self.end = span - 1
        self._storage, self._in_use = storage, slots
        forms, expansion = kv_forms(bits), Expansion(span, storage)
        attend = attention_to(bits)
        self._traffic = DiskTraffic(lambda nbytes: storage.budgets[storage.main_memory].reserve(nbytes, FROM_DISK))
        self.layers = [
            LayerStore(index, slots, self.columns, each, storage, forms, attend, expansion, self._traffic, attended)
            for index, each in enumerate(counts)
        ]
        for layer, following in pairwise(self.layers):
            layer.following = following

    def advance(self, by: int) -> None:
        """There are rows whose newest tokens come so many columns later."""
        self.end += by

    def reserve(self, ahead: int, lags: Sequence[int]) -> bool:
        """Sees to it that the columns up to `end + ahead` (`ahead` less than the slack) exist; else moves those of the
        first slots, which rows are in, to the left, so that all rows end at one column, and returns true. `lags` says
        how many columns before `end` each of them ends now. Other slots would only take memory by it that they did not
        have yet."""
        if self.end + ahead < self.columns:
            return False
        self._align(lags, self.end - self.span)
        return True

    def align(self, lags: Sequence[int]) -> None:
        """Moves the columns of the first slots to the right by what their rows lag behind."""
        if any(lags):
            self._align(lags, 0)

    def _align(self, lags: Sequence[int], by: int) -> None:
        for layer in self.layers:
            layer.shift([by - lag for lag in lags])
        self.end -= by

    @property
    def takes_guesses(self) -> bool:
        """Whether rows may gain several tokens at a time."""
        return all(layer.takes_guesses for layer in self.layers)

    @property
    def is_compressed(self) -> bool:
        """Whether keys and values are packed, and come back as they were."""
        return self.layers[0].is_compressed

    @property
    def layout(self) -> SlotLayout:
        return SlotLayout(self.slots, self.span)

    @property
    def may_be_laid_out(self) -> bool:
        """Whether the memory may be cut anew: all layers have it, in one place each."""
        return all(layer.lies_together for layer in self.layers)

    def lay_out(self, new: SlotLayout, kept: int) -> None:
        """Cuts the memory into other slots, with the rows of the first `kept` slots in the same ones. Every row ends
        as many columns before the end as it did, and none may need more of them up to there than the new span."""
        count = min(self.end + 1, new.span)
        source, target = slice(self.end + 1 - count, self.end + 1), slice(new.span - count, new.span)
        for layer in self.layers:
            layer.lay_out(Relayout(new.slots, new.columns, kept, source, target))
        self.slots, self.span, self.columns, self.end = new.slots, new.span, new.columns, new.span - 1
        self._in_use = new.slots

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
        """The row in slot `source` goes to slot `target`, which is before it."""
        for layer in self.layers:
            layer.move(source, target)

    def vacate(self, slot: int) -> None:
        """No row is in the slot any more."""
        for layer in self.layers:
            layer.vacate(slot)

    def statistics(self) -> StreamStatistics:
        """The traffic of rows that are on disk."""
        return self._traffic.statistics()

    def close(self) -> None:
        """Waits for what is on its way to the disk. Safe to repeat."""
        self._traffic.close()
