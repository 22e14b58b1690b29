"""How many tokens each row guesses: as many as fill the time in which passes wait for weights.

A pass brings a token a row, and one more for each guess that is right (`lookup.py`). Guesses cost arithmetic: where
that is what a pass waits for there are none. So their number follows from what was waited for in the passes before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from flexbatch.engine.growing import GrowingRow
from flexbatch.engine.lookup import MEMORY, Acceptance, Draft, Remembered, draft
from flexbatch.engine.reading import Gain
from flexbatch.plan.rows_in_flight import GuessRoom

MOST_GUESSES = 7
"""A row's in a pass: attention's kernel for prompts begins at nine queries, which see their keys in another way."""

NO_GUESSES = GuessRoom()
LEAST_GAIN = 0.05  # tokens a row, that its next guess must promise
USED = 0.9  # of the time that was waited, what guesses may take
PACE_MEMORY = 0.9  # how much the passes before count
FORGOTTEN = 1.05  # what a token takes may grow so much from pass to pass


class Guesses:
    """What the rows of a pass guess, where there is `room` for so much beside `rows` rows."""

    def __init__(self, room: GuessRoom, rows: int) -> None:
        self._room, self._rows, self._least_seconds = room.tokens, rows, room.token_seconds
        self._acceptance, self._said = Acceptance(), Remembered()
        self._fed = 0
        self._affordable = 0.0  # guesses that there was time for in the last pass
        self._token_seconds = math.inf
        self.pace = 1.0
        """Tokens that a row has gained in a pass, of late: so many times as fast may prompts follow."""

    def draw_up(self, rows: Sequence[GrowingRow]) -> None:
        """Gives each row what it guesses in the next pass."""
        most = min(MOST_GUESSES, int(self._affordable / len(rows)), self._most(len(rows))) if rows else 0
        for row in rows:
            row.draft = _within(row, draft(row.all_tokens, self._said.tokens)) if most else Draft()
        shares = [self._acceptance.share(row.draft.matched) if row.draft.tokens else 0.0 for row in rows]
        width = worthwhile(shares, [len(row.draft.tokens) for row in rows], most)
        for row in rows:
            row.guesses = row.draft.tokens[:width]

    def feed(self, batch: Sequence[GrowingRow | None]) -> int:
        """Says how many guesses the decode batch is fed with, after cutting them to what there is room for: its empty
        slots, and rows that guess less than others, take as much."""
        rows = [row for row in batch if row is not None]
        most = self._most(len(batch)) if batch else 0
        for row in rows:
            row.guesses = row.guesses[:most]
        self._fed = len(batch) * max((len(row.guesses) for row in rows), default=0)
        return sum(len(row.guesses) for row in rows)

    def learn(self, gains: Sequence[Gain], seconds: float, waited: float, tokens: int) -> None:
        """From a pass of so many `seconds`, `waited` of them for weights, with `tokens` that were no guesses: `gains`
        are those of rows that were in slots before it."""
        memory = MEMORY ** (1 / max(1, len(gains)))
        for gain in gains:
            self._acceptance.learn(gain.row.draft, gain.row.tokens[-gain.tokens :], memory)
        if gains:
            mean = sum(gain.tokens for gain in gains) / len(gains)
            self.pace = PACE_MEMORY * self.pace + (1 - PACE_MEMORY) * mean
        fed = tokens + self._fed
        if fed:
            # What a pass takes whatever is in it counts least where there are many tokens.
            busy = max(self._least_seconds, (seconds - waited) / fed)
            self._token_seconds = min(self._token_seconds * FORGOTTEN, busy)
        # Where an accelerator computes, the time that its work takes is waited for as well.
        idle = min(waited, seconds - fed * self._least_seconds)
        self._affordable = affordable(self._fed, max(0.0, idle), self._token_seconds)

    def remember(self, row: GrowingRow) -> None:
        """A row is done: what it said may be said again by others."""
        if self._room:
            self._said.add((*row.request.prompt_ids[-1:], *row.tokens))

    def _most(self, rows: int) -> int:
        """Guesses of each of so many rows that there is room for."""
        return max(0, self._room + self._rows - rows) // rows if self._room else 0


def affordable(fed: int, waited: float, token_seconds: float) -> float:
    """How many guesses there was time for in a pass that was fed with some and still waited for weights."""
    return USED * (fed + waited / token_seconds) if 0 < token_seconds < math.inf else 0.0


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
