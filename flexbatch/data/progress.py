"""How far a job is, from files alone.

`progress.json` is rewritten each second, `events.jsonl` gains a line with every start and stop. Neither is synced:
they inform, nothing depends on them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexbatch.data import durable, lock
from flexbatch.data.writer import list_parts
from flexbatch.errors import OutputError

REWRITE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The content of `progress.json`. Times are in seconds since the epoch; `tokens` are the generated ones.

    `attempt_rows` and `attempt_tokens` are what stood before this attempt, so that rates are those of the attempt.
    """

    state: str
    attempt: int
    started: float
    updated: float
    rows_done: int
    rows_total: int | None
    tokens: int
    attempt_rows: int
    attempt_tokens: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of the job. `reason` is running, done, interrupted, failed or killed (no word was left)."""

    number: int
    pid: int
    host: str
    started: float
    stopped: float | None
    reason: str
    error: str


@dataclass(frozen=True, slots=True)
class Status:
    """What `status` tells. `state` is new, running, done, interrupted, failed or killed.

    Rates are averages over the last attempt; `finish` is the time at which the job would end at that rate, in seconds
    since the epoch, where it is running and the number of rows is known.
    """

    folder: str
    state: str
    alive: bool
    pid: int
    host: str
    rows_done: int
    rows_total: int | None
    parts_done: int
    tokens: int
    rows_per_second: float
    tokens_per_second: float
    started: float | None
    updated: float | None
    finish: float | None
    attempts: tuple[Attempt, ...]
    last_error: str


class Progress:
    """Keeps `progress.json` and `events.jsonl` of a running attempt."""

    def __init__(
        self, state_folder: Path, scratch: Path, *, rows_done: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._scratch, self._clock = state_folder, scratch, clock
        before = read_snapshot(state_folder)
        self._attempt = 1 + sum(1 for event in _read_events(state_folder) if event.get("event") == "start")
        self._tokens_before = before.tokens if before else 0
        self._rows_before = rows_done
        self._tokens = 0
        self._started = clock()
        self._written = 0.0
        self._rows_done, self._rows_total = rows_done, before.rows_total if before else None
        self._event("start", {"pid": os.getpid(), "host": socket.gethostname()})
        self._write("running")

    def update(self, *, rows_done: int, rows_total: int | None, new_tokens: int) -> None:
        """Note the present figures; the file follows within a second. Raises CapacityError, OutputError."""
        self._rows_done = rows_done
        self._rows_total = rows_total if rows_total is not None else self._rows_total
        self._tokens += new_tokens
        if self._clock() - self._written >= REWRITE_SECONDS:
            self._write("running")

    def stop(self, reason: str, error: str = "") -> None:
        """The attempt ends: `done`, `interrupted` or `failed`. Raises CapacityError, OutputError."""
        self._event("stop", {"reason": reason, "error": error})
        self._write(reason)

    def _write(self, state: str) -> None:
        now = self._clock()
        snapshot = Snapshot(
            state=state,
            attempt=self._attempt,
            started=self._started,
            updated=now,
            rows_done=self._rows_done,
            rows_total=self._rows_total,
            tokens=self._tokens_before + self._tokens,
            attempt_rows=self._rows_before,
            attempt_tokens=self._tokens_before,
        )
        content = json.dumps(asdict(snapshot), indent=1).encode()
        durable.replace_file(self._folder / "progress.json", content, self._scratch)
        self._written = now

    def _event(self, event: str, details: Mapping[str, Any]) -> None:
        path = self._folder / "events.jsonl"
        line = json.dumps({"event": event, "attempt": self._attempt, "time": self._clock(), **details}) + "\n"
        with durable.explained(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                durable.write_all(descriptor, (("\n" if torn else "") + line).encode())
            finally:
                os.close(descriptor)


def read_snapshot(state_folder: Path) -> Snapshot | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Snapshot(**json.loads((state_folder / "progress.json").read_text()))
    return None


def _read_events(state_folder: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in (state_folder / "events.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # cut by a crash
                events.append(json.loads(line))
    return events


def read_status(folder: Path) -> Status:
    """The state of the job in an output folder, running or not; reads files, starts nothing, changes nothing.

    Raises:
        OutputError: it is no output folder.
    """
    state_folder = folder / "_state"
    if not state_folder.is_dir():
        what = "is not an output folder of flexbatch (it has no _state)" if folder.is_dir() else "does not exist"
        raise OutputError(f"'{folder}' {what}.", remedy="Give the folder that the run's output.dir names.")
    alive = lock.is_held(state_folder / "lock")
    holder = lock.read_holder(state_folder / "lock")
    snapshot = read_snapshot(state_folder)
    attempts = _attempts(_read_events(state_folder), alive=alive)
    rows_rate, tokens_rate = _rates(snapshot)
    errors = [attempt.error for attempt in attempts if attempt.error]
    return Status(
        folder=str(folder),
        state=attempts[-1].reason if attempts else "new",
        alive=alive,
        pid=holder.pid,
        host=holder.host,
        rows_done=snapshot.rows_done if snapshot else 0,
        rows_total=snapshot.rows_total if snapshot else None,
        parts_done=len(list_parts(folder)),
        tokens=snapshot.tokens if snapshot else 0,
        rows_per_second=rows_rate,
        tokens_per_second=tokens_rate,
        started=snapshot.started if snapshot else None,
        updated=snapshot.updated if snapshot else None,
        finish=_finish(snapshot, rows_rate) if alive else None,
        attempts=attempts,
        last_error=errors[-1] if errors else "",
    )


def _attempts(events: list[dict[str, Any]], *, alive: bool) -> tuple[Attempt, ...]:
    starts = [event for event in events if event.get("event") == "start"]
    stops = {event.get("attempt"): event for event in events if event.get("event") == "stop"}
    attempts = []
    for position, start in enumerate(starts):
        stop = stops.get(start["attempt"], {})
        silent = "running" if alive and position == len(starts) - 1 else "killed"
        attempts.append(
            Attempt(
                number=start["attempt"],
                pid=start.get("pid", 0),
                host=start.get("host", ""),
                started=start["time"],
                stopped=stop.get("time"),
                reason=stop.get("reason", silent),
                error=stop.get("error", ""),
            )
        )
    return tuple(attempts)


def _rates(snapshot: Snapshot | None) -> tuple[float, float]:
    """(rows, tokens) per second over the snapshot's attempt."""
    if snapshot is None or snapshot.updated <= snapshot.started:
        return 0.0, 0.0
    seconds = snapshot.updated - snapshot.started
    rows = snapshot.rows_done - snapshot.attempt_rows
    return rows / seconds, (snapshot.tokens - snapshot.attempt_tokens) / seconds


def _finish(snapshot: Snapshot | None, rows_per_second: float) -> float | None:
    if snapshot is None or snapshot.rows_total is None or rows_per_second <= 0:
        return None
    return snapshot.updated + max(0, snapshot.rows_total - snapshot.rows_done) / rows_per_second
