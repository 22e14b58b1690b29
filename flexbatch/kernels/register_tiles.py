"""Tiles of matrix products that stay in the registers of a CPU with AVX2: numbers in float32, or pairs of int16.

The vectors lie along the rows of the left matrix, whose numbers for one step are side by side; each number of the
right matrix is repeated over a vector. So nothing is added up across a vector, and a row's sums do not depend on which
rows are beside it (Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008, section 4).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flexbatch.kernels.vectors import (
    INT32,
    INT64,
    accumulated,
    function,
    memory_of,
    multiply_add,
    number,
    put,
    repeated,
)

LANES = 8
VECTORS = 2
PANEL = VECTORS * LANES
"""Rows of the left matrix that are side by side."""
TILE = 6
"""Rows of the right matrix at a time: with them twelve registers hold sums, as many as two units keep busy."""
NARROW_TILE = VECTORS * TILE
"""The same where only the first vector of a panel has rows."""
UNROLLED = 8
"""Steps of floats to a turn of the loop: where another tenant has half of the core, time goes by instructions, and the
loop's own are a tenth. Of integers LLVM would add up several steps first, for which there are not enough registers."""

INTEGERS, FLOATS = ir.VectorType(INT32, LANES), ir.VectorType(ir.FloatType(), LANES)
PAIRS = ir.VectorType(ir.IntType(16), 2 * LANES)


def add_floats(builder: Any, sums: Any, ours: Any, theirs: Any) -> Any:
    return multiply_add(builder, ours, theirs, sums)


def add_pairs(builder: Any, sums: Any, ours: Any, theirs: Any) -> Any:
    products = function(builder, "llvm.x86.avx2.pmadd.wd", INTEGERS, [PAIRS] * 2)
    pairs = [builder.bitcast(each, PAIRS) for each in (ours, theirs)]
    return builder.add(sums, builder.call(products, pairs))


def _tile(kind: Any, add: Any, many: int, vectors: int, *, together: int = 1) -> Any:
    """The intrinsic that adds `steps` products to sums of `many` rows of the right matrix and `vectors` vectors of the
    left one's, `PANEL` from row to row, from index `to` of `out` on.

    Row r of the right matrix has its numbers in `right` from `at` + r * `stride` on; step s of the left one has its
    `PANEL` numbers in `left` from `origin` + s * `PANEL` on. A number is a float32, or a pair of int16 in four bytes.
    """
    places = [(row, vector) for row in range(many) for vector in range(vectors)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        right, left, out = (memory_of(context, builder, signature.args[at], arguments[at]) for at in (0, 3, 6))
        at, stride, origin, steps, to = (arguments[index] for index in (1, 2, 4, 5, 7))
        targets = [builder.add(to, INT64(row * PANEL + vector * LANES)) for row, vector in places]
        starts = [number(builder, out, target, kind) for target in targets]
        rows = [builder.gep(right, [builder.add(at, builder.mul(stride, INT64(row)))]) for row in range(many)]
        panel = builder.gep(left, [origin])

        def next_sums(step: Any, sums: list[Any]) -> list[Any]:
            first = builder.mul(step, INT64(PANEL))
            lanes = [builder.add(first, INT64(vector * LANES)) for vector in range(vectors)]
            theirs = [number(builder, panel, lane, kind) for lane in lanes]
            ours = [repeated(builder, number(builder, row, step, kind.element), kind) for row in rows]
            return [
                add(builder, so_far, ours[row], theirs[vector])
                for so_far, (row, vector) in zip(sums, places, strict=True)
            ]

        sums = accumulated(builder, steps, starts, next_sums, together=together)
        for target, value in zip(targets, sums, strict=True):
            put(builder, out, target, value)
        return context.get_dummy_value()

    def tile(
        _context: Any, right: Any, at: Any, stride: Any, left: Any, origin: Any, steps: Any, out: Any, to: Any
    ) -> Any:
        return types.void(right, at, stride, left, origin, steps, out, to), generate

    return intrinsic(tile)


float_tile: Any = _tile(FLOATS, add_floats, TILE, VECTORS, together=UNROLLED)
"""Of float32 `right`, `left` and `out`: a * b + c, rounded once a step."""
narrow_float_tile: Any = _tile(FLOATS, add_floats, NARROW_TILE, 1, together=UNROLLED)
pair_tile: Any = _tile(INTEGERS, add_pairs, TILE, VECTORS)
"""Of int32 `right` and `left`, each two int16, and int32 `out`: exact."""
narrow_pair_tile: Any = _tile(INTEGERS, add_pairs, NARROW_TILE, 1)
