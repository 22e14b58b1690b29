"""Which waiting prompts enter a pass, decided on numbers alone: the engine follows it, the plan simulates it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Where weights are streamed, a prompt that does not fit a pass's tokens enters in parts of at least this many: fewer
# would leave the matrix products far below their rate.
SHORTEST_PART = 64

# Parts are multiples of this where they can be: matrix products lose up to a quarter of their rate just above the
# sizes that the kernels are cut in (docs/benchmarks.md).
EVEN = 32


def joining_count(lengths: Sequence[float], free_slots: int, room: float) -> int:
    """How many of the waiting prompts (tokens each, in order) fit whole into `room` tokens of a pass."""
    total = 0.0
    for count, length in enumerate(lengths[:free_slots]):
        total += length
        if total > room + 1e-6:
            return count
    return min(len(lengths), free_slots)


def parts(length: int, room: float, budget: float, shortest: int) -> list[int]:
    """The sizes of the parts, one for each pass, in which a prompt of `length` tokens enters; none where it should not.

    The first takes the `room` that is left in this pass, the others about `budget` tokens each. Every part has at least
    `shortest` tokens, and more of them than there are parts: the decode batch writes into the columns of the last
    tokens (as many as parts) before the last part comes.
    """
    if not shortest:
        return []
    least = max(shortest, 2 * math.isqrt(length) + 2)
    first = _even(min(int(room), length - least), least)
    if first < least:
        return []
    rest = length - first
    count = max(1, round(rest / max(budget, least)))
    size = max(least, _even(math.ceil(rest / count), least))
    sizes = [first]
    while rest - size >= least:
        sizes.append(size)
        rest -= size
    return [*sizes, rest]


def _even(tokens: int, least: int) -> int:
    """Rounded down to a multiple of `EVEN`, where that leaves at least `least`."""
    even = tokens // EVEN * EVEN
    return even if even >= least else tokens


@dataclass(frozen=True, slots=True)
class Admitted:
    """What enters one pass: `part` tokens of the prompt that is entering (0: none) with which it is `complete` or not,
    the first `whole` waiting prompts whole, and the first part of the next one if it is split in `sizes`."""

    part: int
    complete: bool
    whole: int
    sizes: tuple[int, ...]


class Admission:
    """Lets about `budget` prompt tokens into each pass; with a `shortest` part (0: none) on the average exactly so.

    Then a prompt that does not fit enters in parts over several passes, or, where it cannot be split, waits until
    enough passes have saved up for it. Without, every pass takes at least one prompt.
    """

    def __init__(self, budget: float, shortest: int) -> None:
        self.budget, self.saved = float(budget), 0.0
        self._shortest, self._rest = shortest, list[int]()

    @property
    def is_entering(self) -> bool:
        """Whether a prompt has entered in part."""
        return bool(self._rest)

    def admit(self, lengths: Sequence[float], splittable: Sequence[bool], free_slots: int, idle: bool) -> Admitted:
        """The next pass, given the waiting prompts (tokens each, in order; at least as many as could fit) and whether
        they may be split. `idle`: no row is in flight."""
        part = self._rest.pop(0) if self._rest else 0
        complete = bool(part) and not self._rest
        room = self.budget + (max(0.0, self.saved) if idle else self.saved) - part
        whole, sizes = joining_count(lengths, free_slots, room), list[int]()
        left = room - sum(lengths[:whole])
        held_back = whole < min(len(lengths), free_slots) and not self._rest
        if held_back:
            sizes = parts(round(lengths[whole]), left, self.budget, self._shortest) if splittable[whole] else []
            self._rest = sizes[1:]
            if not sizes and not whole and not part and (idle or not self._shortest):
                whole, left = 1, 0.0
        # What a part took too much is owed; what is left is saved only if a prompt waited for more of it.
        self.saved = left if self._shortest and (left < 0.0 or (held_back and not sizes)) else 0.0
        return Admitted(part, complete, whole, tuple(sizes))
