"""Tiles of products of a few rows that stay in the registers of a CPU with AVX2.

The vectors lie along the rows: a part of a weight's row is widened in a register and multiplied there by that of every
row of inputs, so that nothing is written on the way. At the end the lanes of each sum are added up, always in the same
order, so a row's sums do not depend on which rows are beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flexbatch.kernels.register_tiles import FLOATS, INTEGERS, LANES, PAIRS, add_floats, add_pairs
from flexbatch.kernels.vectors import INT32, INT64, accumulated, memory_of, number


@dataclass(frozen=True, slots=True)
class Numbers:
    """What is multiplied: `step` numbers at a time, `narrow` in the weight and `wide` in the inputs, into `sums`.

    `widen(builder, narrow)` makes the one the other, `add(builder, sums, ours, theirs)` adds products, and
    `join(builder, a, b)` adds sums.
    """

    step: int
    narrow: Any
    wide: Any
    sums: Any
    widen: Callable[[Any, Any], Any]
    add: Callable[[Any, Any, Any, Any], Any]
    join: Callable[[Any, Any, Any], Any]


def _widened_floats(builder: Any, narrow: Any) -> Any:
    bits = builder.zext(narrow, INTEGERS)
    return builder.bitcast(builder.shl(bits, ir.Constant(INTEGERS, [16] * LANES)), FLOATS)


BFLOATS = Numbers(
    LANES,
    ir.VectorType(ir.IntType(16), LANES),
    FLOATS,
    FLOATS,
    _widened_floats,
    add_floats,
    lambda builder, a, b: builder.fadd(a, b),
)
"""A weight of bfloat16 (as uint16) and inputs of float32."""
BYTES = Numbers(
    2 * LANES,
    ir.VectorType(ir.IntType(8), 2 * LANES),
    PAIRS,
    INTEGERS,
    lambda builder, narrow: builder.sext(narrow, PAIRS),
    add_pairs,
    lambda builder, a, b: builder.add(a, b),
)
"""A weight of int8 and inputs of int16."""


def tile(numbers: Numbers, inputs: int, rows: int, out_stride: int) -> Any:
    """The intrinsic for the products of `inputs` rows of inputs and `rows` rows of the weight, which takes `weight`,
    `at`, `given`, `origin`, `stride`, `steps`, `out`, `to`.

    Their numbers lie in `weight` from `at` on and in `given` from `origin` on, `stride` from row to row in both,
    `steps` times `numbers.step` of them, at least one step. `out` gets, from `to` on, `rows` sums for each row of
    inputs, `out_stride` from one to the next.
    """
    places = [(of_inputs, of_weight) for of_inputs in range(inputs) for of_weight in range(rows)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weight, given, out = (memory_of(context, builder, signature.args[at], arguments[at]) for at in (0, 2, 6))
        at, origin, stride, steps, to = (arguments[index] for index in (1, 3, 4, 5, 7))
        own = [builder.add(at, builder.mul(stride, INT64(row))) for row in range(rows)]
        others = [builder.add(origin, builder.mul(stride, INT64(row))) for row in range(inputs)]

        def next_sums(step: Any, sums: list[Any]) -> list[Any]:
            first = builder.mul(step, INT64(numbers.step))
            ours = [number(builder, weight, builder.add(row, first), numbers.narrow) for row in own]
            wide = [numbers.widen(builder, each) for each in ours]
            theirs = [number(builder, given, builder.add(row, first), numbers.wide) for row in others]
            return [
                numbers.add(builder, so_far, wide[of_weight], theirs[of_inputs])
                for so_far, (of_inputs, of_weight) in zip(sums, places, strict=True)
            ]

        zeros = [ir.Constant(numbers.sums, [0] * LANES)] * len(places)
        sums = accumulated(builder, steps, zeros, next_sums)
        for (of_inputs, of_weight), value in zip(places, sums, strict=True):
            target = builder.add(to, INT64(of_inputs * out_stride + of_weight))
            builder.store(_across(builder, value, numbers.join), builder.gep(out, [target]))
        return context.get_dummy_value()

    def products(
        _context: Any, weight: Any, at: Any, given: Any, origin: Any, stride: Any, steps: Any, out: Any, to: Any
    ) -> Any:
        return types.void(weight, at, given, origin, stride, steps, out, to), generate

    return intrinsic(products)


def _across(builder: Any, vector: Any, join: Callable[[Any, Any, Any], Any]) -> Any:
    """The sum of a vector's lanes: halves are added until one is left."""
    while vector.type.count > 1:
        half = vector.type.count // 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        orders = ([*range(half)], [*range(half, 2 * half)])
        halves = [
            builder.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(INT32, half), order))
            for order in orders
        ]
        vector = join(builder, *halves)
    return builder.extract_element(vector, INT32(0))
