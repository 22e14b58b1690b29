"""How far the run is, while it runs: a live display on a terminal, a line every few seconds on a pipe or in a file."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flexbatch.records import PassResult
from flexbatch.report.outlook import Outlook
from flexbatch.report.snapshot import Sample, Samples, Snapshot

LONG_PASS_SECONDS = 5.0
SILENCE_SECONDS = 60.0
ENOUGH_ROWS = 30
"""Rows that finish in the last minutes and say how fast the others will; fewer come in bursts."""


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


def line_text(now: Snapshot, clock: datetime, note: str = "") -> str:
    """The whole state in one plain line; `note` is what else there is to say."""
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
    if note:
        parts.append(note)
    if now.pass_seconds >= LONG_PASS_SECONDS:
        parts.append(f"{duration_text(now.pass_seconds)} into this pass")
    if now.seconds_left == 0:
        parts.append(f"done in {duration_text(now.elapsed)}")
    else:
        parts.append(f"{duration_text(now.seconds_left)} left, done at {finish_text(now.seconds_left, clock)}")
    return " | ".join(parts)


def panel(now: Snapshot, clock: datetime, note: str = "") -> Group:
    """The same for a terminal, on four lines that stay where they are."""
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(
            total=None if now.total_rows is None else max(now.total_rows, 1), completed=now.rows_done, width=40
        ),
        f"{rows_text(now)}, {now.rows_in_flight:,} in flight",
    )
    left = f"{duration_text(now.seconds_left)} left, done at {finish_text(now.seconds_left, clock)}"
    if now.pass_seconds >= LONG_PASS_SECONDS:
        left += f", {duration_text(now.pass_seconds)} into this pass"
    return Group(
        bar,
        Text(
            f"  {rate_text(now.decode_tokens_per_second)} tokens/s generated, "
            f"{rate_text(now.prefill_tokens_per_second)} tokens/s of prompts"
        ),
        Text(
            f"  {traffic_text(now.bytes_per_second) or 'no bytes moved'}; {now.wait_share:.0%} of the time waiting"
            + (f"; {note}" if note else "")
        ),
        Text(f"  {duration_text(now.elapsed)} so far, {left}" if now.seconds_left else "  done"),
    )


class Progress:
    """Call `update` after every pass, with the rows of the whole job that are done (earlier attempts included).

    The finish time comes from the rows finished in the last minutes of this attempt alone, where these are many; else
    from `outlook`, what the plan says of this attempt, at the speed of the passes so far. While a pass takes minutes a
    line still comes now and then, with longer and longer pauses. `total_rows` is None where nobody knows it. What
    `note` says comes with it.
    """

    def __init__(
        self,
        total_rows: int | None,
        already_done: int = 0,
        stream: TextIO | None = None,
        *,
        outlook: Outlook = Outlook(),  # noqa: B008 - frozen
        every_seconds: float = 5.0,
        note: Callable[[], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_rows = total_rows
        self._outlook = outlook
        self._stream = stream or sys.stderr
        self._every = self._pause = every_seconds
        self._note = note
        self._clock = clock
        self._decode_tokens = self._prefill_tokens = self._still_passes = self._in_flight = 0
        self._wait_seconds = 0.0
        self._bytes: Counter[str] = Counter()
        self._printed = clock()
        self._samples = Samples(Sample(self._printed, already_done, 0, 0, 0.0, {}))
        self._last_line = ""
        self._live: Live | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            console = Console(file=self._stream)
            self._live = Live(console=console, refresh_per_second=4, get_renderable=self._renderable, transient=True)
            self._live.start()
        else:
            threading.Thread(target=self._speak_up, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        with self._lock:
            self._print()

    def update(self, result: PassResult, rows_done: int) -> None:
        now = self._clock()
        with self._lock:
            self._decode_tokens += result.decode_tokens
            self._prefill_tokens += result.prefill_tokens
            if not result.prefill_tokens:  # the row that gains least is what the end waits for
                self._still_passes += min(map(len, result.new_tokens.values()), default=1)
            self._wait_seconds += sum(result.waits.values())
            self._bytes.update(result.bytes_moved)
            self._in_flight = result.rows_in_flight
            done = self._decode_tokens, self._prefill_tokens, self._wait_seconds
            self._samples.add(Sample(now, rows_done, *done, dict(self._bytes)))
            self._pause = self._every
            if self._live is None and now - self._printed >= self._every:
                self._print()

    def finish(self, rows_done: int) -> None:
        """The last word: rows that no pass has brought (errors, rows taken over from the journal) count too."""
        with self._lock:
            self._samples.correct_rows(rows_done)
            self._in_flight = 0
            self._total_rows = rows_done if self._total_rows is None else self._total_rows

    @property
    def now(self) -> Snapshot:
        measured = self._samples.snapshot(self._clock(), self._total_rows, self._in_flight)
        is_clear = self._samples.rows_of_late >= ENOUGH_ROWS and math.isfinite(measured.seconds_left)
        if is_clear or not measured.seconds_left or not math.isfinite(self._outlook.seconds):
            return measured
        # What the pass under way has done nobody knows.
        until_last = measured.elapsed - measured.pass_seconds
        left = self._outlook.seconds_left(self._prefill_tokens, self._still_passes, until_last)
        return replace(measured, seconds_left=max(1.0, left - measured.pass_seconds))

    def _speak_up(self) -> None:
        """In a thread of its own: a line when no pass has ended for a while, twice as long after each."""
        while not self._ended.wait(0.5):
            with self._lock:
                if self._clock() - self._printed >= 2 * self._pause and not self._ended.is_set():
                    self._print()
                    self._pause = min(2 * self._pause, SILENCE_SECONDS / 2)

    def _print(self) -> None:
        self._printed = self._clock()
        line = line_text(self.now, datetime.now().astimezone(), self._note())
        if line != self._last_line:
            print(line, file=self._stream, flush=True)
        self._last_line = line

    def _renderable(self) -> Group:
        with self._lock:
            return panel(self.now, datetime.now().astimezone(), self._note())
