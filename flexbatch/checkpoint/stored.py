"""One tensor of a checkpoint in another published form, read only when its turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class StoredTensor:
    """`read` gives the tensor ([*shape], dtype, CPU); memory-mapped where the form allows it. `file` is for errors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    read: Callable[[], torch.Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def named(self, name: str) -> StoredTensor:
        return replace(self, name=name)


def from_tensor(name: str, tensor: torch.Tensor, file: str) -> StoredTensor:
    return StoredTensor(name, tuple(tensor.shape), tensor.dtype, file, lambda: tensor)


StoredTensors = Mapping[str, StoredTensor]
