"""The rows in flight: which of them is in which slot of the KV arena."""

from __future__ import annotations

from collections.abc import Set

from flexbatch.engine.growing import GrowingRow
from flexbatch.engine.kv_arena import KVArena


class RowSlots:
    """One place for each slot of the arena that may be used."""

    def __init__(self, arena: KVArena) -> None:
        self._arena = arena
        self._rows: list[GrowingRow | None] = [None] * arena.slots

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def live(self) -> list[GrowingRow]:
        return [row for row in self._rows if row is not None]

    @property
    def occupied(self) -> list[int]:
        """The slots of the live rows, in their order."""
        return [slot for slot, row in enumerate(self._rows) if row is not None]

    @property
    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self._rows) if row is None]

    @property
    def up_to_last(self) -> list[GrowingRow | None]:
        """All slots up to the last live row's."""
        return self._rows[: max(self.occupied, default=-1) + 1]

    def put(self, slot: int, row: GrowingRow) -> None:
        self._rows[slot] = row

    def clear(self, slot: int) -> None:
        self._rows[slot] = None

    def fill_holes(self, taken: Set[int]) -> None:
        """Moves rows from the end into free slots before them that are not `taken`, so that they lie densely."""
        holes = [slot for slot in self.free if slot not in taken]
        for hole, last in zip(holes, reversed(self.occupied), strict=False):
            if hole > last:
                break
            self._arena.move(last, hole)
            self._rows[hole], self._rows[last] = self._rows[last], None

    def cut(self) -> int:
        """Gives up the slots behind the live rows, which must lie densely; returns the device's bytes that are free."""
        live = len(self.live)
        del self._rows[live:]
        return self._arena.give_back(live)

    @property
    def are_cut(self) -> bool:
        return len(self._rows) < self._arena.slots

    def take_again(self) -> None:
        """All slots may be used again."""
        self._rows += [None] * (self._arena.slots - len(self._rows))
        self._arena.take_again()
