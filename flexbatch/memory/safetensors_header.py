"""The header of one safetensors file, read and checked without touching the weights.

Format: https://github.com/huggingface/safetensors#format. Eight bytes (little-endian) give the length of a JSON
header; then come the header and the data. `data_offsets` count from the end of the header.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexbatch.errors import ModelError

LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
SAFETENSORS_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}

GIT_LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """`nbytes` at absolute byte `offset` of `file`; `dtype` is the safetensors name, such as `BF16`."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of `file` by name, in the order of their bytes, and the header's metadata. ModelError if unsound."""
    header, data_start, file_size = _parse(file)
    raw_metadata = header.pop("__metadata__", {})
    if not isinstance(raw_metadata, dict):
        raise _corrupt(file, "its __metadata__ is not a mapping")
    entries = [_entry(file, name, fields, data_start) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_spans(file, entries, data_start, file_size)
    return {entry.name: entry for entry in entries}, {str(key): str(value) for key, value in raw_metadata.items()}


def _parse(file: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, the byte where the data starts, and the file's size."""
    try:
        with file.open("rb") as stream:
            file_size = file.stat().st_size
            start = stream.read(len(GIT_LFS_MARK))
            if start == GIT_LFS_MARK:
                raise ModelError(
                    f"{file} is a git-LFS pointer of {file_size} bytes, not the weights themselves.",
                    remedy="Fetch the weights with `git lfs pull` in that folder, or download the model again.",
                )
            if len(start) < 8:
                raise _corrupt(file, f"it has {file_size} bytes, less than the header's length field")
            (length,) = struct.unpack("<Q", start[:8])
            if length > LONGEST_HEADER or length < 2:
                raise _corrupt(file, f"its header claims {length} bytes")
            if 8 + length > file_size:
                raise _truncated(file, "its header", 8 + length, file_size)
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read: {error.strerror or error}.", remedy="Check the path and its permissions."
        ) from error
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _corrupt(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(file, "its header is not a JSON object")
    return header, 8 + length, file_size


def _entry(file: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(file, f"tensor {name!r} lacks dtype, shape or data_offsets") from error
    if dtype not in TORCH_DTYPES:
        raise ModelError(
            f"{file}: tensor {name!r} has the type {dtype!r}, which flexbatch does not know.",
            remedy=f"Save the model in one of {', '.join(TORCH_DTYPES)}.",
        )
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in (*shape, begin, end)):
        raise _corrupt(file, f"tensor {name!r} has the shape {list(shape)} at bytes {begin} to {end}")
    nbytes = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise _corrupt(
            file, f"tensor {name!r}, {dtype} of shape {list(shape)}, needs {nbytes} bytes but has {end - begin}"
        )
    return TensorEntry(name, file, data_start + begin, nbytes, dtype, shape)


def _check_spans(file: Path, entries: list[TensorEntry], data_start: int, file_size: int) -> None:
    end, previous = data_start, ""
    for entry in entries:
        if entry.offset < end and entry.nbytes:
            raise _corrupt(file, f"tensors {previous!r} and {entry.name!r} overlap at byte {entry.offset}")
        if entry.offset + entry.nbytes > file_size:
            raise _truncated(file, f"tensor {entry.name!r}", entry.offset + entry.nbytes, file_size)
        end, previous = max(end, entry.offset + entry.nbytes), entry.name


def _corrupt(file: Path, why: str) -> ModelError:
    return ModelError(
        f"{file} is not a sound safetensors file: {why}.", remedy="Download or save this file again; nothing was read."
    )


def _truncated(file: Path, what: str, needed: int, file_size: int) -> ModelError:
    return ModelError(
        f"{file} is truncated: {what} ends at byte {needed}, but the file has {file_size} bytes.",
        remedy="The download or copy was cut off: fetch this file again.",
    )
