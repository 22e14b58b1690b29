"""Where the messages of an Arrow IPC stream end: finds truncation, and counts rows, without reading the bodies.

pyarrow takes a stream that stops between two messages for a shorter stream, so a truncated shard would lose its rows
in silence. The framing is in the Arrow columnar format specification, section "Encapsulated message format": a
continuation marker FFFFFFFF (absent before version 0.15), the metadata's length as int32, a flatbuffer `Message`, then
a body. An end-of-stream marker is a length of 0. An IPC file holds the same stream between its magic and its footer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

FILE_MAGIC = b"ARROW1"
CONTINUATION = 0xFFFFFFFF
RECORD_BATCH = 3  # the union type of a RecordBatch in the Message's header


class Truncated(Exception):
    """The stream stops before its end-of-stream marker. `rows` were whole before that."""

    def __init__(self, rows: int, offset: int) -> None:
        super().__init__(f"it ends at byte {offset} without an end-of-stream marker, after {rows} rows")
        self.rows = rows


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """`rows` in all record batches; `end` is the offset behind the end-of-stream marker, in bytes."""

    rows: int
    end: int


def measure_stream(file: Any, size: int, start: int = 0) -> StreamLayout:
    """Walk the messages of the stream that begins at `start`; `size` is the file's, in bytes.

    Raises:
        Truncated: there is no end-of-stream marker where a message should begin, or a body is cut.
        ValueError: the bytes are not an Arrow stream.
    """
    offset, rows = start, 0
    while True:
        length, body = _read_prefix(file, offset, rows)
        if length == 0:
            return StreamLayout(rows, body)
        metadata = _read_at(file, body, length)
        if len(metadata) < length:
            raise Truncated(rows, size)
        try:
            body_bytes, batch_rows = _parse_message(metadata)
        except (struct.error, IndexError) as error:
            raise ValueError(f"the message at byte {offset} cannot be parsed") from error
        if body_bytes < 0 or batch_rows < 0:
            raise ValueError(f"the message at byte {offset} has a negative length")
        offset = body + length + body_bytes
        if offset > size:
            raise Truncated(rows, size)
        rows += batch_rows


def _read_prefix(file: Any, offset: int, rows: int) -> tuple[int, int]:
    """(length of the metadata, offset of the metadata)."""
    prefix = _read_at(file, offset, 8)
    if len(prefix) < 4:
        raise Truncated(rows, offset)
    (first,) = struct.unpack_from("<I", prefix)
    if first != CONTINUATION:
        length, at = first, offset + 4
    elif len(prefix) < 8:
        raise Truncated(rows, offset)
    else:
        length, at = struct.unpack_from("<I", prefix, 4)[0], offset + 8
    if length > 1 << 30:
        raise ValueError(f"the bytes at {offset} are not an Arrow message")
    return length, at


def _read_at(file: Any, offset: int, count: int) -> bytes:
    file.seek(offset)
    return bytes(file.read(count))


def _parse_message(buffer: bytes) -> tuple[int, int]:
    """(bytes of the body, rows of the record batch or 0) from a flatbuffer `Message`.

    Its fields are: 0 version, 1 type of header, 2 header, 3 length of the body. A RecordBatch's field 0 is its length.
    """
    (table,) = struct.unpack_from("<I", buffer)
    body_at, type_at, header_at = (_field(buffer, table, number) for number in (3, 1, 2))
    body_bytes = struct.unpack_from("<q", buffer, body_at)[0] if body_at else 0
    header_type = buffer[type_at] if type_at else 0
    if header_type != RECORD_BATCH or not header_at:
        return body_bytes, 0
    batch = header_at + struct.unpack_from("<I", buffer, header_at)[0]
    length_at = _field(buffer, batch, 0)
    return body_bytes, struct.unpack_from("<q", buffer, length_at)[0] if length_at else 0


def _field(buffer: bytes, table: int, number: int) -> int:
    """Offset of a table's field in the buffer, 0 where it is absent (flatbuffers: by way of the table's vtable)."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    (vtable_bytes,) = struct.unpack_from("<H", buffer, vtable)
    entry = 4 + 2 * number
    if entry + 2 > vtable_bytes:
        return 0
    (relative,) = struct.unpack_from("<H", buffer, vtable + entry)
    return table + relative if relative else 0
