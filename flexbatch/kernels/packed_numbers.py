"""Packed numbers as vectors of sixteen float32, for kernels that Numba compiles: bytes, their halves, and float16."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.kernels.vectors import FLOATS, WIDTH, floats, has_features, memory_of, number, store

GROUP = 2 * WIDTH
"""Numbers that share a scale and a minimum."""
BYTES = ir.VectorType(ir.IntType(8), WIDTH)
HALVES = ir.VectorType(ir.HalfType(), WIDTH)


@cache
def converts_float16() -> bool:
    """Whether this processor has an instruction for it: others would call a function that is not there."""
    return has_features("f16c") or has_features("neon")


def _loads(make: Callable[[Any, Any], Any], kind: Any) -> Any:
    """An intrinsic that reads a `kind` at an index of a contiguous array, and makes floats of it: nothing looks whether
    it exists."""

    def load(_context: Any, array: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            memory = memory_of(context, builder, signature.args[0], arguments[0])
            return make(builder, number(builder, memory, arguments[1], kind, align=1))

        return floats(array, at), generate

    return intrinsic(load)


def _low(builder: Any, packed: Any) -> Any:
    return builder.uitofp(builder.and_(packed, ir.Constant(BYTES, [15] * WIDTH)), FLOATS)


def _high(builder: Any, packed: Any) -> Any:
    return builder.uitofp(builder.lshr(packed, ir.Constant(BYTES, [4] * WIDTH)), FLOATS)


def _half(_context: Any, bits: Any) -> Any:  # noqa: ARG001 - Numba wants the name
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


load_bytes: Any = _loads(lambda builder, packed: builder.uitofp(packed, FLOATS), BYTES)
"""Sixteen uint8."""
load_low_halves: Any = _loads(_low, BYTES)
"""The lower four bits of sixteen uint8."""
load_high_halves: Any = _loads(_high, BYTES)
"""The upper four bits of sixteen uint8."""
load_float16: Any = _loads(lambda builder, halves: builder.fpext(halves, FLOATS), HALVES)
"""Sixteen float16, given as uint16."""
half: Any = intrinsic(_half)
"""The float32 of a float16 given as uint16."""


@njit(nogil=True)
def widen_all(source: Any, at: int, count: int, target: Any) -> None:
    """Writes to `target` the float32 of `count` float16, given as uint16, from index `at` on."""
    whole = count // WIDTH * WIDTH
    for index in range(0, whole, WIDTH):
        store(target, index, load_float16(source, at + index))
    for index in range(whole, count):
        target[index] = half(source[at + index])
