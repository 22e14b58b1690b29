"""Numbers to packed integers on the CPU in one pass, where torch needs some fifteen over float32 copies.

The very bits of `memory.quantization.quantize`: of each group the minimum rounded down to float16, the scale rounded
up, and every number rounded to the nearest step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.kernels.packed_numbers import BYTES, GROUP, converts_float16, half
from flexbatch.kernels.threads import on_all_threads
from flexbatch.kernels.vectors import (
    FLOATS,
    PAIRS,
    WIDTH,
    fill,
    floats,
    function,
    fused,
    memory_of,
    multiply,
    number,
    put,
    subtract,
)

SMALL = 1 << 15  # numbers; with fewer a second thread costs more than it brings
LARGEST = np.float32(65504.0)  # of float16
SIGN = np.uint16(0x8000)


def suits(numbers: torch.Tensor, group_size: int) -> bool:
    """Whether `pack` takes these, `[..., numbers]`, with as many to a group."""
    return (
        numbers.device.type == "cpu"
        and numbers.dtype in (torch.float32, torch.bfloat16)
        and group_size == GROUP
        and numbers.shape[-1] % (2 * GROUP) == 0
        and converts_float16()
    )


def pack(numbers: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> None:
    """Writes what `numbers`, contiguous float32 or bfloat16 `[rows, numbers]`, become: `values` uint8 `[rows, numbers]`
    in 8 bits, or `[rows, numbers / 2]` in 4, a byte with a number of the row's first half (low) and the one half a row
    further on (high); `scale` and `minimum` float16 `[rows, groups]`. All are contiguous."""
    kernel: Any = _pack_bytes if values.shape == numbers.shape else _pack_halves
    given = numbers.view(torch.uint16) if numbers.dtype == torch.bfloat16 else numbers
    parameters = (each.view(torch.uint16) for each in (scale, minimum))
    arguments: Any = (*(each.flatten().numpy() for each in (given, values, *parameters)), numbers.shape[1])
    threads = 1 if numbers.numel() < SMALL else None
    on_all_threads(lambda first, step: kernel(*arguments, first, step), threads)


def _load_numbers(_context: Any, array: Any, at: Any) -> Any:
    narrow = array.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = memory_of(context, builder, signature.args[0], arguments[0])
        if not narrow:
            return number(builder, memory, arguments[1], FLOATS)
        bits = number(builder, memory, arguments[1], ir.VectorType(ir.IntType(16), WIDTH), align=2)
        wide = builder.shl(builder.zext(bits, PAIRS), ir.Constant(PAIRS, [16] * WIDTH))
        return builder.bitcast(wide, FLOATS)

    return floats(array, at), generate


def _extremes(_context: Any, one: Any, other: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = arguments
        unordered = builder.bitcast(builder.fcmp_unordered("uno", a, b), ir.IntType(WIDTH))
        is_number = builder.icmp_unsigned("==", unordered, ir.IntType(WIDTH)(0))
        found = []
        for order, name in (("<", "fmin"), (">", "fmax")):
            nearer = builder.select(builder.fcmp_ordered(order, a, b), a, b)
            reduce = function(builder, f"llvm.vector.reduce.{name}.v{WIDTH}f32", ir.FloatType(), [FLOATS])
            extreme = builder.call(reduce, [nearer], fastmath=("nnan", "nsz"))  # not looked at where it would be wrong
            found.append(builder.select(is_number, extreme, ir.FloatType()(float("nan"))))
        return context.make_tuple(builder, signature.return_type, found)

    return types.Tuple([types.float32, types.float32])(one, other), generate  # type: ignore[no-untyped-call]


def _to_half(_context: Any, value: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(value), generate


def _steps(_context: Any, value: Any, most: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        whole = builder.call(function(builder, f"llvm.rint.v{WIDTH}f32", FLOATS, [FLOATS]), [arguments[0]])
        for order, bound in (("<", ir.Constant(FLOATS, [0.0] * WIDTH)), (">", arguments[1])):
            whole = builder.select(builder.fcmp_ordered(order, whole, bound), bound, whole)
        return whole

    return floats(value, most), generate


def _store_bytes(_context: Any, array: Any, at: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = memory_of(context, builder, signature.args[0], arguments[0])
        put(builder, memory, arguments[1], builder.trunc(builder.fptosi(arguments[2], PAIRS), BYTES), align=1)
        return context.get_dummy_value()

    return types.void(array, at, vector), generate


load_numbers: Any = intrinsic(_load_numbers)
"""Sixteen float32, or bfloat16 given as uint16, of a contiguous array, from an index on."""
extremes: Any = intrinsic(_extremes)
"""The lowest and the highest number of two vectors; NaN where one is."""
to_half: Any = intrinsic(_to_half)
"""The float16, as uint16, nearest to a float32; of two as near the even one."""
steps: Any = intrinsic(_steps)
"""The whole numbers nearest to a vector's, from 0 to `most`."""
store_bytes: Any = intrinsic(_store_bytes)
"""Writes a vector of whole numbers below 256 over what an array of uint8 has from an index on."""


