"""Stored tensors on their way into a packed file, in pieces: the next one is read while one is packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self

import torch

from flexbatch.memory.direct_io import PAGE, AlignedBuffer, DirectReader, page_ceil
from flexbatch.memory.safetensors_header import TensorEntry

SLICE_BYTES = 64 << 20
"""Of a source tensor that are packed at a time, where its rows are independent."""
LARGE_BYTES = 256 << 20
"""Of two pieces in memory one is at most so large."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first` to `first + count` of a stored tensor (its first dimension)."""

    entry: TensorEntry
    first: int
    count: int

    @classmethod
    def whole(cls, entry: TensorEntry) -> Piece:
        return cls(entry, 0, entry.shape[0])

    @property
    def is_last(self) -> bool:
        """Of its tensor."""
        return self.first + self.count == self.entry.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.entry.nbytes // max(1, self.entry.shape[0])

    @property
    def nbytes(self) -> int:
        return self.count * self.row_bytes


def pieces(entry: TensorEntry, together: int) -> list[Piece]:
    """All of a tensor, in slices where rows are packed one by one: all but so many trailing dimensions `together`."""
    whole = Piece.whole(entry)
    if len(entry.shape) <= together or not whole.row_bytes:
        return [whole]
    rows = max(1, SLICE_BYTES // whole.row_bytes)
    return [Piece(entry, first, min(rows, whole.count - first)) for first in range(0, whole.count, rows)]


class PieceReader:
    """Reads pieces one after the other, past the page cache where the filesystem lets it. A context manager."""

    def __init__(self) -> None:
        self._reader = DirectReader()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pieces")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._reader.close()

    def read(self, wanted: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each piece with its numbers, `[count, ...]`, which are gone when the next one is asked for. EngineError with
        file and offset where the disk fails."""
        sizes = [piece.nbytes for piece in wanted]
        small = [size for size in sizes if size <= LARGE_BYTES]
        buffers = [AlignedBuffer(page_ceil(max(each, default=0)) + 2 * PAGE) for each in (sizes, small)]
        coming: Future[torch.Tensor] | None = None
        turn = 0
        for piece, following in pairwise([*wanted, None]):
            assert piece is not None
            numbers = coming.result() if coming else self._fill(piece, buffers[turn])
            coming = None
            if following is not None:
                before, turn = turn, 0 if following.nbytes > LARGE_BYTES else 1 - turn
                if turn != before:
                    coming = self._thread.submit(self._fill, following, buffers[turn])
            yield piece, numbers

    def _fill(self, piece: Piece, buffer: AlignedBuffer) -> torch.Tensor:
        entry = piece.entry
        start = self._reader.read(entry.file, entry.offset + piece.first * piece.row_bytes, piece.nbytes, buffer, 0)
        raw = buffer.tensor[start : start + piece.nbytes]
        if start % entry.torch_dtype.itemsize:
            raw = raw.clone()
        return raw.view(entry.torch_dtype).view(piece.count, *entry.shape[1:])
