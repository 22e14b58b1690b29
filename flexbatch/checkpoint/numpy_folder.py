"""Alpa's and FlexGen's form: a folder of numpy files, one per tensor, each named like its tensor (no suffix)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexbatch.checkpoint.stored import StoredTensor
from flexbatch.errors import ModelError

_MAGIC = b"\x93NUMPY"


def is_numpy_folder(folder: Path) -> bool:
    return any(_is_numpy(file) for file in folder.iterdir())


def read_numpy_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every numpy file of `folder`, memory-mapped, by tensor name. Two-byte void arrays are bfloat16."""
    tensors = {}
    for file in sorted(folder.iterdir()):
        if _is_numpy(file):
            name = file.name.removesuffix(".npy")
            tensors[name] = _stored(name, file)
    return tensors


def _is_numpy(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def _stored(name: str, file: Path) -> StoredTensor:
    try:
        # Copy on write: torch warns of arrays that it may not write to, and nothing here writes.
        array = np.load(file, mmap_mode="c", allow_pickle=False)
    except ValueError as error:
        if "Object arrays" in str(error) or "object" in str(error):
            raise ModelError(
                f"{file} is refused: it holds pickled objects, which could run code when they are loaded.",
                remedy="A checkpoint's arrays are plain numbers; take the model from a source that you trust.",
            ) from error
        raise ModelError(
            f"{file} is truncated or not a numpy file ({error}).", remedy="Fetch or copy this file again."
        ) from error
    shape = tuple(int(size) for size in array.shape)
    return StoredTensor(name, shape, _torch_dtype(array, file), str(file), lambda: _tensor(array))


def _torch_dtype(array: np.ndarray[Any, Any], file: Path) -> torch.dtype:
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.bfloat16
    try:
        return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
    except TypeError as error:
        raise ModelError(
            f"{file} holds numbers of the type {array.dtype}, which no model uses.", remedy="Check what this file is."
        ) from error


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if array.dtype.kind == "V":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))
