"""Packed integers to bfloat16 on the CPU in one pass, where torch needs several over scratch memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from flexbatch.kernels.floats import narrowed
from flexbatch.kernels.threads import on_all_threads

RUN = 32
"""Numbers that share a scale and are worked on at a time: a constant, so that the loop over them becomes vectors."""


def expand(
    values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, group_size: int, out: torch.Tensor
) -> None:
    """Writes q * scale + minimum, float32 rounded once, to `out`, bfloat16 `[rows, numbers]`.

    `values` uint8 `[rows, numbers]`, or half as wide where a byte holds two numbers of 4 bits: one of the row's first
    half (low) and the one half a row further on (high); its width and `group_size` are multiples of `RUN`. `scale` and
    `minimum` float32 `[rows, numbers / group_size]`. All are contiguous.
    """
    kernel = _expand_bytes if values.shape == out.shape else _expand_halves
    arguments = (values.numpy(), scale.numpy(), minimum.numpy(), group_size, out.view(torch.uint16).numpy())
    on_all_threads(lambda first, step: kernel(*arguments, first, step))


@njit(nogil=True, cache=True, error_model="numpy")
def _expand_bytes(values: Any, scale: Any, minimum: Any, group_size: int, out: Any, first: int, step: int) -> None:
    """Every `step`-th row from `first` on, 8 bits."""
    for row in range(first, out.shape[0], step):
        packed, numbers = values[row], out[row]
        for run in range(len(numbers) // RUN):
            start, group = run * RUN, run * RUN // group_size
            source, target = packed[start : start + RUN], numbers[start : start + RUN]
            times, least = scale[row, group], minimum[row, group]
            for index in range(RUN):
                target[index] = narrowed(np.float32(np.int32(source[index])) * times + least)


@njit(nogil=True, cache=True, error_model="numpy")
def _expand_halves(values: Any, scale: Any, minimum: Any, group_size: int, out: Any, first: int, step: int) -> None:
    """Every `step`-th row from `first` on, 4 bits: a run of each half at a time."""
    half = values.shape[1]
    for row in range(first, out.shape[0], step):
        packed, numbers = values[row], out[row]
        front, back = numbers[:half], numbers[half:]
        for run in range(half // RUN):
            start = run * RUN
            source, low, high = packed[start : start + RUN], front[start : start + RUN], back[start : start + RUN]
            group, other = start // group_size, (half + start) // group_size
            times, least = scale[row, group], minimum[row, group]
            other_times, other_least = scale[row, other], minimum[row, other]
            for index in range(RUN):
                low[index] = narrowed(np.float32(np.int32(source[index] & np.uint8(15))) * times + least)
                high[index] = narrowed(np.float32(np.int32(source[index] >> np.uint8(4))) * other_times + other_least)
