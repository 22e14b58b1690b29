"""Safetensors files written one tensor at a time, hashed as they are written, and there only when they are whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexbatch.checkpoint.stored import StoredTensor
from flexbatch.errors import CapacityError, ModelError, OutputError
from flexbatch.memory.safetensors_index import SAFETENSORS_NAMES

_WRITTEN_AT_ONCE = 64 * 1024 * 1024


@dataclass(frozen=True)
class PlannedShard:
    """A file to be written: its name and tensors in order."""

    name: str
    tensors: Sequence[StoredTensor]

    @property
    def nbytes(self) -> int:
        return len(_header(self.tensors)) + sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[StoredTensor], most_bytes: int) -> list[PlannedShard]:
    """Tensors in order, cut into files of at most `most_bytes` (a larger tensor is a file of its own)."""
    runs: list[list[StoredTensor]] = []
    size = 0
    for tensor in tensors:
        if not runs or size + tensor.nbytes > most_bytes:
            runs.append([])
            size = 0
        runs[-1].append(tensor)
        size += tensor.nbytes
    if len(runs) == 1:
        return [PlannedShard("model.safetensors", runs[0])]
    return [
        PlannedShard(f"model-{number:05d}-of-{len(runs):05d}.safetensors", run)
        for number, run in enumerate(runs, start=1)
    ]


def write_shard(folder: Path, shard: PlannedShard) -> str:
    """Write `folder/shard.name` (under a temporary name until it is whole) and return its sha256."""
    digest = hashlib.sha256()
    partial = folder / f".{shard.name}.partial"
    try:
        with partial.open("wb") as stream:
            header = _header(shard.tensors)
            stream.write(header)
            digest.update(header)
            for stored in shard.tensors:
                data = _bytes(stored)
                for start in range(0, len(data), _WRITTEN_AT_ONCE):
                    piece = data[start : start + _WRITTEN_AT_ONCE]
                    stream.write(piece)
                    digest.update(piece)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(folder / shard.name)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise write_error(partial, error) from error
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_error(file: Path, error: OSError) -> CapacityError | OutputError:
    if error.errno == errno.ENOSPC:
        return CapacityError(
            f"The disk is full: {file} could not be written.",
            remedy="Free some space and run the same command again; finished files are kept.",
        )
    return OutputError(
        f"{file} could not be written: {error.strerror or error}.",
        remedy="Check the folder's permissions and try again.",
    )


def _header(tensors: Sequence[StoredTensor]) -> bytes:
    """The format's JSON header (https://github.com/huggingface/safetensors#format), padded to 8 bytes with spaces."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        fields[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(stored: StoredTensor) -> memoryview:
    tensor = stored.read()
    if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
        raise ModelError(
            f"{stored.file}: tensor {stored.name!r} came as {tensor.dtype} {list(tensor.shape)}, "
            f"not {stored.dtype} {list(stored.shape)}.",
            remedy="The model parts are not of one checkpoint.",
        )
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
