"""How far the run is, while it runs: a live display on a terminal, a line every few seconds on a pipe or in a file."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flexbatch.records import PassResult

RATE_WINDOW_SECONDS = 180.0
SAMPLE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Sample:
    """What the run had done at one moment, in seconds on the clock and totals since its start."""

    seconds: float
    rows: int
    decode_tokens: int
    prefill_tokens: int
    wait_seconds: float
    bytes_moved: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is shown. Rates are means over the window; `seconds_left` is infinite while nobody can know it."""

    rows_done: int
    total_rows: int | None
    rows_in_flight: int
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    bytes_per_second: Mapping[str, float]
    wait_share: float
    elapsed: float
    seconds_left: float


def snapshot(samples: deque[Sample], total_rows: int | None, rows_in_flight: int, started: float) -> Snapshot:
    """Rates between the oldest and the newest sample of the window."""
    first, last = samples[0], samples[-1]
    seconds = max(last.seconds - first.seconds, 1e-9)
    row_rate = (last.rows - first.rows) / seconds
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
        elapsed=last.seconds - started,
        seconds_left=0.0 if left <= 0 else left / row_rate if row_rate > 0 else math.inf,
    )


def duration_text(seconds: float) -> str:
    """`42 s`, `7 min 05 s`, `3 h 12 min`, `2 d 4 h`; `?` where nobody knows yet."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def finish_text(seconds_left: float, now: datetime) -> str:
    """The time of day at which the run will be done, with the date where it is not today's."""
    if not math.isfinite(seconds_left):
        return "?"
    finish = now + timedelta(seconds=seconds_left)
    if finish.date() == now.date():
        return finish.strftime("%H:%M:%S" if seconds_left < 600 else "%H:%M")
    return finish.strftime("%a %d %b %H:%M")


def rate_text(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def traffic_text(bytes_per_second: Mapping[str, float]) -> str:
    """`disk>device 1.42 GB/s, host>device 0.30 GB/s`: the links that carry anything, busiest first."""
    busy = sorted(((rate, link) for link, rate in bytes_per_second.items() if rate > 0), reverse=True)
    return ", ".join(
        f"{link} {rate / 1e9:.2f} GB/s" if rate >= 1e7 else f"{link} {rate / 1e6:.2f} MB/s" for rate, link in busy
    )


def rows_text(now: Snapshot) -> str:
    if now.total_rows is None:
        return f"{now.rows_done:,} rows"
    share = now.rows_done / now.total_rows if now.total_rows else 1.0
    return f"{now.rows_done:,}/{now.total_rows:,} rows ({share:.0%})"


def line_text(now: Snapshot, clock: datetime) -> str:
    """The whole state in one plain line."""
    parts = [
        rows_text(now),
        f"{rate_text(now.decode_tokens_per_second)} tokens/s",
        f"prefill {rate_text(now.prefill_tokens_per_second)} tokens/s",
        f"{now.rows_in_flight:,} in flight",
    ]
    traffic = traffic_text(now.bytes_per_second)
    if traffic:
        parts.append(traffic)
    if now.wait_share >= 0.005:
        parts.append(f"waiting {now.wait_share:.0%}")
    if now.seconds_left == 0:
        parts.append(f"done in {duration_text(now.elapsed)}")
    else:
        parts.append(f"{duration_text(now.seconds_left)} left, done at {finish_text(now.seconds_left, clock)}")
    return " | ".join(parts)


def panel(now: Snapshot, clock: datetime) -> Group:
    """The same for a terminal, on four lines that stay where they are."""
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(
            total=None if now.total_rows is None else max(now.total_rows, 1), completed=now.rows_done, width=40
        ),
        f"{rows_text(now)}, {now.rows_in_flight:,} in flight",
    )
    left = f"{duration_text(now.seconds_left)} left, done at {finish_text(now.seconds_left, clock)}"
    return Group(
        bar,
        Text(
            f"  {rate_text(now.decode_tokens_per_second)} tokens/s generated, "
            f"{rate_text(now.prefill_tokens_per_second)} tokens/s of prompts"
        ),
        Text(f"  {traffic_text(now.bytes_per_second) or 'no bytes moved'}; {now.wait_share:.0%} of the time waiting"),
        Text(f"  {duration_text(now.elapsed)} so far, {left}" if now.seconds_left else "  done"),
    )


@dataclass
class Progress:
    """Call `update` after every pass, with the rows of the whole job that are done (earlier attempts included).

    The finish time comes from the rows finished in the last minutes of this attempt alone. Nothing here waits.
    """

    total_rows: int | None
    already_done: int = 0
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    every_seconds: float = 5.0
    clock: Callable[[], float] = time.monotonic
    _totals: Counter[str] = field(default_factory=Counter)
    _bytes: Counter[str] = field(default_factory=Counter)
    _in_flight: int = 0
    _samples: deque[Sample] = field(default_factory=deque)
    _started: float = 0.0
    _printed: float = -math.inf
    _last_line: str = ""
    _live: Live | None = None

    def __enter__(self) -> Progress:
        self._started = self._printed = self.clock()
        self._samples.append(Sample(self._started, self.already_done, 0, 0, 0.0, {}))
        if self.stream.isatty():
            console = Console(file=self.stream)
            self._live = Live(console=console, refresh_per_second=4, get_renderable=self._renderable, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._print()

    def update(self, result: PassResult, rows_done: int) -> None:
        now = self.clock()
        self._totals["decode"] += result.decode_tokens
        self._totals["prefill"] += result.prefill_tokens
        self._totals["wait_microseconds"] += round(1e6 * sum(result.waits.values()))
        self._bytes.update(result.bytes_moved)
        self._in_flight = result.rows_in_flight
        totals = self._totals
        waited = totals["wait_microseconds"] / 1e6
        self._keep(Sample(now, rows_done, totals["decode"], totals["prefill"], waited, dict(self._bytes)))
        self._forget(now)
        if self._live is None and now - self._printed >= self.every_seconds:
            self._print()

    def finish(self, rows_done: int) -> None:
        """The last word: rows that no pass has brought (errors, rows taken over from the journal) count too."""
        if rows_done != self._samples[-1].rows:
            self._samples.append(replace(self._samples[-1], seconds=self.clock(), rows=rows_done))
        self._in_flight = 0
        self.total_rows = rows_done if self.total_rows is None else self.total_rows

    @property
    def now(self) -> Snapshot:
        return snapshot(self._samples, self.total_rows, self._in_flight, self._started)

    def _keep(self, sample: Sample) -> None:
        """Passes of a tiny model take milliseconds: the newest sample replaces the one before if that is as new."""
        if len(self._samples) > 1 and sample.seconds - self._samples[-2].seconds < SAMPLE_SECONDS:
            self._samples.pop()
        self._samples.append(sample)

    def _forget(self, now: float) -> None:
        """Keep one sample from before the window, so that the rates are over the whole of it."""
        while len(self._samples) > 2 and now - self._samples[1].seconds > RATE_WINDOW_SECONDS:
            self._samples.popleft()

    def _print(self) -> None:
        self._printed = self.clock()
        line = line_text(self.now, datetime.now().astimezone())
        if line != self._last_line:
            print(line, file=self.stream, flush=True)
        self._last_line = line

    def _renderable(self) -> Group:
        return panel(self.now, datetime.now().astimezone())
