r"""The token journal: the tokens of rows in flight, and rows that are finished but whose part is not.

One line per record: eight hex digits of CRC-32, a space, JSON, a newline. A line that is cut or does not match its
checksum ends the journal: whatever byte a crash stops at, what is loaded is a prefix of what was recorded. A record is
written within a quarter of a second (it survives the process being killed) and synced every `sync_seconds` (it then
survives the machine). A record has up to three keys:

    t   tokens gained: [[index, [token, ...], [log-probability, ...]], ...]
    f   rows finished: [[index, token_ids, text, finish_reason, logprobs, greedy_match, error], ...]
    d   rows dropped: [index, ...]  their part is written
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexbatch.data import durable
from flexbatch.records import Completion

WRITE_SECONDS = 0.25
COMPACT_BYTES = 1 << 20  # a journal is rewritten when it has grown by this much and has doubled


@dataclass(frozen=True, slots=True)
class SavedRow:
    """What the journal knows of a row. `completion` is set where the row is finished."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    completion: Completion | None = None


@dataclass(slots=True)
class _Entry:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    completion: Completion | None = None


class Journal:
    """The journal at `path`, loaded and ready to append. `is_done(index)` says whose part is already written.

    Raises:
        CapacityError, OutputError: it cannot be rewritten (opening drops what is no longer needed).
    """

    def __init__(
        self,
        path: Path,
        scratch: Path,
        *,
        sync_seconds: float,
        is_done: Callable[[int], bool] = lambda _: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._scratch, self._sync_seconds, self._clock = path, scratch, sync_seconds, clock
        self._rows: dict[int, _Entry] = {}
        for record in load_records(path):
            self._apply(record)
        for index in [index for index in self._rows if is_done(index)]:
            del self._rows[index]
        self._pending: list[bytes] = []
        self._descriptor = -1
        self._written = self._synced = clock()
        self._compact()

    def saved(self) -> dict[int, SavedRow]:
        """All rows that the journal holds, by index."""
        return {
            index: SavedRow(tuple(entry.tokens), tuple(entry.logprobs), entry.completion)
            for index, entry in self._rows.items()
        }

    @property
    def finished_rows(self) -> int:
        return sum(1 for entry in self._rows.values() if entry.completion is not None)

    def record(
        self,
        new_tokens: Mapping[int, Iterable[int]],
        new_logprobs: Mapping[int, Iterable[float]],
        completions: Iterable[Completion] = (),
    ) -> None:
        """Note what one pass has brought; all of it is loaded again, or none. Raises CapacityError, OutputError."""
        record: dict[str, Any] = {}
        if new_tokens:
            record["t"] = [[i, list(ids), list(new_logprobs.get(i, ()))] for i, ids in new_tokens.items()]
        if finished := [_pack(completion) for completion in completions]:
            record["f"] = finished
        self._append(record)

    def drop(self, indices: Iterable[int]) -> None:
        """Forget rows whose part is written. Raises CapacityError, OutputError."""
        self._append({"d": [index for index in indices if index in self._rows]})

    def _append(self, record: dict[str, Any]) -> None:
        if any(record.values()):
            self._apply(record)
            self._pending.append(_encode(record))
        self.keep_up()

    def _apply(self, record: Mapping[str, Any]) -> None:
        for index, tokens, logprobs in record.get("t", ()):
            entry = self._rows.setdefault(index, _Entry())
            entry.tokens += tokens
            entry.logprobs += logprobs
        for packed in record.get("f", ()):
            completion = _unpack(packed)
            self._rows.setdefault(completion.index, _Entry()).completion = completion
        for index in record.get("d", ()):
            self._rows.pop(index, None)

    def keep_up(self) -> None:
        """Write and sync what is due. Called with every record; call it in long waits too."""
        now = self._clock()
        if now - self._written >= WRITE_SECONDS:
            self.flush()
        if now - self._synced >= self._sync_seconds:
            self.sync()
        if self._size > COMPACT_BYTES + 2 * self._compact_size:
            self._compact()

    def flush(self) -> None:
        """Hand everything to the system: it then survives the end of this process."""
        self._written = self._clock()
        if not self._pending:
            return
        content = b"".join(self._pending)
        with durable.explained(self._path):
            try:
                durable.write_all(self._descriptor, content)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._size)  # a later record must not follow half of one
                raise
        self._size += len(content)
        self._pending.clear()

    def sync(self) -> None:
        """Everything recorded so far is on the disk afterwards."""
        self.flush()
        with durable.explained(self._path):
            os.fsync(self._descriptor)
        self._synced = self._clock()

    def _compact(self) -> None:
        """Rewrite the journal with what is still needed: whole, beside the old one, then in its place."""
        content = b"".join(self._needed())
        durable.write_file(self._path, content, self._scratch)
        self._pending.clear()
        self._close_file()
        with durable.explained(self._path):
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._size = self._compact_size = len(content)
        self._written = self._synced = self._clock()

    def _needed(self) -> Iterator[bytes]:
        for index, entry in self._rows.items():
            if entry.completion is not None:
                yield _encode({"f": [_pack(entry.completion)]})
            elif entry.tokens:
                yield _encode({"t": [[index, entry.tokens, entry.logprobs]]})

    def _close_file(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def close(self) -> None:
        """Sync and close. Raises CapacityError, OutputError."""
        if self._descriptor >= 0:
            try:
                self.sync()
            finally:
                self._close_file()


def _encode(record: Mapping[str, Any]) -> bytes:
    payload = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(payload), payload)


def load_records(path: Path) -> Iterator[dict[str, Any]]:
    """The journal's records up to the first that is cut or damaged; none where there is no journal."""
    if not path.exists():
        return
    with durable.explained(path), path.open("rb") as file:
        for line in file:
            record = _decode(line)
            if record is None:
                return
            yield record


def _decode(line: bytes) -> dict[str, Any] | None:
    checksum, space, payload = line[:8], line[8:9], line[9:-1]
    if space != b" " or not line.endswith(b"\n") or b"%08x" % zlib.crc32(payload) != checksum:
        return None
    record: dict[str, Any] = json.loads(payload)
    return record


def _pack(completion: Completion) -> list[Any]:
    return [
        completion.index,
        completion.token_ids,
        completion.text,
        completion.finish_reason,
        completion.logprobs,
        completion.greedy_match,
        completion.error,
    ]


def _unpack(packed: list[Any]) -> Completion:
    index, token_ids, text, finish_reason, logprobs, greedy_match, error = packed
    return Completion(index, tuple(token_ids), text, finish_reason, tuple(logprobs), greedy_match, error)
