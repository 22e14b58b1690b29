"""Where every tensor of a checkpoint lies: file, offset, type, shape; from the safetensors headers alone.

Format: https://github.com/huggingface/safetensors#format (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


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
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class SafetensorsIndex:
    """`entries` by tensor name; `files` in order, each with at least one tensor."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @staticmethod
    def open(folder: Path) -> SafetensorsIndex:
        """The checkpoint in `folder`, single file or sharded; reads headers only. ModelError for anything unsound."""
        raise NotImplementedError

    @staticmethod
    def of_file(file: Path) -> SafetensorsIndex:
        """The tensors of one safetensors file."""
        raise NotImplementedError