@njit(nogil=True, inline="always")
def _rounded_up(value: Any) -> Any:
    """The least float16 not below `value`, as uint16; beyond the largest one that one."""
    if abs(value) > LARGEST:
        value = LARGEST if value > 0 else -LARGEST
    bits = to_half(value)
    rounded = half(bits)
    # The next number up: bits count away from zero, and 1 stands for the smallest positive number.
    above = np.uint16(bits + 1) if rounded > 0 else (np.uint16(bits - 1) if rounded < 0 else np.uint16(1))
    return above if (rounded < value) & (rounded < LARGEST) else bits


@njit(nogil=True, inline="always")
def _group(numbers: Any, at: int, most: Any) -> Any:
    """The group from index `at` on: what it is counted from and one over the step, and both as they are kept."""
    lowest, highest = extremes(load_numbers(numbers, at), load_numbers(numbers, at + WIDTH))
    minimum = np.uint16(_rounded_up(-lowest) ^ SIGN)
    low = half(minimum)
    scale = _rounded_up((highest - low) / most)
    step = half(scale)
    inverse = np.float32(1) / step if step > 0 else np.float32(0)
    return low, inverse, minimum, scale


@njit(nogil=True, inline="always")
def _integers(numbers: Any, at: int, low: Any, inverse: Any, most: Any) -> Any:
    return steps(multiply(subtract(load_numbers(numbers, at), fill(low)), fill(inverse)), fill(most))


@njit(nogil=True, cache=True, error_model="numpy")
def _pack_bytes(numbers: Any, values: Any, scales: Any, minima: Any, _width: int, first: int, step: int) -> None:
    """The `first` of `step` parts of all groups, 8 bits."""
    most, groups = np.float32(255), len(scales)
    for group in range(groups * first // step, groups * (first + 1) // step):
        at = group * GROUP
        low, inverse, minima[group], scales[group] = _group(numbers, at, most)
        for place in range(at, at + GROUP, WIDTH):
            store_bytes(values, place, _integers(numbers, place, low, inverse, most))


@njit(nogil=True, cache=True, error_model="numpy")
def _pack_halves(numbers: Any, values: Any, scales: Any, minima: Any, width: int, first: int, step: int) -> None:
    """The `first` of `step` parts of all rows of `width` numbers, 4 bits: a group of each half at a time."""
    most, sixteen, rows = np.float32(15), fill(np.float32(16)), len(numbers) // width
    back, groups = width // 2, width // GROUP // 2
    for row in range(rows * first // step, rows * (first + 1) // step):
        for group in range(groups):
            at, lower = row * width + group * GROUP, row * 2 * groups + group
            low, inverse, minima[lower], scales[lower] = _group(numbers, at, most)
            upper = lower + groups
            other, other_inverse, minima[upper], scales[upper] = _group(numbers, at + back, most)
            for place in range(0, GROUP, WIDTH):
                high = _integers(numbers, at + back + place, other, other_inverse, most)
                both = fused(high, sixteen, _integers(numbers, at + place, low, inverse, most))
                store_bytes(values, row * back + group * GROUP + place, both)
