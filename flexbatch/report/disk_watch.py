"""Whether the disk keeps up: how fast streamed weights come while they are awaited, against what was planned."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

WINDOW_SECONDS = 60.0
MOST_EVENTS = 4096
AWAITED_SHARE = 0.1  # of the window: less waiting than this is no news
SLOW = 0.5  # of the planned rate


class DiskWatch:
    """Give it the engine's events (`OnEvent`); `note` says in a few words that the disk is slow, while it is.

    `planned` is the rate in bytes per second that the plan counts on, as measured on this machine. Safe to call from
    several threads.
    """

    def __init__(self, planned: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._planned, self._clock = planned, clock
        self._started = clock()
        self._reads: deque[tuple[float, float, int]] = deque(maxlen=MOST_EVENTS)
        self._waits: deque[tuple[float, float]] = deque(maxlen=MOST_EVENTS)
        self._computed: float | None = None
        self._lock = threading.Lock()

    def event(self, kind: str, name: str, started: float, ended: float, nbytes: int) -> None:  # noqa: ARG002 - OnEvent
        """`read`, `wait` and `compute` matter; after a layer's `compute` the next one's weights are awaited."""
        with self._lock:
            if kind == "read":
                self._reads.append((started, ended, nbytes))
            elif kind == "wait":
                self._waits.append((started, ended))
                self._computed = None
            elif kind == "compute":
                self._computed = ended

    def note(self) -> str:
        """Empty while the disk keeps up."""
        now = self._clock()
        with self._lock:
            since = max(self._started, now - WINDOW_SECONDS)
            reads = [read for read in self._reads if read[1] > since]
            waits = [wait for wait in self._waits if wait[1] > since]
            pending = now - max(since, self._computed) if self._computed is not None else 0.0
        awaited = pending + _covered((max(start, since), end) for start, end in waits)
        if not self._waits or awaited < AWAITED_SHARE * max(now - since, 1.0):
            return ""
        # What is on its way has no event yet: the time since the last read counts while the next layer is awaited.
        silent = min(pending, now - max((end for _, end, _ in reads), default=since))
        busy = _covered((max(start, since), end) for start, end, _ in reads) + silent
        rate = sum(nbytes for *_, nbytes in reads) / max(busy, 1e-9)
        if rate >= SLOW * self._planned:
            return ""
        return f"waiting for weights from disk at {_megabytes(rate)}; the plan counts on {_megabytes(self._planned)}"


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _megabytes(rate: float) -> str:
    return f"{rate / 1e6:,.0f} MB/s" if rate >= 1e7 else f"{rate / 1e6:.2g} MB/s"
