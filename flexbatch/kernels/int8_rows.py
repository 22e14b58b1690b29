"""What surrounds an integer product on the CPU, in one pass each: bfloat16 rows to int8 and int32 sums to bfloat16.

torch needs several passes over float32 scratch memory for either, a sixth of the time of the product between them
(docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from flexbatch.kernels.floats import narrowed, widened
from flexbatch.kernels.result_memory import result
from flexbatch.kernels.threads import on_all_threads

LARGEST = np.float32(127)
TINY = np.finfo(np.float32).tiny
SIZE = np.uint16(0x7FFF)  # a bfloat16 without its sign: as an integer it orders sizes
SMALL = 1 << 16  # numbers; with fewer a second thread costs more than it brings
FEW_THREADS = 2  # one of so many moves numbers nearly as fast as both, and the other need not be woken


def round_rows(rows: torch.Tensor, zero_point: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 of the shape of `rows` (bfloat16 `[rows, numbers]`, contiguous), and float32 scales `[rows]`: the largest
    size of a row becomes 127. `zero_point` is added to each number, in eight bits."""
    values, scale = result(tuple(rows.shape), torch.int8), torch.empty(len(rows))
    kernel: Any = _round
    arguments = (rows.view(torch.uint16).numpy(), values.numpy(), scale.numpy(), np.int32(zero_point))
    on_all_threads(lambda first, step: kernel(*arguments, first, step), _threads(rows))
    return values, scale


def scale_sums(
    sums: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """sums * row_scale * column_scale + offset in float32, rounded once to bfloat16 `[rows, columns]`.

    `sums` int32 or float32 `[rows, columns]`, `row_scale` float32 `[rows]`, `column_scale` and `offset` float32
    `[columns]`, all contiguous.
    """
    out = result(tuple(sums.shape), torch.bfloat16)
    kernel: Any = _scale
    given = (each.numpy() for each in (sums, row_scale, column_scale, offset))
    arguments = (*given, out.view(torch.uint16).numpy())
    on_all_threads(lambda first, step: kernel(*arguments, first, step), _threads(sums))
    return out


def _threads(numbers: torch.Tensor) -> int | None:
    return 1 if numbers.numel() < SMALL or torch.get_num_threads() <= FEW_THREADS else None


@njit(nogil=True)
def rounded_row(numbers: Any, values: Any, zero_point: int) -> Any:
    """bfloat16 `numbers` as int8 in `values`, `zero_point` added in eight bits; their scale."""
    largest = np.uint16(0)
    for index in range(len(numbers)):
        largest = max(largest, np.uint16(numbers[index] & SIZE))
    scale = max(widened(largest) / LARGEST, TINY)
    times = np.float32(1) / scale
    for index in range(len(numbers)):
        values[index] = np.int8(np.int32(np.rint(widened(numbers[index]) * times)) + zero_point)
    return scale


@njit(nogil=True, inline="always")
def scaled_sum(total: Any, row_scale: Any, column_scale: Any, offset: Any) -> Any:
    """The bfloat16 nearest to a sum of products, scaled in float32."""
    return narrowed(np.float32(total) * row_scale * column_scale + offset)


@njit(nogil=True, cache=True, error_model="numpy")
def _round(rows: Any, values: Any, scale: Any, zero_point: int, first: int, step: int) -> None:
    """Every `step`-th row from `first` on."""
    for row in range(first, rows.shape[0], step):
        scale[row] = rounded_row(rows[row], values[row], zero_point)


@njit(nogil=True, cache=True, error_model="numpy")
def _scale(sums: Any, row_scale: Any, column_scale: Any, offset: Any, out: Any, first: int, step: int) -> None:
    """Every `step`-th row from `first` on."""
    for row in range(first, sums.shape[0], step):
        source, target, times = sums[row], out[row], row_scale[row]
        for index in range(len(source)):
            target[index] = scaled_sum(source[index], times, column_scale[index], offset[index])
