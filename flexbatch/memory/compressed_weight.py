"""Weights in bfloat16 that take 0.7 of their bytes and lose nothing; expanded just before they are multiplied
(`kernels/exponent_codes.py`).

How many exceptions a record has room for depends on the numbers, so a weight is looked through before it is packed;
what was found is kept beside the packed files, for as long as the checkpoint's files stay what they were.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexbatch.errors import OutputError
from flexbatch.kernels.exponent_codes import CHUNK, Expansion, compress, most_exceptions, record_bytes
from flexbatch.memory.blocked_weight import BlockedLayout
from flexbatch.memory.direct_io import AlignedBuffer
from flexbatch.memory.float_layout import TiledLayout
from flexbatch.memory.packed_file import OnProgress, file_states, identity, packed_key
from flexbatch.memory.safetensors_header import TensorEntry
from flexbatch.memory.source_pieces import Piece, PieceReader

PREFIX = "exceptions-"
NUMBER_BYTES = torch.bfloat16.itemsize
CHUNK_BYTES = CHUNK * NUMBER_BYTES
LARGEST_SHARE = 0.9
"""Of its own bytes: a weight of which more is left stays as it is."""
SAMPLES = 32
OTHERS_MAY_HAVE = 1.25
"""Times the exceptions of the samples, in pieces that were not looked at."""


@dataclass(frozen=True, slots=True)
class PlainLayout:
    """A weight `[out, in]` in bfloat16 as it is."""

    shape: tuple[int, ...]

    @property
    def together(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMBER_BYTES

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        return (("plain", torch.bfloat16, self.shape),)

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (tensor.to(torch.bfloat16),)

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight over its bytes, uint8 `[nbytes]`."""
        return stored.view(torch.bfloat16).view(self.shape)


Inner = PlainLayout | BlockedLayout | TiledLayout
"""How a weight lies when it is multiplied."""


@dataclass(frozen=True, slots=True)
class CompressedLayout:
    """How the bytes of a weight in another layout are kept: records with room for so many exceptions."""

    inner: Inner
    exceptions: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def together(self) -> int:
        """The whole weight is packed at once."""
        return len(self.shape)

    @property
    def numbers(self) -> int:
        """Of the weight as it is multiplied."""
        return self.inner.nbytes // NUMBER_BYTES

    @property
    def chunks(self) -> int:
        return -(-self.numbers // CHUNK)

    @property
    def share(self) -> float:
        """Of the weight's bytes, what is kept."""
        return self.chunks * record_bytes(self.exceptions) / self.inner.nbytes

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        """Name, dtype and shape of each stored tensor."""
        return (("records", torch.uint8, (self.chunks, record_bytes(self.exceptions))),)

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The `parts` of a weight of this shape."""
        shape = self.chunks, record_bytes(self.exceptions)
        records = AlignedBuffer(math.prod(shape)).tensor[: math.prod(shape)].view(shape)  # its pages are large ones
        compress(_chunked(self.inner, tensor), self.exceptions, records)
        return (records,)

    @property
    def room(self) -> int:
        """Numbers of all chunks, the last one whole."""
        return self.chunks * CHUNK

    def expansion(self, records: torch.Tensor, out: torch.Tensor) -> Expansion:
        """Of stored records to bfloat16 `[room]`, whose first `numbers` are the weight's."""
        return Expansion(records, self.exceptions, out.view(-1, CHUNK))

    def weight(self, numbers: torch.Tensor) -> torch.Tensor:
        """The weight for a product over its expanded numbers, which must outlive it."""
        return self.inner.weight(numbers[: self.numbers].view(torch.uint8))


def compressed_layouts(
    sources: Mapping[str, TensorEntry],
    inner: Mapping[str, Inner],
    cache_folder: Path,
    on_progress: OnProgress | None = None,
) -> dict[str, CompressedLayout]:
    """The layouts of those of `sources` that compression makes smaller, from their numbers in the `inner` layouts."""
    file, source = cache_folder / f"{PREFIX}{packed_key(sources, inner)}.json", identity(sources, inner)
    known = _record(file)
    if known.get("source") == source:
        return _smaller(inner, known["exceptions"])
    found = _looked_through(sources, inner, on_progress)
    layouts = _smaller(inner, found)
    copy = packed_key({name: sources[name] for name in layouts}, layouts)
    record = {"source": source, "exceptions": found, "copy": copy, "share": _share(inner, layouts)}
    try:
        _keep(record, file)
        if known.get("copy", copy) != copy:
            for stale in cache_folder.glob(f"{known['copy']}.*"):
                stale.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {cache_folder} for packed weights cannot be used: {error.strerror or error}.",
            remedy="Set model.cache_dir to a folder with write permission and space, or offload.compressed_file=never.",
        ) from error
    return layouts


