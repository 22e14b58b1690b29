"""Small matrix products of bfloat16 with float32 sums, at most `COLUMNS` columns at a time, on one thread.

oneDNN's are as fast for large matrices; those of attention are small, and between two of them comes a softmax for
which nothing should leave the cache. They reach the processor's own limit (docs/benchmarks.md).

Their numbers come in *units* of four bytes: a pair of bfloat16 where the processor multiplies pairs, else a float32.
Where it has tile registers the products are those of `small_tile_products.py`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit

from flexbatch.kernels import small_tile_products, tile_registers
from flexbatch.kernels.vectors import (
    FLOATS,
    INT32,
    INT64,
    PAIRS,
    WIDTH,
    accumulated,
    function,
    memory_of,
    multiplies_pairs,
    multiply_add,
    number,
    put,
    repeated,
)

HAS_TILES = multiplies_pairs() and tile_registers.are_ours()
MARK: Any = (0, 0) if HAS_TILES else (0,)
"""An argument for kernels around these products that Numba keeps. It keeps them by the types of arguments, and a system
may give the tile registers to one process and not to the next."""
COLUMNS = small_tile_products.COLUMNS if HAS_TILES else 64
"""From one row to the next of a right matrix and of a result, however many of them are in use."""
ROWS = tile_registers.ROWS if HAS_TILES else 8
"""The number of rows is a multiple of it."""
STEPS = small_tile_products.STEPS if HAS_TILES else 1
"""The number of units that are summed up is a multiple of it; so many of a left matrix's row lie side by side."""
NUMBERS = 2 if multiplies_pairs() else 1
"""In a unit."""
_ONE, _MANY = (INT32, PAIRS) if multiplies_pairs() else (ir.FloatType(), FLOATS)


def _added(builder: Any, sums: Any, ours: Any, theirs: Any) -> Any:
    """sums + ours * theirs, of vectors of units."""
    if multiplies_pairs():
        multiply = function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, PAIRS, PAIRS])
        return builder.call(multiply, [sums, ours, theirs])
    return multiply_add(builder, ours, theirs, sums)


def _tile(rows: int, vectors: int, adds: bool) -> Any:
    """The intrinsic for `rows` by 16 * `vectors` numbers of a product from a row and column on, which stay in registers
    until they are done."""
    places = [(row, vector) for row in range(rows) for vector in range(vectors)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, out = (memory_of(context, builder, signature.args[at], arguments[at]) for at in (0, 4, 6))
        origin, row_stride, step_stride, steps, row, begin = (arguments[at] for at in (1, 2, 3, 5, 7, 8))
        target = builder.add(builder.mul(row, INT64(COLUMNS)), begin)
        targets = [builder.add(target, INT64(row * COLUMNS + vector * WIDTH)) for row, vector in places]
        zero = ir.Constant(FLOATS, [0.0] * WIDTH)
        starts = [number(builder, out, to, FLOATS) if adds else zero for to in targets]

        def add(step: Any, sums: list[Any]) -> list[Any]:
            column = builder.add(builder.mul(step, INT64(COLUMNS)), begin)
            first = builder.add(origin, builder.mul(step, step_stride))
            theirs = [number(builder, right, builder.add(column, INT64(at * WIDTH)), _MANY) for at in range(vectors)]
            own = [builder.add(first, builder.mul(row_stride, INT64(row))) for row in range(rows)]
            ours = [repeated(builder, number(builder, left, at, _ONE), _MANY) for at in own]
            return [
                _added(builder, so_far, ours[row], theirs[vector])
                for so_far, (row, vector) in zip(sums, places, strict=True)
            ]

        for to, value in zip(targets, accumulated(builder, steps, starts, add), strict=True):
            put(builder, out, to, value)
        return context.get_dummy_value()

    return small_tile_products.block_of_product(generate)


def _row_by_row(rows: int, vectors: int, adds: bool) -> Any:
    """A product of 16 * `vectors` columns from `column` on, `rows` rows at a time."""
    tile = _tile(rows, vectors, adds)

    @njit(nogil=True)
    def product(
        left: Any,
        at: int,
        row_stride: int,
        step_stride: int,
        count: int,
        right: Any,
        steps: int,
        out: Any,
        column: int,
    ) -> None:
        for row in range(0, count, rows):
            tile(left, at + row * row_stride, row_stride, step_stride, right, steps, out, row, column)

    return product


def _products(adds: bool) -> Any:
    """The product of `rows` rows of `left`, of whose units a row's first is at `at`, with `right` (units, `[steps,
    COLUMNS]`), into `out` (`[rows, COLUMNS]`). In `left` the next row is `row_stride`, the next `STEPS` units
    are `step_stride` further on. Of the columns the first `width` are computed, a multiple of 16."""
    # Enough sums to keep the multipliers busy, few enough for the registers.
    one, two = _row_by_row(8, 1, adds), _row_by_row(8, 2, adds)
    three, four = _row_by_row(4, 3, adds), _row_by_row(4, 4, adds)

    @njit(nogil=True)
    def products(
        left: Any, at: int, row_stride: int, step_stride: int, rows: int, right: Any, steps: int, width: int, out: Any
    ) -> None:
        if width == 4 * WIDTH:
            four(left, at, row_stride, step_stride, rows, right, steps, out, 0)
        elif width == 3 * WIDTH:
            three(left, at, row_stride, step_stride, rows, right, steps, out, 0)
        elif width == 2 * WIDTH:
            two(left, at, row_stride, step_stride, rows, right, steps, out, 0)
        else:
            one(left, at, row_stride, step_stride, rows, right, steps, out, 0)

    return products


def _products_in_small_registers(adds: bool) -> Any:
    """The same where a vector takes two of sixteen registers: sixteen columns at a time."""
    one = _row_by_row(4, 1, adds)

    @njit(nogil=True)
    def products(
        left: Any, at: int, row_stride: int, step_stride: int, rows: int, right: Any, steps: int, width: int, out: Any
    ) -> None:
        for column in range(0, width, WIDTH):
            one(left, at, row_stride, step_stride, rows, right, steps, out, column)

    return products


@njit(nogil=True)
def _nothing() -> None:
    pass


_made = _products if multiplies_pairs() else _products_in_small_registers
multiply: Any = small_tile_products.multiply if HAS_TILES else _made(adds=False)
add_product: Any = small_tile_products.add_product if HAS_TILES else _made(adds=True)
begin: Any = tile_registers.begin if HAS_TILES else _nothing
"""Before a thread's first product."""
end: Any = tile_registers.end if HAS_TILES else _nothing
"""After its last one."""
