"""What a run has done, on disk: the output folder as one object, held by one process.

    data/part-NNNNN.parquet     the finished parts
    _state/fingerprint.json     everything that changes results
    _state/journal              rows in flight, rows finished in unfinished parts
    _state/progress.json, events.jsonl, plan.json, lock
    _tmp/                       files on their way; emptied at every start

Open it, ask what is done and what is saved, record every pass, say when a part is written, close it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flexbatch.data import durable
from flexbatch.data.fingerprint import check_fingerprint
from flexbatch.data.journal import Journal, SavedRow
from flexbatch.data.lock import FolderLock
from flexbatch.data.progress import Progress
from flexbatch.data.writer import count_rows, list_parts
from flexbatch.errors import FlexbatchError, Interrupted, OutputError
from flexbatch.records import Part, PassResult


class Ledger:
    """An open output folder. As a context manager it closes itself: done, interrupted or failed by how it is left."""

    def __init__(self, folder: Path, *, part_rows: int, journal_seconds: float, held: FolderLock) -> None:
        self.folder = folder
        self.scratch = folder / "_tmp"
        self._state = folder / "_state"
        self._part_rows = part_rows
        self._lock = held
        self._parts = _check_parts(folder, part_rows)
        self._rows_total: int | None = None
        self._journal = Journal(
            self._state / "journal", self.scratch, sync_seconds=journal_seconds, is_done=self.is_done
        )
        self._saved = self._journal.saved()
        self._progress = Progress(self._state, self.scratch, rows_done=self.rows_done)
        self._open = True

    @classmethod
    def open(
        cls,
        folder: str | Path,
        fingerprint: Mapping[str, Any],
        *,
        part_rows: int,
        journal_seconds: float = 20.0,
    ) -> Self:
        """Lock the folder, check that it belongs to this run, and load what is done.

        Raises:
            LockedError: another process is running on it.
            FingerprintError: it belongs to a run with other results.
            OutputError: it cannot be written, or a part in it is damaged.
            CapacityError: the disk is full.
        """
        root = Path(folder)
        durable.make_folder(root / "_state")
        held = FolderLock(root / "_state" / "lock")
        held.acquire()
        try:
            check_fingerprint(root / "_state" / "fingerprint.json", fingerprint, root / "_tmp", folder=root)
            durable.empty_folder(root / "_tmp")
            return cls(root, part_rows=part_rows, journal_seconds=journal_seconds, held=held)
        except BaseException:
            held.release()
            raise

    @property
    def done_parts(self) -> frozenset[int]:
        """Numbers of the parts that are in `data/`."""
        return frozenset(self._parts)

    def is_done(self, index: int) -> bool:
        """Whether the row at this index of the job's order is in a written part."""
        return index // self._part_rows in self._parts

    @property
    def saved(self) -> Mapping[int, SavedRow]:
        """What earlier attempts left in the journal, by index: completions to take over, tokens to go on from."""
        return self._saved

    def take_up(self) -> None:
        """For another attempt in this process: what was recorded until now is what earlier attempts left."""
        self._saved = self._journal.saved()

    @property
    def rows_written(self) -> int:
        """Rows in written parts. The job is over when these are all: a finished row may still wait for its part."""
        return sum(self._parts.values())

    @property
    def rows_done(self) -> int:
        """Rows in written parts, and finished rows in the journal: for progress."""
        return self.rows_written + self._journal.finished_rows

    def set_total(self, rows: int) -> None:
        """How many rows the whole job has, once that is known."""
        self._rows_total = rows

    def save_plan(self, plan: Mapping[str, Any]) -> None:
        """Keep the plan in `_state/plan.json`. Raises CapacityError, OutputError."""
        durable.write_file(self._state / "plan.json", json.dumps(plan, indent=1, default=str).encode(), self.scratch)

    def record(self, result: PassResult) -> None:
        """Note what a pass has brought. Raises CapacityError, OutputError."""
        self._journal.record(result.new_tokens, result.new_logprobs, result.completions)
        self._update(sum(len(tokens) for tokens in result.new_tokens.values()))

    def part_written(self, part: Part) -> None:
        """The part is in `data/`: its rows need no journal any more. Raises CapacityError, OutputError."""
        self._parts[part.number] = len(part.rows)
        self._journal.drop(range(part.first, part.first + len(part.rows)))
        self._update(0)

    def keep_up(self) -> None:
        """Write what is due. `record` does it too; call this while nothing is recorded for long."""
        self._journal.keep_up()
        self._update(0)

    def _update(self, new_tokens: int) -> None:
        self._progress.update(rows_done=self.rows_done, rows_total=self._rows_total, new_tokens=new_tokens)

    def close(self, reason: str, error: str = "") -> None:
        """End the attempt: `done`, `interrupted` or `failed`. The lock is released whatever happens.

        Raises:
            CapacityError, OutputError: the last records could not be written.
        """
        if not self._open:
            return
        self._open = False
        with contextlib.ExitStack() as steps:  # each is tried, in reverse order, whatever happens to the others
            steps.callback(self._lock.release)
            steps.callback(durable.empty_folder, self.scratch)
            steps.callback(self._progress.stop, reason, error)
            steps.callback(self._update, 0)
            steps.callback(self._journal.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close("done")
            return
        reason = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        message = error.message if isinstance(error, FlexbatchError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(FlexbatchError):  # the error under way says more
            self.close(reason, "" if reason == "interrupted" else message)


def _check_parts(folder: Path, part_rows: int) -> dict[int, int]:
    """Rows of each part by number.

    Raises:
        OutputError: a part is not whole, or is short where it is not the last.
    """
    parts = {number: count_rows(path) for number, path in list_parts(folder).items()}
    last = max(parts, default=0)
    for number, rows in parts.items():
        if rows != part_rows and not (number == last and 0 < rows < part_rows):
            raise OutputError(
                f"'{folder}/data/part-{number:05d}.parquet' has {rows} rows; it should have {part_rows}.",
                remedy="Delete the file and run the same command again: its rows are then run again.",
            )
    return parts
