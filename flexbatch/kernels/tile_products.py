"""Matrix products of 8-bit integers on a CPU with AMX, and linear layers around them in one go.

oneDNN writes all sums to memory as float32, where another pass scales them, and gives each thread half of them before
it begins: both wait for the one that is late, because it also reads or shares its core with another tenant. Here the
sums of 32 columns stay in a cache until they are numbers of the result, and threads take columns as they come.

A weight `[out, in]` lies as the registers take it: int8 `[out / 32, in / 4, 32, 4]`. What is missing to 32 outputs and
64 inputs is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from flexbatch.kernels.aligned_memory import aligned
from flexbatch.kernels.flat_memory import bits
from flexbatch.kernels.floats import narrowed, widened
from flexbatch.kernels.int8_rows import rounded_row, scaled_sum
from flexbatch.kernels.threads import add_to, share_out, take
from flexbatch.kernels.tile_registers import LINE, ROWS, SIDE, STEP, begin, end, one_by_two, two_by_two
from flexbatch.kernels.vectors import add, fill, integers, larger, load, multiply, store_narrowed

CHUNK = 8
"""Steps whose columns of the weight stay in the first cache (16 kB) while all rows pass."""
WIDE = 4
"""Squares of 32 columns that a thread sums up together where several pairs of registers pass: the left matrix, which
may not fit into the second cache, is read once for all of them, and the result is written by whole lines."""
FEWEST_BLOCKS = 16
"""Of a matrix, so that threads end at nearly the same time."""
MOST_ROWS = 512
GROUP = 4
"""Rows that a thread lays out at a time."""
TILE = ROWS * ROWS
"""Sums of a register."""
SUMS = 4 * TILE
TOGETHER = 4
"""Numbers of a row, or of a column, that lie side by side."""
READING = 24
"""Rows whose multiplications take as long as reading the weight."""


def tiled(weight: torch.Tensor) -> torch.Tensor:
    """A weight int8 `[out, in]` as it is multiplied, in one dimension of `tiled_bytes` bytes."""
    rows, columns = weight.shape
    padded = weight.new_zeros(_whole(rows, SIDE), _whole(columns, LINE))
    padded[:rows, :columns] = weight
    blocks = padded.view(-1, SIDE, padded.shape[1] // TOGETHER, TOGETHER)
    return blocks.transpose(1, 2).contiguous().view(-1)


def tiled_bytes(rows: int, columns: int) -> int:
    return _whole(rows, SIDE) * _whole(columns, LINE)


def linear(
    rows: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, offset: torch.Tensor, rectified: bool = False
) -> torch.Tensor:
    """`rows` bfloat16 `[rows, in]` times a tiled weight of scales float32 `[out]`, plus `offset` float32 `[out]`, all
    contiguous. Each row is rounded to int8 by its largest number; the sums are exact, scaled in float32 and rounded
    once to bfloat16 `[rows, out]`; with `rectified`, zero where they are below it."""
    least = np.float32(0 if rectified else -np.inf)
    out = torch.empty(len(rows), len(offset), dtype=torch.bfloat16)
    _multiply(_linear, bits(rows), weight, (weight_scale.numpy(), offset.numpy(), least), bits(out))
    return out


def integer_sums(values: torch.Tensor, weight: torch.Tensor, columns: int) -> torch.Tensor:
    """`values` int8 `[rows, in]`, contiguous, times a tiled weight of `columns` outputs: exact, int32 `[rows, out]`."""
    out = torch.empty(len(values), columns, dtype=torch.int32)
    _multiply(_sums, values.numpy(), weight, (), out.numpy())
    return out


def _multiply(kernel: Any, rows: Any, weight: torch.Tensor, columns: tuple[Any, ...], out: Any) -> None:
    steps = _whole(rows.shape[1], LINE) // LINE
    for first in range(0, len(rows), MOST_ROWS):
        part = slice(first, min(len(rows), first + MOST_ROWS))
        many = part.stop - first
        left = torch.empty(_pairs(many) * steps * STEP, dtype=torch.int8).numpy()
        given = rows[part], left, np.empty(many, np.float32), np.zeros(2, np.int64), weight.numpy(), *columns, out[part]
        share_out(kernel, *given, operations=(READING + many) * weight.numel() // TOGETHER)


def _whole(size: int, part: int) -> int:
    return -(-size // part) * part


@njit(nogil=True, inline="always", cache=True)
def _pairs(rows: int) -> int:
    """Pairs of registers that so many rows take."""
    return (rows + SIDE - 1) // SIDE


@njit(nogil=True)
def _lay(values: Any, row: int, left: Any, rows: int) -> None:
    """A row into the left matrix, `[chunk, pair of registers, step, 32, 64]`."""
    steps = (len(values) + LINE - 1) // LINE
    for step in range(steps):
        chunk = step // CHUNK * CHUNK
        at = chunk * _pairs(rows) + row // SIDE * min(CHUNK, steps - chunk) + step - chunk
        line = left[at * STEP + row % SIDE * LINE :][:LINE]
        source = values[step * LINE : (step + 1) * LINE]
        for index in range(len(source)):
            line[index] = source[index]
        line[len(source) :] = 0


@njit(nogil=True)
def _round(numbers: Any, values: Any, scale: Any, row: int) -> Any:
    """A row of bfloat16 as int8 in `values`; its scale to its place in `scale`."""
    scale[row] = rounded_row(numbers, values, 0)
    return values


@njit(nogil=True, inline="always")
def _as_it_is(numbers: Any, _values: Any, _scale: Any, _row: int) -> Any:
    return numbers


@njit(nogil=True, inline="always")
def _row_place(row: int, count: int) -> Any:
    """Where a row's sums begin, of `count` squares of columns."""
    return row // SIDE * count * SUMS + row % SIDE // ROWS * 2 * TILE + row % ROWS * ROWS


