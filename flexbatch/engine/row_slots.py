"""The rows in flight: which of them is in which slot of the KV arena."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set

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
        self._arena.vacate(slot)

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
        in_flight = self._in_flight(entering)
        now = self._arena.layout
        new = next_layout(self._memory, now, in_flight=list(map(need, in_flight)), waiting=list(map(need, waiting)))
        if new == now:
            return
        self.fill_holes(set() if entering is None else {entering.slot})
        kept = self.in_use(entering)
        if kept <= new.slots:
            self._arena.align(self._lags(entering))
            self._are_aligned(entering)
            self._arena.lay_out(new, kept)
            self._rows = self._rows[: new.slots] + [None] * (new.slots - len(self._rows))

    def reserve(self, ahead: int, entering: Entering | None) -> None:
        """Sees to it that the arena has columns up to so many (less than its slack) after its end, and for the rows'
        guesses."""
        most = max([ahead, *(len(row.guesses) for row in self.live)])
        if self._arena.reserve(most, self._lags(entering)):
            self._are_aligned(entering)

    def settle(self, gained: Mapping[int, int], entering: Entering | None) -> None:
        """The arena's end becomes that of the row that is ahead now. `gained` says how many tokens each request has got
        in this pass that were in slots before it; others have one. What is behind the end lags."""
        rows = self._in_flight(entering)
        for row in rows:
            row.lag -= gained.get(row.request.index, 1) - 1
        ahead = max((-row.lag for row in rows), default=0)
        for row in rows:
            row.lag += ahead
        self._arena.advance(ahead)

    def _lags(self, entering: Entering | None) -> list[int]:
        """Of the rows in the first slots, up to the last one that is in use."""
        lags = [0 if row is None else row.lag for row in self._rows[: self.in_use(entering)]]
        if entering is not None:
            lags[entering.slot] = entering.row.lag
        return lags

    def _are_aligned(self, entering: Entering | None) -> None:
        for row in self._in_flight(entering):
            row.lag = 0

    def _in_flight(self, entering: Entering | None) -> list[GrowingRow]:
        return [*self.live, *([] if entering is None else [entering.row])]

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
