"""What the run did and when: sums over stretches of passes, a line of JSON each, and what they add up to.

`_state/timeline.jsonl` is for people (report, summary after the run), never for resuming. A stretch grows with the
length of the run, so that a night takes a few thousand lines.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from flexbatch.records import PassResult
from flexbatch.report.progress import duration_text, rate_text, traffic_text

STRETCHES_PER_RUN = 300
SHORTEST_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Stretch:
    """Passes of one attempt that ended at `time` (seconds since the epoch).

    `seconds` is wall time since the stretch before, `pass_seconds` the part of it spent inside passes, `waits` seconds
    by cause, `bytes_moved` bytes by link. `rows_done` are those of the whole job.
    """

    attempt: int
    time: float
    seconds: float
    pass_seconds: float
    passes: int
    rows_done: int
    rows_in_flight: int
    prefill_tokens: int
    decode_tokens: int
    waits: Mapping[str, float] = field(default_factory=dict)
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    guessed_tokens: int = 0
    right_tokens: int = 0


class Timeline:
    """Appends a stretch every now and then; `update` after each pass, leave the context to write the last one.

    A disk that is full stops the run elsewhere; here it only costs the line.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = folder / "_state" / "timeline.jsonl"
        self._clock = clock
        self._attempt = 1 + max((stretch.attempt for stretch in read_timeline(folder)), default=0)
        self._started = self._before = clock()
        self._reset()

    def _reset(self) -> None:
        self._sums: Counter[str] = Counter()
        self._pass_seconds = 0.0
        self._waits: dict[str, float] = {}
        self._bytes: Counter[str] = Counter()
        self._rows_done = self._rows_in_flight = 0

    def __enter__(self) -> Timeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sums["passes"]:
            self._write(self._clock())

    def update(self, result: PassResult, rows_done: int) -> None:
        self._sums["passes"] += 1
        self._sums["prefill_tokens"] += result.prefill_tokens
        self._sums["decode_tokens"] += result.decode_tokens
        self._sums["guessed_tokens"] += result.guessed_tokens
        self._sums["right_tokens"] += result.right_tokens
        self._pass_seconds += result.seconds
        for cause, seconds in result.waits.items():
            self._waits[cause] = self._waits.get(cause, 0.0) + seconds
        self._bytes.update(result.bytes_moved)
        self._rows_done, self._rows_in_flight = rows_done, result.rows_in_flight
        now = self._clock()
        if now - self._before >= max(SHORTEST_SECONDS, (now - self._started) / STRETCHES_PER_RUN):
            self._write(now)

    def _write(self, now: float) -> None:
        stretch = Stretch(
            attempt=self._attempt,
            time=round(now, 3),
            seconds=round(now - self._before, 4),
            pass_seconds=round(self._pass_seconds, 4),
            passes=self._sums["passes"],
            rows_done=self._rows_done,
            rows_in_flight=self._rows_in_flight,
            prefill_tokens=self._sums["prefill_tokens"],
            decode_tokens=self._sums["decode_tokens"],
            waits={cause: round(seconds, 4) for cause, seconds in self._waits.items()},
            bytes_moved=dict(self._bytes),
            guessed_tokens=self._sums["guessed_tokens"],
            right_tokens=self._sums["right_tokens"],
        )
        with contextlib.suppress(OSError), self._path.open("a") as file:
            file.write(json.dumps(asdict(stretch)) + "\n")
        self._before = now
        self._reset()


def read_timeline(folder: Path) -> list[Stretch]:
    """All attempts in order. A line that a crash has cut is left out."""
    stretches: list[Stretch] = []
    with contextlib.suppress(OSError):
        for line in (folder / "_state" / "timeline.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                stretches.append(Stretch(**json.loads(line)))
    return stretches


def last_attempt(stretches: Sequence[Stretch]) -> list[Stretch]:
    return [stretch for stretch in stretches if stretch.attempt == stretches[-1].attempt]


@dataclass(frozen=True, slots=True)
class Totals:
    """Stretches added up, over all attempts or one."""

    seconds: float
    pass_seconds: float
    passes: int
    prefill_tokens: int
    decode_tokens: int
    waits: Mapping[str, float]
    bytes_moved: Mapping[str, int]
    guessed_tokens: int = 0
    right_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.decode_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_at_once(self) -> float:
        """That a row has gained in a pass, on the average."""
        return self.decode_tokens / max(1, self.decode_tokens - self.right_tokens)

    def shares(self) -> dict[str, float]:
        """Where the time went, as fractions of 1: computing, each wait, and what lies between passes."""
        whole = max(self.seconds, self.pass_seconds, 1e-9)
        waited = {
            f"waiting for {cause}": seconds / whole for cause, seconds in sorted(self.waits.items()) if seconds > 0
        }
        computing = max(0.0, self.pass_seconds / whole - sum(waited.values()))
        return {"computing": computing, **waited, "between passes": max(0.0, 1 - self.pass_seconds / whole)}

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second, "shares": self.shares()}


def totals(stretches: Sequence[Stretch]) -> Totals:
    waits: dict[str, float] = {}
    moved: Counter[str] = Counter()
    for stretch in stretches:
        moved.update(stretch.bytes_moved)
        for cause, seconds in stretch.waits.items():
            waits[cause] = waits.get(cause, 0.0) + seconds
    return Totals(
        seconds=sum(stretch.seconds for stretch in stretches),
        pass_seconds=sum(stretch.pass_seconds for stretch in stretches),
        passes=sum(stretch.passes for stretch in stretches),
        prefill_tokens=sum(stretch.prefill_tokens for stretch in stretches),
        decode_tokens=sum(stretch.decode_tokens for stretch in stretches),
        waits=waits,
        bytes_moved=dict(moved),
        guessed_tokens=sum(stretch.guessed_tokens for stretch in stretches),
        right_tokens=sum(stretch.right_tokens for stretch in stretches),
    )


def totals_text(sums: Totals) -> str:
    """A few lines for the end of a run."""
    shares = ", ".join(f"{what} {share:.0%}" for what, share in sums.shares().items() if share >= 0.005)
    traffic = traffic_text({link: count / max(sums.seconds, 1e-9) for link, count in sums.bytes_moved.items()})
    guessed = [
        f"Guessed  {sums.guessed_tokens:,} tokens, {sums.right_tokens:,} of them right: a row gained "
        f"{sums.tokens_at_once:.2f} tokens a pass"
    ]
    return "\n".join(
        [
            f"Did      {sums.decode_tokens:,} tokens generated and {sums.prefill_tokens:,} prompt tokens read in "
            f"{duration_text(sums.seconds)}: {rate_text(sums.tokens_per_second)} tokens/s over {sums.passes:,} passes",
            *(guessed if sums.guessed_tokens else []),
            f"Time     {shares or 'none'}",
            f"Moved    {traffic or 'nothing'}",
        ]
    )
