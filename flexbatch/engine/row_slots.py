"""The rows in flight: which of them is in which slot of the KV arena."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

from flexbatch.engine.growing import GrowingRow
from flexbatch.engine.joining import Entering
from flexbatch.engine.kv_arena import KVArena
from flexbatch.plan.slot_layout import SlotMemory, next_layout
from flexbatch.plan.workload import column_slack

Need = Callable[[GrowingRow], int]


class RowSlots:
    """One place for each slot of the arena that may be used; `most` of them where rows are short."""

    def __init__(self, arena: KVArena, most: int) -> None:
        self._arena, self._memory = arena, SlotMemory(arena.layout, max(most, arena.slots))
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

    def in_use(self, entering: Entering | None) -> int:
        """How many slots there are up to the last one with a row's keys and values, or a part of them."""
        return max(len(self.up_to_last), 0 if entering is None else entering.slot + 1)

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

    def lay_out(self, entering: Entering | None, waiting: Iterable[GrowingRow], need: Need) -> None:
        """Cuts the arena's memory into as many slots as it has room for of rows like those at hand: in slots, on the
        way into one, and `waiting` for one. `need` says how many columns a row may come to have."""
        if self._memory.most == self._memory.planned.slots or self.are_cut or not self._arena.may_be_laid_out:
            return
        if entering is not None and len(entering.sizes) >= column_slack(1):
            return  # its parts to come need columns ahead
        in_flight = [*self.live, *([] if entering is None else [entering.row])]
        now = self._arena.layout
        new = next_layout(self._memory, now, in_flight=list(map(need, in_flight)), waiting=list(map(need, waiting)))
        if new == now:
            return
        self.fill_holes(set() if entering is None else {entering.slot})
        kept = self.in_use(entering)
        if kept <= new.slots:
            self._arena.lay_out(new, kept)
            self._rows = self._rows[: new.slots] + [None] * (new.slots - len(self._rows))

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
