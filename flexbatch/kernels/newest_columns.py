"""The newest columns of rows of a KV cache, which wait beside it in a ring, copied to where they belong."""

from __future__ import annotations

from typing import Any

import torch
from numba import njit

from flexbatch.kernels.flat_memory import flat


def add_newest(part: torch.Tensor, ring: torch.Tensor, newest: Any) -> None:
    """Of each row `newest`, int64 `[rows, 2]`, has the first of some columns of `part`, `[rows, heads, columns,
    numbers]`, and the one behind them: they become those of `ring`, `[rows, heads, columns of the ring, numbers]`,
    where column c is at c modulo the ring's. Both on the CPU and of the same type, with the numbers of a head's columns
    side by side."""
    target, source = part.view(torch.uint8), ring.view(torch.uint8)
    _copy(flat(target), target.stride()[:2], flat(source), source.stride()[:2], tuple(source.shape[1:]), newest)


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
