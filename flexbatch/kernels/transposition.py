"""Transposes blocks of sixteen by sixteen numbers of four bytes, in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flexbatch.kernels.vectors import INT32, INT64, PAIRS, WIDTH, memory_of, number, put


def _transpose(_context: Any, source: Any, at: Any, stride: Any, out: Any, to: Any, out_stride: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, out = (memory_of(context, builder, signature.args[at], arguments[at]) for at in (0, 3))
        at, stride, to, out_stride = (arguments[index] for index in (1, 2, 4, 5))

        def place(first: Any, step: Any, row: int) -> Any:
            return builder.add(first, builder.mul(step, INT64(row)))

        rows = [number(builder, source, place(at, stride, row), PAIRS) for row in range(WIDTH)]
        half = WIDTH // 2
        for _ in range(WIDTH.bit_length() - 1):  # a perfect shuffle of all numbers, as often as it takes
            mixed = [_interleaved(builder, rows[row], rows[row + half]) for row in range(half)]
            rows = [vector for pair in mixed for vector in pair]
        for row, vector in enumerate(rows):
            put(builder, out, place(to, out_stride, row), vector)
        return context.get_dummy_value()

    return types.void(source, at, stride, out, to, out_stride), generate


def _interleaved(builder: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """The numbers of both in turn: those of the lower halves, those of the upper ones."""

    def mixed(begin: int) -> Any:
        order = [begin + index // 2 + WIDTH * (index % 2) for index in range(WIDTH)]
        return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT32, WIDTH), order))

    return mixed(0), mixed(WIDTH // 2)


transpose: Any = intrinsic(_transpose)
"""`transpose(source, at, stride, out, to, out_stride)`: sixteen rows of sixteen numbers of a contiguous array, the
first at index `at`, become columns of another one."""
