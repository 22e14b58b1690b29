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

from flexbatch.kernels.flat_memory import bits
from flexbatch.kernels.int8_rows import rounded_row, scaled_sum
from flexbatch.kernels.threads import add_to, share_out, take
from flexbatch.kernels.tile_registers import LINE, ROWS, SIDE, STEP, begin, end, one_by_two, two_by_two

CHUNK = 8
"""Steps whose columns of the weight stay in the first cache (16 kB) while all rows pass."""
MOST_ROWS = 512
GROUP = 4
"""Rows that a thread lays out at a time."""
SUMS = SIDE * SIDE
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


def linear(rows: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`rows` bfloat16 `[rows, in]` times a tiled weight of scales float32 `[out]`, plus `offset` float32 `[out]`, all
    contiguous. Each row is rounded to int8 by its largest number; the sums are exact, scaled in float32 and rounded
    once to bfloat16 `[rows, out]`."""
    out = torch.empty(len(rows), len(offset), dtype=torch.bfloat16)
    _multiply(_linear, bits(rows), weight, (weight_scale.numpy(), offset.numpy()), bits(out))
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


@njit(nogil=True, inline="always")
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
def _scaled(total: Any, times: Any, column: int, columns: Any) -> Any:
    return scaled_sum(total, times, columns[0][column], columns[1][column])


@njit(nogil=True, inline="always")
def _exact(total: Any, _times: Any, _column: int, _columns: Any) -> Any:
    return total


@njit(nogil=True)
def _add_up(left: Any, rows: int, weight: Any, base: int, steps: int, sums: Any) -> None:
    """The sums of all rows with 32 columns of the weight, which begin at `base`: `[pair of registers, 2, 2, 16, 16]`.
    What comes next of the weight is asked for meanwhile."""
    pairs = _pairs(rows)
    chunk, lines = CHUNK if pairs > 1 else steps, (STEP // LINE + pairs - 1) // pairs
    for first in range(0, steps, chunk):
        count, their = min(chunk, steps - first), base + first * STEP
        for pair in range(pairs):
            own, to = (first * pairs + pair * count) * STEP, sums[pair * SUMS : (pair + 1) * SUMS]
            ahead = their + CHUNK * STEP + pair * count * lines * LINE
            if rows - pair * SIDE > ROWS:
                two_by_two(left, own, weight, their, count, to, first, lines, ahead)
            else:
                one_by_two(left, own, weight, their, count, to, first, lines, ahead)


@njit(nogil=True)
def _set_up() -> None:
    """Eight registers of sixteen lines (palette 1)."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    for register in range(8):
        shapes[16 + 2 * register], shapes[48 + register] = LINE, ROWS
    begin(shapes)


def _multiplication(values_of: Any, told: Any) -> Any:
    """A product on one of the threads. `values_of` gives a row in int8, `told` what becomes of a sum."""

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
    def tell(sums: Any, scale: Any, columns: Any, base: int, out: Any) -> None:
        """The numbers of the result from column `base` on."""
        for first in range(base, min(base + SIDE, out.shape[1]), ROWS):
            count = min(ROWS, out.shape[1] - first)
            for row in range(len(out)):
                at = ((row // ROWS * 2 + (first - base) // ROWS) * ROWS + row % ROWS) * ROWS
                source, target, times = sums[at : at + count], out[row, first : first + count], scale[row]
                for index in range(count):
                    target[index] = told(source[index], times, first + index, columns)

    @njit(nogil=True)
    def multiply(
        counter: Any, rows: Any, left: Any, scale: Any, state: Any, weight: Any, columns: Any, out: Any
    ) -> None:
        lay_all(rows, left, scale, state)
        room = np.empty(_pairs(len(rows)) * SUMS + ROWS, np.int32)
        sums, steps = room[(-room.ctypes.data % LINE) // 4 :], (rows.shape[1] + LINE - 1) // LINE
        _set_up()
        block = take(counter)
        while block * SIDE < out.shape[1]:
            _add_up(left, len(rows), weight, block * steps * STEP, steps, sums)
            tell(sums, scale, columns, block * SIDE, out)
            block = take(counter)
        end()

    return multiply


_scaled_product, _exact_product = _multiplication(_round, _scaled), _multiplication(_as_it_is, _exact)


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
    out: Any,
) -> None:
    _scaled_product(counter, rows, left, scale, state, weight, (weight_scale, offset), out)


@njit(nogil=True, cache=True, error_model="numpy")
def _sums(counter: Any, rows: Any, left: Any, scale: Any, state: Any, weight: Any, out: Any) -> None:
    _exact_product(counter, rows, left, scale, state, weight, (), out)
