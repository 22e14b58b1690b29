"""Writing a packed file: every tensor at its place, a journal of what is safely on disk, and a rename at the end."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from flexbatch.memory.safetensors_header import SAFETENSORS_NAMES, TensorEntry
from flexbatch.memory.source_pieces import Piece, PieceReader, pieces
from flexbatch.memory.span_writer import SpanWriter
from flexbatch.memory.tiers import allocate

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

    While a piece is packed, the next one is read and the one before is written. `STEM.journal` is one line for what is
    made (another line there means another file: start again), then one line for each tensor whose bytes are on disk,
    with the checksums of its parts; it belongs to the thread that writes. A context manager.
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
        header, self._places, size = _header(layouts, sources)
        self._done = _journalled(self._journal, source) if self._partial.exists() else {}
        self._pending: dict[str, dict[str, int]] = {}
        self._pending_bytes = 0
        self._ends: dict[str, int] = {}
        self._checksums: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packing")
        self._writing: Future[None] | None = None
        if not self._done or self._partial.stat().st_size != size:
            self._done = {}
            self._begin(source, header, size)
        self._writer = SpanWriter(self._partial)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._thread.shutdown()
        finally:
            self._writer.close()

    def pack(self) -> Iterator[TensorEntry]:
        """Packs the tensors, but for those that the journal has and whose bytes are the ones written; tells of each."""
        wanted = []
        for name, entry in self._sources.items():
            if name in self._done and self._intact(name):
                yield entry
            else:
                wanted += pieces(entry, self._layouts[name].together)
        with PieceReader() as reader:
            for piece, tensor in reader.read(wanted):
                packed = [_apart(part, tensor) for part in self._layouts[piece.entry.name].pack(tensor)]
                self._wait()
                self._writing = self._thread.submit(self._write, piece, packed)
                if piece.is_last:
                    yield piece.entry

    def finish(self, file: Path) -> dict[str, int]:
        """Puts the whole file in place as `file`; returns the checksums of its tensors."""
        self._wait()
        self._save()
        self._partial.replace(file)
        self._journal.unlink()
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return {f"{name}.{part}": value for name, parts in self._done.items() for part, value in parts.items()}

    def _begin(self, source: Mapping[str, Any], header: bytes, size: int) -> None:
        """Makes the file, with room for all, and a journal of nothing; nothing is left of both where that fails."""
        self._journal.unlink(missing_ok=True)
        try:
            with self._partial.open("wb") as stream:
                allocate(stream.fileno(), size, self._partial.parent)
                stream.write(header)
            self._journal.write_text(json.dumps(source) + "\n")
        except BaseException:
            self._partial.unlink(missing_ok=True)
            self._journal.unlink(missing_ok=True)
            raise

    def _wait(self) -> None:
        """For the piece that is being written; its error comes here."""
        if self._writing is not None:
            self._writing.result()

    def _write(self, piece: Piece, packed: Sequence[torch.Tensor]) -> None:
        """Writes the parts of a piece behind those of the pieces before it."""
        name = piece.entry.name
        names = [part for part, _, _ in self._layouts[name].parts]
        if piece.first == 0:
            self._ends = {part: self._places[f"{name}.{part}"].offset for part in names}
            self._checksums = dict.fromkeys(names, 0)
        for part, tensor in zip(names, packed, strict=True):
            raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            self._writer.write(raw, self._ends[part])
            self._checksums[part] = zlib.crc32(raw, self._checksums[part])
            self._ends[part] += len(raw)
            self._pending_bytes += len(raw)
        if piece.is_last:
            self._pending[name] = self._checksums
            if self._pending_bytes >= JOURNAL_BYTES:
                self._save()

    def _save(self) -> None:
        """First the bytes, then the lines that say that they are there."""
        self._writer.sync()
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


def _apart(packed: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """What was packed, not in the memory of its source, which is read over while it is written."""
    memory = source.untyped_storage()
    is_inside = memory.data_ptr() <= packed.data_ptr() < memory.data_ptr() + memory.nbytes()
    return packed.clone() if is_inside else packed


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