def compressed_share(entries: Sequence[TensorEntry], cache_folder: Path) -> float | None:
    """What of the bytes of large matrices a compressed file takes that was made before from the files of these stored
    tensors, as they are now; None where there is none."""
    files = file_states(entries)
    for record in map(_record, cache_folder.glob(f"{PREFIX}*.json")):
        made_of = record.get("source", {}).get("files", {})
        is_there = (cache_folder / f"{record.get('copy')}.safetensors").exists()
        if is_there and made_of and made_of.items() <= files.items():
            return float(record["share"])
    return None


def estimated_share(entries: Sequence[TensorEntry]) -> float:
    """What compression would leave of the bytes of matrices in bfloat16, seen on a few pieces of them; 1 where it is
    not worth it, or nothing can be read."""
    large = [entry for entry in entries if len(entry.shape) == 2 and math.prod(entry.shape) >= CHUNK]
    floats = [entry for entry in large if entry.torch_dtype.is_floating_point]
    every = max(1, len(floats) // SAMPLES)
    try:
        most = max((most_exceptions(_sample(entry)) for entry in floats[::every]), default=CHUNK)
    except (OSError, ValueError, RuntimeError):
        return 1.0
    share = record_bytes(math.ceil(most * OTHERS_MAY_HAVE)) / CHUNK_BYTES
    return share if share <= LARGEST_SHARE else 1.0


def _sample(entry: TensorEntry) -> torch.Tensor:
    """The chunk in the middle of a stored matrix, bfloat16 `[1, CHUNK]`."""
    size = entry.torch_dtype.itemsize
    first = (math.prod(entry.shape) - CHUNK) // 2
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset + first * size)
        raw = torch.frombuffer(bytearray(stream.read(CHUNK * size)), dtype=entry.torch_dtype)
    return raw.to(torch.bfloat16).view(1, CHUNK)


def _share(inner: Mapping[str, Inner], layouts: Mapping[str, CompressedLayout]) -> float:
    """Of the bytes of those that are large enough to be compressed, what is left of them."""
    large = {name: layout.nbytes for name, layout in inner.items() if layout.nbytes >= CHUNK_BYTES}
    left = [nbytes * (layouts[name].share if name in layouts else 1.0) for name, nbytes in large.items()]
    return sum(left) / sum(large.values()) if large else 1.0


def _smaller(inner: Mapping[str, Inner], exceptions: Mapping[str, int]) -> dict[str, CompressedLayout]:
    layouts = {name: CompressedLayout(inner[name], count) for name, count in exceptions.items()}
    return {name: layout for name, layout in layouts.items() if layout.share <= LARGEST_SHARE}


def _looked_through(
    sources: Mapping[str, TensorEntry], inner: Mapping[str, Inner], on_progress: OnProgress | None
) -> dict[str, int]:
    """The most exceptions that any chunk of each weight has."""
    found, done, total = {}, 0, sum(entry.nbytes for entry in sources.values())
    with PieceReader() as reader:
        for piece, tensor in reader.read([Piece.whole(entry) for entry in sources.values()]):
            found[piece.entry.name] = most_exceptions(_chunked(inner[piece.entry.name], tensor))
            done += piece.nbytes
            if on_progress is not None:
                on_progress(done, total)
    return found


def _chunked(inner: Inner, tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a weight as they lie in the inner layout, bfloat16 `[chunks, CHUNK]`. The last chunk is filled up
    with numbers of the weight's own, which are as rarely exceptions as the others."""
    (packed,) = inner.pack(tensor)
    numbers = packed.contiguous().view(-1).view(torch.bfloat16)
    chunks = -(-len(numbers) // CHUNK)
    again = -(-chunks * CHUNK // max(1, len(numbers)))
    return numbers.repeat(again)[: chunks * CHUNK].view(chunks, CHUNK) if again > 1 else numbers.view(chunks, CHUNK)


def _keep(record: Mapping[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")  # two runs may look through the same checkpoint at once
    aside.write_text(json.dumps(record))
    aside.replace(file)


def _record(file: Path) -> dict[str, Any]:
    """What was found before; nothing where the file is not there, or torn."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
