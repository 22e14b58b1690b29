"""Small matrix products of bfloat16 with float32 sums, at most 64 columns at a time, on one thread.

oneDNN's are as fast for large matrices; those of attention are small, and between two of them comes a softmax for
which nothing should leave the cache. They reach the processor's own limit (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.kernels.vectors import FLOATS, INT32, INT64, PAIRS, WIDTH, function, memory_of, number, put, repeated

COLUMNS = 64
"""From one row to the next of a right matrix and of a result, however many of them are in use."""
ROWS = 8
"""The number of rows is a multiple of it."""


def _tile(rows: int, vectors: int, adds: bool) -> Any:
    """The intrinsic for `rows` by 16 * `vectors` numbers of a product, which stay in registers until they are done."""
    places = [(row, vector) for row in range(rows) for vector in range(vectors)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, out = (memory_of(context, builder, signature.args[at], arguments[at]) for at in (0, 4, 6))
        origin, row_stride, step_stride, steps, target = (arguments[at] for at in (1, 2, 3, 5, 7))
        targets = [builder.add(target, INT64(row * COLUMNS + vector * WIDTH)) for row, vector in places]
        zero = ir.Constant(FLOATS, [0.0] * WIDTH)
        starts = [number(builder, out, to, FLOATS) if adds else zero for to in targets]
        before, loop, end = builder.block, builder.append_basic_block("step"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        step, *sums = (builder.phi(kind) for kind in (INT64, *([FLOATS] * len(places))))
        column, first = builder.mul(step, INT64(COLUMNS)), builder.add(origin, builder.mul(step, step_stride))
        theirs = [number(builder, right, builder.add(column, INT64(at * WIDTH)), PAIRS) for at in range(vectors)]
        own = [builder.add(first, builder.mul(row_stride, INT64(row))) for row in range(rows)]
        ours = [repeated(builder, number(builder, left, at, INT32), PAIRS) for at in own]
        multiply = function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, PAIRS, PAIRS])
        new = [
            builder.call(multiply, [so_far, ours[row], theirs[vector]])
            for so_far, (row, vector) in zip(sums, places, strict=True)
        ]
        following = builder.add(step, INT64(1))
        for phi, start, value in zip((step, *sums), (INT64(0), *starts), (following, *new), strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, end)
        builder.position_at_end(end)
        for to, value in zip(targets, new, strict=True):
            put(builder, out, to, value)
        return context.get_dummy_value()

    def tile(
        _context: Any, left: Any, at: Any, row_stride: Any, step_stride: Any, right: Any, steps: Any, out: Any, to: Any
    ) -> Any:
        return types.void(left, at, row_stride, step_stride, right, steps, out, to), generate

    return intrinsic(tile)


def _row_by_row(rows: int, vectors: int, adds: bool) -> Any:
    """A product of 16 * `vectors` columns, `rows` rows at a time."""
    tile = _tile(rows, vectors, adds)

    @njit(nogil=True)
    def product(
        left: Any, at: int, row_stride: int, step_stride: int, count: int, right: Any, steps: int, out: Any
    ) -> None:
        for row in range(0, count, rows):
            tile(left, at + row * row_stride, row_stride, step_stride, right, steps, out, row * COLUMNS)

    return product


def _products(adds: bool) -> Any:
    """The product of `rows` rows of `left`, of whose pairs a row's first is at `at` and the next rows and pairs are
    `row_stride` and `step_stride` further on, with `right` (pairs, `[steps, COLUMNS]`), into `out` (`[rows, COLUMNS]`).
    Of the columns the first `width` are computed, a multiple of 16."""
    # Enough sums to keep the multipliers busy, few enough for the registers.
    one, two = _row_by_row(8, 1, adds), _row_by_row(8, 2, adds)
    three, four = _row_by_row(4, 3, adds), _row_by_row(4, 4, adds)

    @njit(nogil=True)
    def products(
        left: Any, at: int, row_stride: int, step_stride: int, rows: int, right: Any, steps: int, width: int, out: Any
    ) -> None:
        if width == 4 * WIDTH:
            four(left, at, row_stride, step_stride, rows, right, steps, out)
        elif width == 3 * WIDTH:
            three(left, at, row_stride, step_stride, rows, right, steps, out)
        elif width == 2 * WIDTH:
            two(left, at, row_stride, step_stride, rows, right, steps, out)
        else:
            one(left, at, row_stride, step_stride, rows, right, steps, out)

    return products


multiply: Any = _products(adds=False)
add_product: Any = _products(adds=True)
