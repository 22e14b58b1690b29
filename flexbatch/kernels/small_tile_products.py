"""The small products of `small_products.py` in the tile registers of a CPU with AMX.

A register takes sixteen rows of sixteen units, pairs of bfloat16, of the left matrix as they lie, and as much of
sixteen columns of the right one, whose units lie with the columns side by side (Intel's Optimization Reference Manual,
chapter 20). Until `tile_registers.end` the registers are this thread's.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.kernels.tile_registers import LEFT, LINE, RIGHT, ROWS, begin_sums, bytes_of, call, load, store_sums
from flexbatch.kernels.vectors import INT64, accumulated

COLUMNS = 32
"""From one row to the next of a right matrix and of a result, however many of them are in use."""
UNIT = 4
"""Bytes of a unit, and of a sum."""
STEPS = LINE // UNIT
"""Units that are multiplied at a time. A left matrix has so many of a row side by side."""


def block_of_product(generate: Any) -> Any:
    """The intrinsic for a block of a product, whose instructions `generate` writes: of `left` from `at` on, with two
    strides, and `right`, `steps` units are summed up into `out`, from `row` and `column` on."""

    def block(  # Numba wants the names
        _context: Any,
        left: Any,
        at: Any,
        row_stride: Any,
        step_stride: Any,
        right: Any,
        steps: Any,
        out: Any,
        row: Any,
        column: Any,
    ) -> Any:
        return types.void(left, at, row_stride, step_stride, right, steps, out, row, column), generate

    return intrinsic(block)


def _square(rows: int, columns: int, adds: bool) -> Any:
    """The intrinsic for `rows` by `columns` registers of a product, from a row and a column on."""
    places = [(row, column) for row in range(rows) for column in range(columns)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, out = (bytes_of(context, builder, signature, arguments, at) for at in (0, 4, 6))
        origin, row_stride, step_stride, steps, row, column = (
            builder.mul(arguments[at], INT64(UNIT)) for at in (1, 2, 3, 5, 7, 8)
        )
        line = INT64(COLUMNS * UNIT)
        target = builder.add(builder.mul(row, INT64(COLUMNS)), column)
        targets = [builder.add(target, INT64((r * ROWS * COLUMNS + c * ROWS) * UNIT)) for r, c in places]
        begin_sums(builder, out, targets, line, ir.IntType(1)(adds))

        def add(step: Any, _none: list[Any]) -> list[Any]:
            ours = builder.add(origin, builder.mul(step, step_stride))
            theirs = builder.add(column, builder.mul(step, INT64(STEPS * COLUMNS * UNIT)))
            for r, c in places:
                if c == 0:
                    at = builder.add(ours, builder.mul(row_stride, INT64(r * ROWS)))
                    load(builder, LEFT[r], left, at, row_stride)
                if r == 0:
                    load(builder, RIGHT[c], right, builder.add(theirs, INT64(c * ROWS * UNIT)), line)
                call(builder, "tdpbf16ps", r * columns + c, LEFT[r], RIGHT[c])
            return []

        accumulated(builder, builder.sdiv(steps, INT64(STEPS * UNIT)), [], add)
        store_sums(builder, out, targets, line)
        return context.get_dummy_value()

    return block_of_product(generate)


def _products(adds: bool) -> Any:
    """As `small_products` has it. `rows` and `width` are multiples of 16, `steps` of `STEPS`."""
    one_by_one, one_by_two = _square(1, 1, adds), _square(1, 2, adds)
    two_by_one, two_by_two = _square(2, 1, adds), _square(2, 2, adds)

    @njit(nogil=True)
    def products(
        left: Any, at: int, row_stride: int, step_stride: int, rows: int, right: Any, steps: int, width: int, out: Any
    ) -> None:
        for row in range(0, rows, 2 * ROWS):
            start = at + row * row_stride
            for column in range(0, width, 2 * ROWS):
                if rows - row > ROWS:
                    if width - column > ROWS:
                        two_by_two(left, start, row_stride, step_stride, right, steps, out, row, column)
                    else:
                        two_by_one(left, start, row_stride, step_stride, right, steps, out, row, column)
                elif width - column > ROWS:
                    one_by_two(left, start, row_stride, step_stride, right, steps, out, row, column)
                else:
                    one_by_one(left, start, row_stride, step_stride, right, steps, out, row, column)

    return products


multiply: Any = _products(adds=False)
add_product: Any = _products(adds=True)
