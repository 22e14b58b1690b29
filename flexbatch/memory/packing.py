"""Writing a packed file: every tensor at its place, a journal of what is safely on disk, and a rename at the end."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from flexbatch.memory.direct_io import AlignedBuffer, BufferedReader, page_ceil
from flexbatch.memory.safetensors_header import SAFETENSORS_NAMES, TensorEntry
from flexbatch.memory.tiers import allocate

SLICE = 64 << 20
"""Bytes of a source tensor that are packed at a time, where its rows are independent."""
ALIGNMENT = 64
"""Bytes that the first tensor's place in the file is a multiple of: a cache line, for weights used as they lie."""
JOURNAL_BYTES = 256 << 20
"""Packed bytes after which the journal is brought up to date: what a killed run loses at most."""


class Layout(Protocol):
    """How one weight is packed: `QuantizedLayout`, an `IntegerLayout`, `BlockedLayout` or `CompressedLayout`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]: ...

    @property
    def together(self) -> int: ...

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]: ...


class Packer:
    """Packs `sources` into `STEM.partial`, whose header and offsets are fixed beforehand.

    `STEM.journal` is one line for what is made (another line there means another file: start again), then one line for
    each tensor whose bytes are on disk, with the checksums of its parts. A context manager.
    """

    def __init__(
        self,
        stem: Path,
        source: Mapping[str, Any],
        sources: Mapping[str, TensorEntry],
        layouts: Mapping[str, Layout],
    ) -> None:
        self._partial, self._journal = stem.with_suffix(".partial"), stem.with_suffix(".journal")
        self._sources, self._layouts = sources, layouts
        self._reader = BufferedReader()
        header, self._places, size = _header(layouts, sources)
        self._done = _journalled(self._journal, source) if self._partial.exists() else {}
        self._pending: dict[str, dict[str, int]] = {}
        self._pending_bytes = 0
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(self._descriptor).st_size != size:
                self._done = {}
                os.ftruncate(self._descriptor, 0)
                allocate(self._descriptor, size, stem.parent)
            if not self._done:
                _write_at(self._descriptor, header, 0)
                self._journal.write_text(json.dumps(source) + "\n")
        except BaseException:
            os.close(self._descriptor)
            self._partial.unlink(missing_ok=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()
        os.close(self._descriptor)

    def pack(self, name: str) -> None:
        """Packs one tensor, unless the journal has it and its bytes are the ones written."""
        if name in self._done and self._intact(name):
            return
        checksums = {part: 0 for part, _, _ in self._layouts[name].parts}
        places = {part: self._places[f"{name}.{part}"].offset for part in checksums}
        for piece in pieces(self._sources[name], self._layouts[name], self._reader):
            for part, packed in zip(checksums, self._layouts[name].pack(piece), strict=True):
                raw = packed.contiguous().view(-1).view(torch.uint8).numpy().data
                _write_at(self._descriptor, raw, places[part])
                places[part] += len(raw)
                checksums[part] = zlib.crc32(raw, checksums[part])
                self._pending_bytes += len(raw)
        self._pending[name] = checksums
        if self._pending_bytes >= JOURNAL_BYTES:
            self._save()

    def finish(self, file: Path) -> dict[str, int]:
        """Puts the whole file in place as `file`; returns the checksums of its tensors."""
        self._save()
        self._partial.replace(file)
        self._journal.unlink()
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return {f"{name}.{part}": value for name, parts in self._done.items() for part, value in parts.items()}

    def _save(self) -> None:
        """First the bytes, then the lines that say that they are there."""
        os.fsync(self._descriptor)
        with self._journal.open("a") as stream:
            for name, checksums in self._pending.items():
                stream.write(json.dumps([name, checksums]) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._done.update(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def _intact(self, name: str) -> bool:
        return all(
            checksum(self._places[f"{name}.{part}"], self._partial) == value for part, value in self._done[name].items()
        )


def checksum(entry: TensorEntry, file: Path | None = None) -> int:
    """CRC-32 of a tensor's bytes (in `file`, where that is not the entry's own)."""
    value = 0
    with (file or entry.file).open("rb") as stream:
        stream.seek(entry.offset)
        left = entry.nbytes
        while left and (raw := stream.read(min(left, 8 << 20))):
            value = zlib.crc32(raw, value)
            left -= len(raw)
    return value


def _header(
    layouts: Mapping[str, Layout], sources: Mapping[str, TensorEntry]
) -> tuple[bytes, dict[str, TensorEntry], int]:
    """The safetensors header, the place of every part, and the size of the file.

    A weight's parts lie side by side, without gaps: other readers of the format refuse those.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt", "packed": "flexbatch"}}
    position = 0
    for name in sources:
        for part, dtype, shape in layouts[name].parts:
            end = position + math.prod(shape) * dtype.itemsize
            described[f"{name}.{part}"] = {
                "dtype": SAFETENSORS_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
    raw = json.dumps(described).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    start = 8 + len(raw)
    places = {
        name: TensorEntry(name, Path(), start + begin, end - begin, fields["dtype"], tuple(fields["shape"]))
        for name, fields in described.items()
        if name != "__metadata__"
        for begin, end in [fields["data_offsets"]]
    }
    return struct.pack("<Q", len(raw)) + raw, places, start + position


def pieces(entry: TensorEntry, layout: Layout, reader: BufferedReader) -> Iterator[torch.Tensor]:
    """The source tensor, whole or in slices of its first dimension where rows are packed one by one."""
    row = entry.nbytes // entry.shape[0] if entry.shape and entry.shape[0] else 0
    independent = len(entry.shape) > layout.together
    rows = max(1, SLICE // row) if row and independent else max(1, entry.shape[0] if entry.shape else 1)
    buffer = AlignedBuffer(page_ceil(min(rows * row, entry.nbytes)) + 2 * page_ceil(1))
    for first in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - first)
        start = reader.read(entry.file, entry.offset + first * row, count * row, buffer, 0)
        raw = buffer.tensor[start : start + count * row]
        if start % entry.torch_dtype.itemsize:
            raw = raw.clone()
        yield raw.view(entry.torch_dtype).view(count, *entry.shape[1:])


def _journalled(journal: Path, source: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Tensors that are on disk, if the journal is of this very file. A torn last line counts as not there."""
    try:
        lines = journal.read_text().splitlines()
        if not lines or json.loads(lines[0]) != source:
            return {}
    except (OSError, ValueError):
        return {}
    done: dict[str, dict[str, int]] = {}
    for line in lines[1:]:
        try:
            name, checksums = json.loads(line)
        except ValueError:
            break
        done[name] = checksums
    return done


def _write_at(descriptor: int, raw: bytes | memoryview, offset: int) -> None:
    view = memoryview(raw)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
