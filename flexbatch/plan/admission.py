"""Which waiting prompts enter a pass, decided on numbers alone: the engine follows it, the plan simulates it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Where weights are streamed, a prompt that does not fit a pass's tokens enters in parts of at least this many: each
# part is one more piece of work beside the others of its pass.
SHORTEST_PART = 32


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

    The first takes the `room` that is left in this pass, the others `budget` tokens each, the last what remains; where
    that is too little, all but the first give or take a few. The last part has more tokens than there are parts: the
    decode batch writes into the columns of so many of its tokens before it comes.
    """
    if not shortest:
        return []
    least = least_part(length, shortest)
    first = min(int(room), length - least)
    if first < shortest:
        return []
    size = max(int(budget), least)
    count, rest = divmod(length - first, size)
    if rest == 0 or rest >= least:
        return [first, *[size] * count, *[rest] * (rest > 0)]
    if 2 * rest <= least:
        return [first, *_evenly(length - first, count)]
    return [first, *_evenly(length - first - least, count), least]


def least_part(length: int, shortest: int) -> int:
    """Tokens of the shortest last part of a prompt of `length` tokens."""
    return max(shortest, 2 * math.isqrt(length) + 2)


def most_tokens(longest: int, budget: float, shortest: int) -> int:
    """The most tokens that one pass takes of prompts of up to `longest` tokens, all of which may be split: the budget
    or a part that is longer, and what earlier passes left. With less than a part for a budget prompts enter whole."""
    least = least_part(longest, shortest)
    return max(math.ceil(budget), least, longest if budget < shortest else 0) + least + shortest


def _evenly(total: int, count: int) -> list[int]:
    """`count` numbers that differ by one at most and add up to `total`."""
    each, more = divmod(total, count)
    return [each + 1] * more + [each] * (count - more)


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
        left -= sizes[0] if sizes else 0
        waited = whole < min(len(lengths), free_slots)
        self.saved = left if self._shortest and (left < 0.0 or waited) else 0.0
        return Admitted(part, complete, whole, tuple(sizes))
