"""Products of 8-bit integers by tile registers (AMX) or by vectors (AVX512-VNNI), and linear layers around them: each
row rounded to int8 by its largest number, sums exact, scaled in float32 and rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from flexbatch.kernels import dot_products
from flexbatch.kernels.flat_memory import bits
from flexbatch.kernels.floats import narrowed, widened
from flexbatch.kernels.int8_rows import rounded_row, scaled_sum
from flexbatch.kernels.result_memory import result
from flexbatch.kernels.tile_products import (
    Kind,
    as_it_is,
    as_it_lies,
    column_place,
    multiplication,
    multiply_rows,
    row_place,
)
from flexbatch.kernels.tile_registers import ROWS, SIDE
from flexbatch.kernels.tile_squares import INTEGERS
from flexbatch.kernels.vectors import add, fill, integers, larger, load, multiply, store_narrowed

MOST_ROWS = 512
MARK: Any = (0,) if dot_products.are_ours() else (0, 0)
"""An argument for the kernels below: Numba keeps their code by the types of arguments, and a system may give the tile
registers to one process and not to the next."""


def linear(
    rows: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, offset: torch.Tensor, rectified: bool = False
) -> torch.Tensor:
    """`rows` bfloat16 `[rows, in]` times a weight as it was laid out for this processor (tiled, or `dotted`), of scales
    float32 `[out]`, plus `offset` float32 `[out]`, all contiguous. Each row is rounded to int8 by its largest number;
    the sums are exact, scaled in float32 and rounded once to bfloat16 `[rows, out]`; with `rectified`, zero where they
    are below it."""
    least = np.float32(0 if rectified else -np.inf)
    out = result((len(rows), len(offset)), torch.bfloat16)
    given = MARK, weight.numpy(), weight_scale.numpy(), offset.numpy(), least
    multiply_rows(_linear, bits(rows), MOST_ROWS, weight.numel() // dot_products.TOGETHER, given, bits(out))
    return out


def integer_sums(values: torch.Tensor, weight: torch.Tensor, columns: int) -> torch.Tensor:
    """`values` int8 `[rows, in]`, contiguous, times such a weight of `columns` outputs: exact, int32 `[rows, out]`."""
    out = result((len(values), columns), torch.int32)
    given = MARK, weight.numpy()
    multiply_rows(_sums, values.numpy(), MOST_ROWS, weight.numel() // dot_products.TOGETHER, given, out.numpy())
    return out


@njit(nogil=True)
def _round(numbers: Any, values: Any, scale: Any, row: int) -> Any:
    """A row of bfloat16 as int8 in `values`; its scale to its place in `scale`."""
    scale[row] = rounded_row(numbers, values, 0)
    return values


@njit(nogil=True)
def _lay_rounded(numbers: Any, row: int, scale: Any, left: Any) -> None:
    scale[row] = rounded_row(numbers, left[: len(numbers)], dot_products.ZERO_POINT)


@njit(nogil=True)
def _lay_as_it_is(numbers: Any, _row: int, _scale: Any, left: Any) -> None:
    for index in range(len(numbers)):
        left[index] = np.int8(np.int32(numbers[index]) + dot_products.ZERO_POINT)


def _telling_scaled(row_at: Any, column_at: Any) -> Any:
    """`Kind.tell` of sums, scaled, as bfloat16. `row_at(row, count)` is where a row's sums begin, and `column_at` how
    far behind that a column's is."""

    @njit(nogil=True)
    def tell(
        sums: Any, count: int, first: int, many: int, scale: Any, columns: Any, base: int, out: Any, width: int
    ) -> None:
        """The numbers of `many` rows of the result from row `first` and column `base` on, of `count` squares."""
        column_scale, offset, least = columns
        end = min(count * SIDE, width - base)
        lowest, whole = fill(least), end // ROWS * ROWS
        for row in range(first, first + many):
            at, to, times = row_at(row - first, count), row * width + base, fill(scale[row])
            for column in range(0, whole, ROWS):
                own = multiply(integers(sums, at + column_at(column)), times)
                own = multiply(own, load(column_scale, base + column))
                own = add(own, load(offset, base + column))
                store_narrowed(out, to + column, larger(lowest, own))  # NaN stays
            for column in range(whole, end):
                total = sums[at + column_at(column)]
                one = scaled_sum(total, scale[row], column_scale[base + column], offset[base + column])
                out[to + column] = narrowed(least) if widened(one) < least else one

    return tell


def _telling_exact(row_at: Any, column_at: Any) -> Any:
    """The same, as they are."""

    @njit(nogil=True)
    def tell(
        sums: Any, count: int, first: int, many: int, _scale: Any, _columns: Any, base: int, out: Any, width: int
    ) -> None:
        for row in range(first, first + many):
            at, to = row_at(row - first, count), row * width + base
            for column in range(min(count * SIDE, width - base)):
                out[to + column] = sums[at + column_at(column)]

    return tell


if dot_products.are_ours():
    _in_rows = dot_products.row_place, dot_products.column_place
    _scaled_product = dot_products.multiplication(_lay_rounded, _telling_scaled(*_in_rows))
    _exact_product = dot_products.multiplication(_lay_as_it_is, _telling_exact(*_in_rows))
else:
    _in_squares = row_place, column_place
    _scaled_product = multiplication(Kind(INTEGERS, np.int32, _round, as_it_lies, _telling_scaled(*_in_squares)))
    _exact_product = multiplication(Kind(INTEGERS, np.int32, as_it_is, as_it_lies, _telling_exact(*_in_squares)))


# Numba keeps the code of functions that are no closures.
@njit(nogil=True, cache=True, error_model="numpy")
def _linear(
    counter: Any,
    rows: Any,
    left: Any,
    scale: Any,
    state: Any,
    _mark: Any,
    weight: Any,
    weight_scale: Any,
    offset: Any,
    least: Any,
    out: Any,
) -> None:
    columns = weight_scale, offset, least
    _scaled_product(counter, rows, left, scale, state, weight, columns, out, rows.shape[1])


@njit(nogil=True, cache=True, error_model="numpy")
def _sums(counter: Any, rows: Any, left: Any, scale: Any, state: Any, _mark: Any, weight: Any, out: Any) -> None:
    _exact_product(counter, rows, left, scale, state, weight, (), out, rows.shape[1])
