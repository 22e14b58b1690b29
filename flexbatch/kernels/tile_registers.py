"""The tile registers of a CPU with AMX, for kernels that Numba compiles.

A register holds sixteen rows of 64 bytes. Four of them hold the sums of 32 by 32 numbers, two the left matrix's rows,
two the right one's columns (Intel's Optimization Reference Manual, chapter 20, "Blocking").
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.kernels.vectors import function, has_features, memory_of

ROWS = 16
"""Of a register."""
LINE = 64
"""Bytes of a register's row, and of a line of the cache."""
TILE = ROWS * LINE
"""Bytes of a register."""
SIDE = 2 * ROWS
"""Rows and columns whose sums are in registers together."""
STEP = 2 * TILE
"""Bytes of either matrix that are multiplied at a time: 32 rows of a line, and as much of 32 columns."""

LEFT, RIGHT = (4, 5), (6, 7)
"""The registers that are not for sums."""

BYTE = ir.IntType(8)
POINTER = BYTE.as_pointer()
# Of the operating system: it keeps room for a thread's registers only after a process has asked for it.
ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18


@cache
def are_ours() -> bool:
    """Whether this processor multiplies tiles of 8-bit integers and of bfloat16 (no processor has one without the
    other), and the system lets this process use the registers."""
    if not (sys.platform == "linux" and has_features("amx-tile", "amx-int8", "amx-bf16")):
        return False
    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return bool(call(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)


def call(builder: Any, name: str, *arguments: Any) -> None:
    """One of LLVM's functions for tiles; plain numbers are registers."""
    given = [BYTE(each) if isinstance(each, int) else each for each in arguments]
    builder.call(function(builder, f"llvm.x86.{name}", ir.VoidType(), [each.type for each in given]), given)


def _begin(_context: Any, shapes: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "ldtilecfg", bytes_of(context, builder, signature, arguments, 0))
        return context.get_dummy_value()

    return types.void(shapes), generate


def _end(_context: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def bytes_of(context: Any, builder: Any, signature: Any, arguments: Any, at: int) -> Any:
    """The argument with this number, an array, as bytes."""
    return builder.bitcast(memory_of(context, builder, signature.args[at], arguments[at]), POINTER)


def load(builder: Any, register: int, memory: Any, at: Any, stride: Any) -> None:
    """Sixteen lines of `memory` from byte `at` on, `stride` bytes (int64) apart."""
    call(builder, "tileloadd64", register, builder.gep(memory, [at]), stride)


def begin_sums(builder: Any, memory: Any, targets: Sequence[Any], stride: Any, adds: Any) -> None:
    """The registers 0, 1, ... become zero, or what is at `targets` if `adds` (int1)."""
    with builder.if_else(adds) as (added_to, fresh):
        with added_to:
            for register, target in enumerate(targets):
                load(builder, register, memory, target, stride)
        with fresh:
            for register in range(len(targets)):
                call(builder, "tilezero", register)


def store_sums(builder: Any, memory: Any, targets: Sequence[Any], stride: Any) -> None:
    """Writes the registers 0, 1, ... to `targets`."""
    for register, target in enumerate(targets):
        call(builder, "tilestored64", register, builder.gep(memory, [target]), stride)


_set_up: Any = intrinsic(_begin)
end: Any = intrinsic(_end)
"""Gives the registers back."""


@njit(nogil=True)
def begin() -> None:
    """Sets up eight registers of sixteen lines (palette 1). Until `end`, they are this thread's."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    for register in range(8):
        shapes[16 + 2 * register], shapes[48 + register] = LINE, ROWS
    _set_up(shapes)
