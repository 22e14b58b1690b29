"""The state of a run at one moment, from samples of what it had done: rates over the last minutes, time left."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

RATE_WINDOW_SECONDS = 180.0
SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Sample:
    """What the run had done when a pass ended: `seconds` on the clock, the rest as totals since its start."""

    seconds: float
    rows: int
    decode_tokens: int
    prefill_tokens: int
    wait_seconds: float
    bytes_moved: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is shown. Rates are means over the window; `seconds_left` is infinite while nobody can know it.

    `pass_seconds` is how long the pass under way has taken so far.
    """

    rows_done: int
    total_rows: int | None
    rows_in_flight: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    bytes_per_second: Mapping[str, float]
    wait_share: float
    elapsed: float
    pass_seconds: float
    seconds_left: float


class Samples:
    """The samples of the last minutes, a quarter of a second apart: a tiny model makes hundreds of passes a second."""

    def __init__(self, first: Sample) -> None:
        self._started = first.seconds
        self._kept = deque([first])

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def last(self) -> Sample:
        return self._kept[-1]

    @property
    def rows_of_late(self) -> int:
        """Rows that were done in the window."""
        return self._kept[-1].rows - self._kept[0].rows

    def add(self, sample: Sample) -> None:
        if len(self._kept) > 1 and sample.seconds - self._kept[-2].seconds < SAMPLE_SECONDS:
            self._kept.pop()
        self._kept.append(sample)
        while len(self._kept) > 2 and sample.seconds - self._kept[1].seconds > RATE_WINDOW_SECONDS:
            self._kept.popleft()  # one from before the window stays, so that rates are over the whole of it

    def correct_rows(self, rows: int) -> None:
        """The rows that are done, where no pass has brought all of them."""
        self._kept[-1] = replace(self._kept[-1], rows=rows)

    def snapshot(self, now: float, total_rows: int | None, rows_in_flight: int) -> Snapshot:
        """Rates between the oldest and the newest sample of the window. `now` is on the samples' clock."""
        first, last = self._kept[0], self._kept[-1]
        seconds = max(last.seconds - first.seconds, 1e-9)
        rows_per_second = (last.rows - first.rows) / seconds
        left = math.inf if total_rows is None else total_rows - last.rows
        return Snapshot(
            rows_done=last.rows,
            total_rows=total_rows,
            rows_in_flight=rows_in_flight,
            decode_tokens_per_second=(last.decode_tokens - first.decode_tokens) / seconds,
            prefill_tokens_per_second=(last.prefill_tokens - first.prefill_tokens) / seconds,
            bytes_per_second={
                link: (count - first.bytes_moved.get(link, 0)) / seconds for link, count in last.bytes_moved.items()
            },
            wait_share=min(1.0, (last.wait_seconds - first.wait_seconds) / seconds),
            elapsed=(last.seconds if left <= 0 else now) - self._started,
            pass_seconds=0.0 if left <= 0 else now - last.seconds,
            seconds_left=_seconds_left(left, rows_per_second, now - last.seconds),
        )


def _seconds_left(rows: float, rows_per_second: float, since: float) -> float:
    """0 only where nothing is left."""
    if rows <= 0:
        return 0.0
    return max(1.0, rows / rows_per_second - since) if rows_per_second > 0 else math.inf
