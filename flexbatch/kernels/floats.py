"""Floating-point arithmetic that Numba does not bring along: bfloat16, and an exponential that vectorises."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ARITHMETIC = {"contract", "reassoc", "arcp", "nsz"}
"""Freedoms that let sums and products vectorise. NaN and infinity keep their meaning."""

LOWEST = float(np.finfo(np.float32).min)
"""The score of what may not be seen: finite, as in torch's masks, so that nothing becomes NaN."""
LOG2_OF_E = np.float32(1.4426950408889634)
# 2**x on [-0.5, 0.5] by its Taylor series: relative error below 2e-7.
POWERS = tuple(np.float32(c) for c in (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 0.24022651, 0.69314718))
LEAST = np.float32(-87.0)  # the exponential of less is no normal float32


def _widen(_context: Any, bits: Any) -> Any:  # noqa: ARG001 - Numba wants the name
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


def _narrow(_context: Any, number: Any) -> Any:  # noqa: ARG001 - Numba wants the name
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        int32 = ir.IntType(32)
        bits = builder.bitcast(arguments[0], int32)
        is_odd = builder.and_(builder.lshr(bits, ir.Constant(int32, 16)), ir.Constant(int32, 1))
        rounded = builder.add(bits, builder.add(is_odd, ir.Constant(int32, 0x7FFF)))
        return builder.trunc(builder.lshr(rounded, ir.Constant(int32, 16)), ir.IntType(16))

    return types.uint16(types.float32), generate


def _raise_two(_context: Any, exponent: Any) -> Any:  # noqa: ARG001 - Numba wants the name
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(ir.IntType(32), 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(ir.IntType(32), 23)), ir.FloatType())

    return types.float32(types.int32), generate


widened: Any = intrinsic(_widen)
"""The float32 of a bfloat16 given as uint16."""

narrowed: Any = intrinsic(_narrow)
"""The bfloat16, as uint16, nearest to a float32 that is a number; of two as near the even one."""

power_of_two: Any = intrinsic(_raise_two)
"""2**exponent as float32, for an int32 between -126 and 127."""


@njit(nogil=True, inline="always", fastmath=ARITHMETIC)
def exponential(x: Any) -> Any:
    """e**x of a float32 of at most 0, within 3e-7 of it; below -87 as at -87."""
    scaled = max(x, LEAST) * LOG2_OF_E
    whole = np.floor(scaled + np.float32(0.5))
    rest = scaled - whole
    series = POWERS[0]
    series = series * rest + POWERS[1]
    series = series * rest + POWERS[2]
    series = series * rest + POWERS[3]
    series = series * rest + POWERS[4]
    series = series * rest + POWERS[5]
    return (series * rest + np.float32(1.0)) * power_of_two(np.int32(whole))
