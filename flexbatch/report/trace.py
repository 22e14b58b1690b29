"""A trace of what computed, what was read and what was copied, when: opens in Perfetto or chrome://tracing.

The format is the Trace Event Format's array of complete events (`ph` X): times in microseconds, one row per kind.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import TracebackType
from typing import TextIO

ROWS = ("compute", "wait", "read", "copy")


class ChromeTrace:
    """Writes events to `path` as they come, from any thread. A context manager; a torn file still opens."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._lock = threading.Lock()
        self._rows: dict[str, int] = {}

    def event(self, kind: str, name: str, start: float, end: float, nbytes: int) -> None:
        """Something of this kind took place from `start` to `end` (`time.perf_counter` seconds)."""
        with self._lock:
            if self._file.closed:
                return
            if kind not in self._rows:
                self._rows[kind] = ROWS.index(kind) if kind in ROWS else len(ROWS) + len(self._rows)
                self._write({"name": "thread_name", "ph": "M", "tid": self._rows[kind], "args": {"name": kind}})
            event = {"name": name, "cat": kind, "ph": "X", "ts": round(start * 1e6), "dur": round((end - start) * 1e6)}
            self._write({**event, "tid": self._rows[kind], "args": {"bytes": nbytes}})

    def _write(self, event: dict[str, object]) -> None:
        self._file.write(json.dumps({**event, "pid": 1}) + ",\n")

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.write("{}]\n")
                self._file.close()

    def __enter__(self) -> ChromeTrace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
