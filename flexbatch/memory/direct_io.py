"""Reading spans of files into persistent aligned buffers: direct (O_DIRECT) and buffered, and the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

PAGE = 4096


class AlignedBuffer:
    """`nbytes` of page-aligned anonymous memory, allocated once and reused (a fresh buffer per read costs as much as the read)."""

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        raise NotImplementedError

    def view(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A tensor over the buffer's bytes from `offset`; no copy."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ReadMeasurement:
    """What the start-up measurement saw of one way to read."""

    kind: str
    bytes_per_second: float
    cpu_seconds_per_byte: float
    bytes_read: int


class Reader(Protocol):
    """A way to read. `kind` is `direct` or `buffered`; `measurements` are those it was chosen by (may be empty)."""

    kind: str
    measurements: tuple[ReadMeasurement, ...]

    def read(self, file: Path, offset: int, nbytes: int, buffer: AlignedBuffer, buffer_offset: int) -> int:
        """Reads bytes `offset` to `offset + nbytes` of `file`; returns where in the buffer they start.

        That is `buffer_offset + offset % PAGE`; `buffer_offset` must be a multiple of PAGE and the buffer must have room
        for whole pages. Raises EngineError with file and offset. Safe to call from several threads.
        """
        ...

    def close(self) -> None: ...


def choose_reader(sample_files: Sequence[Path], mode: str = "auto", *, threads: int = 4) -> Reader:
    """The faster way to read these files, measured for at most half a second (`mode` auto), or the one named."""
    raise NotImplementedError
