"""The newest columns of rows of a KV cache, which wait beside it in a ring, copied to where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit

from flexbatch.kernels.flat_memory import flat


def add_newest(part: torch.Tensor, ring: torch.Tensor, newest: Sequence[range]) -> None:
    """Of each row `newest` names columns of `part`, `[rows, heads, columns, numbers]`, that become those of `ring`,
    `[rows, heads, columns of the ring, numbers]`: column c is at c modulo the ring's. Both on the CPU and of the same
    type, with the numbers of a head's columns side by side."""
    columns = np.array([(each.start, each.stop) for each in newest], np.int64)
    target, source = part.view(torch.uint8), ring.view(torch.uint8)
    _copy(flat(target), target.stride()[:2], flat(source), source.stride()[:2], tuple(source.shape[1:]), columns)


@njit(nogil=True, cache=True)
def _copy(target: Any, target_strides: Any, source: Any, source_strides: Any, shape: Any, newest: Any) -> None:
    heads, length, width = shape
    for row in range(len(newest)):
        for head in range(heads):
            to = row * target_strides[0] + head * target_strides[1]
            at = row * source_strides[0] + head * source_strides[1]
            for column in range(newest[row, 0], newest[row, 1]):
                here, there = to + column * width, at + column % length * width
                for index in range(width):
                    target[here + index] = source[there + index]
