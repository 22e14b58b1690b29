"""How many tokens each row guesses: as many as fill the time in which passes wait for weights.

A pass brings a token a row, and one more for each guess that is right (`lookup.py`). Guesses cost arithmetic: where
that is what a pass waits for there are none. So their number follows from what was waited for in the passes before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from flexbatch.engine.growing import GrowingRow
from flexbatch.engine.lookup import Acceptance, Draft, Remembered, draft
from flexbatch.engine.reading import Gain
from flexbatch.plan.memory_need import MOST_PACE

MOST_GUESSES = 7
"""A row's in a pass: attention's kernel for prompts begins at nine queries, which see their keys in another way."""

LEAST_GAIN = 0.05  # tokens a row, that its next guess must promise
USED = 0.9  # of the time that was waited, what guesses may take
PACE_MEMORY = 0.9  # how much the passes before count


class Guesses:
    """What the rows of a pass guess. `room` is how many guesses may be fed at once beside `rows` rows (0: none)."""

    def __init__(self, room: int, rows: int) -> None:
        self._room, self._rows = room, rows
        self._acceptance, self._said = Acceptance(), Remembered()
        self._fed = 0
        self._affordable = 0.0  # guesses that there was time for in the last pass
        self._token_seconds = 0.0  # of arithmetic
        self._pace = 1.0

    def draw_up(self, rows: Sequence[GrowingRow]) -> int:
        """Gives each row its draft for the next pass; returns how many tokens these are."""
        most = min(MOST_GUESSES, int(self._affordable / len(rows)), self._most(len(rows))) if rows else 0
        drafts = [_within(row, draft(row.all_tokens, self._said.tokens)) if most else Draft() for row in rows]
        shares = [self._acceptance.share(each.matched) if each.tokens else 0.0 for each in drafts]
        width = worthwhile(shares, [len(each.tokens) for each in drafts], most)
        for row, each in zip(rows, drafts, strict=True):
            row.draft = replace(each, tokens=each.tokens[:width])
        self._fed = width * len(rows)  # whoever guesses less is filled up
        return sum(len(row.draft.tokens) for row in rows)

    def learn(self, gains: Iterable[Gain], seconds: float, waited: float, tokens: int) -> None:
        """From a pass of so many `seconds` with `tokens` that were no guesses: `gains` are those of rows that were in
        slots before it."""
        rows = gained = 0
        for gain in gains:
            rows, gained = rows + 1, gained + gain.tokens
            self._acceptance.learn(gain.row.draft, gain.row.tokens[-gain.tokens :])
        if rows:
            self._pace = PACE_MEMORY * self._pace + (1 - PACE_MEMORY) * gained / rows
        if tokens:
            busy = (seconds - waited) / (tokens + self._fed)
            # What a pass takes whatever is in it counts least where there are many tokens.
            self._token_seconds = min(self._token_seconds or busy, busy) * (1 + (1 - PACE_MEMORY) / 2)
        self._affordable = affordable(self._fed, waited, self._token_seconds)

    @property
    def pace(self) -> float:
        """Tokens that a row has gained in a pass, of late: so many times as fast prompts may follow. At most
        `MOST_PACE`, which is what memory is planned for."""
        return min(MOST_PACE, self._pace)

    def remember(self, row: GrowingRow) -> None:
        """A row is done: what it said may be said again by others."""
        if self._room:
            self._said.add((*row.request.prompt_ids[-1:], *row.tokens))

    def _most(self, rows: int) -> int:
        """Guesses of each of so many rows that there is room for."""
        return (self._room + max(0, self._rows - rows)) // rows if self._room else 0


def affordable(fed: int, waited: float, token_seconds: float) -> float:
    """How many guesses there was time for in a pass that was fed with some and still waited for weights."""
    return USED * (fed + waited / token_seconds) if token_seconds > 0 else 0.0


def worthwhile(shares: Sequence[float], lengths: Sequence[int], most: int) -> int:
    """How many guesses to feed for each row, at most `most`: as long as one more brings `LEAST_GAIN` tokens a row.
    Those of row r are `lengths[r]`, each right with probability `shares[r]` if those before it were."""
    for count in range(1, most + 1):
        gain = sum(share**count for share, length in zip(shares, lengths, strict=True) if length >= count)
        if gain < LEAST_GAIN * len(shares):
            return count - 1
    return most


def _within(row: GrowingRow, found: Draft) -> Draft:
    """Without what would be more than the row may still say, beside the token that the model says after it."""
    left = row.request.sampling.max_new_tokens - len(row.tokens) - 1
    return replace(found, tokens=found.tokens[: max(0, left)])
