"""Floating-point numbers that Numba does not bring along: bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

ARITHMETIC = {"contract", "reassoc", "arcp", "nsz"}
"""Freedoms that let sums and products vectorise. NaN and infinity keep their meaning."""

LOWEST = float(np.finfo(np.float32).min)
"""The score of what may not be seen: finite, as in torch's masks, so that nothing becomes NaN."""
LOG2_OF_E = np.float32(1.4426950408889634)
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


widened: Any = intrinsic(_widen)
"""The float32 of a bfloat16 given as uint16."""

narrowed: Any = intrinsic(_narrow)
"""The bfloat16, as uint16, nearest to a float32 that is a number; of two as near the even one."""