@njit(nogil=True, inline="always")
def _column_place(column: int) -> Any:
    """How far behind that the one of a column of the squares is."""
    return column // SIDE * SUMS + column % SIDE // ROWS * TILE + column % ROWS


@njit(nogil=True)
def _tell_scaled(sums: Any, count: int, scale: Any, columns: Any, base: int, out: Any, width: int) -> None:
    """The numbers of the result from column `base` on, of `count` squares: scaled, as bfloat16."""
    column_scale, offset, least = columns
    end = min(count * SIDE, width - base)
    lowest, whole = fill(least), end // ROWS * ROWS
    for row in range(len(scale)):
        at, to, times = _row_place(row, count), row * width + base, fill(scale[row])
        for column in range(0, whole, ROWS):
            own = multiply(integers(sums, at + _column_place(column)), times)
            own = multiply(own, load(column_scale, base + column))
            own = add(own, load(offset, base + column))
            store_narrowed(out, to + column, larger(lowest, own))  # NaN stays
        for column in range(whole, end):
            total = sums[at + _column_place(column)]
            one = scaled_sum(total, scale[row], column_scale[base + column], offset[base + column])
            out[to + column] = narrowed(least) if widened(one) < least else one


@njit(nogil=True)
def _tell_exact(sums: Any, count: int, scale: Any, _columns: Any, base: int, out: Any, width: int) -> None:
    """The same, as they are."""
    for row in range(len(scale)):
        at, to = _row_place(row, count), row * width + base
        for column in range(min(count * SIDE, width - base)):
            out[to + column] = sums[at + _column_place(column)]


@njit(nogil=True, inline="always")
def _squares_together(rows: int, outputs: int) -> int:
    """How many squares of columns a thread sums up together."""
    squares = (outputs + SIDE - 1) // SIDE
    return max(1, min(WIDE, squares // FEWEST_BLOCKS)) if _pairs(rows) > 1 else 1


@njit(nogil=True)
def _add_up(left: Any, rows: int, weight: Any, square: int, count: int, steps: int, sums: Any) -> None:
    """The sums of all rows with `count` squares of the weight's columns from `square` on: `[pair of registers, square,
    2, 2, 16, 16]`. What comes next of the weight is asked for meanwhile."""
    pairs = _pairs(rows)
    chunk, lines = CHUNK if pairs > 1 else steps, (STEP // LINE + pairs - 1) // pairs
    for first in range(0, steps, chunk):
        many = min(chunk, steps - first)
        for pair in range(pairs):
            own, asked = (first * pairs + pair * many) * STEP, pair * many * lines * LINE
            for each in range(count):
                their = ((square + each) * steps + first) * STEP
                # Of the same columns, or of those of the next block.
                ahead = their + (chunk if first + chunk < steps else (count - 1) * steps + many) * STEP + asked
                to = sums[(pair * count + each) * SUMS :][:SUMS]
                if rows - pair * SIDE > ROWS:
                    two_by_two(left, own, weight, their, many, to, first, lines, ahead)
                else:
                    one_by_two(left, own, weight, their, many, to, first, lines, ahead)


def _multiplication(values_of: Any, tell: Any) -> Any:
    """A product on one of the threads. `values_of` gives a row in int8, `tell` writes what becomes of sums."""

    @njit(nogil=True)
    def lay_all(rows: Any, left: Any, scale: Any, state: Any) -> None:
        """Groups of rows as they come. At the end those are done that other threads have taken, too."""
        taken, done, values = state[0:1], state[1:2], np.empty(rows.shape[1], np.int8)
        groups = (len(rows) + GROUP - 1) // GROUP
        group = take(taken)
        while group < groups:
            for row in range(group * GROUP, min(len(rows), (group + 1) * GROUP)):
                _lay(values_of(rows[row], values, scale, row), row, left, len(rows))
            add_to(done, 1)
            group = take(taken)
        while add_to(done, 0) < groups:
            pass

    @njit(nogil=True)
    def multiply(
        counter: Any, rows: Any, left: Any, scale: Any, state: Any, weight: Any, columns: Any, out: Any
    ) -> None:
        lay_all(rows, left, scale, state)
        width, steps = out.shape[1], (rows.shape[1] + LINE - 1) // LINE
        together, squares = _squares_together(len(rows), width), (width + SIDE - 1) // SIDE
        sums, told = aligned(_pairs(len(rows)) * together * SUMS).view(np.int32), out.reshape(-1)
        begin()
        square = take(counter) * together
        while square < squares:
            count = min(together, squares - square)
            _add_up(left, len(rows), weight, square, count, steps, sums)
            tell(sums, count, scale, columns, square * SIDE, told, width)
            square = take(counter) * together
        end()

    return multiply


_scaled_product, _exact_product = _multiplication(_round, _tell_scaled), _multiplication(_as_it_is, _tell_exact)


# Numba keeps the code of functions that are no closures.
@njit(nogil=True, cache=True, error_model="numpy")
def _linear(
    counter: Any,
    rows: Any,
    left: Any,
    scale: Any,
    state: Any,
    weight: Any,
    weight_scale: Any,
    offset: Any,
    least: Any,
    out: Any,
) -> None:
    _scaled_product(counter, rows, left, scale, state, weight, (weight_scale, offset, least), out)


@njit(nogil=True, cache=True, error_model="numpy")
def _sums(counter: Any, rows: Any, left: Any, scale: Any, state: Any, weight: Any, out: Any) -> None:
    _exact_product(counter, rows, left, scale, state, weight, (), out)
