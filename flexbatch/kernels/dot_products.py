"""Matrix products of 8-bit integers on a CPU with AVX512 that multiplies four pairs at once and adds them up (VNNI).

oneDNN writes the sums to memory, from where they are read to be scaled. Here those of 32 columns and as many rows stay
in the first cache until they are numbers of the result, and threads take columns as they come.

The instruction multiplies unsigned by signed numbers: 128 is added to the left matrix's, and what that brings is taken
from where the sums begin. A weight lies as for tile registers (`tile_products.tiled`), where a step's four bytes of
sixteen columns are a vector.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.kernels import tile_registers
from flexbatch.kernels.aligned_memory import aligned
from flexbatch.kernels.threads import take
from flexbatch.kernels.tile_products import laying, tiled, tiled_bytes
from flexbatch.kernels.tile_registers import LINE, ROWS, SIDE
from flexbatch.kernels.vectors import has_features, memory_of

binding.initialize_native_asmparser()  # for the instructions below; Numba itself has none

ZERO_POINT = 128
SUM_BYTES = 4
TOGETHER = 4
"""Bytes of a row, or of a column, that are multiplied at once: a step."""
STEP = TOGETHER * SIDE
"""Bytes that a step takes of 32 columns."""
UNROLLED = 4
"""Steps to a turn of the loop. Lines of the cache have sixteen, and rows and columns whole lines."""
HALVES = SIDE // ROWS
"""Vectors that a step takes of 32 columns."""
TILE_ROWS = 12
"""Rows whose sums are in registers together."""
OURS, THEIRS = 28, 30
"""The first of two registers for numbers of rows, in turn, and of two for columns; sums have those before."""
POINTER_ROWS = 3
"""Rows that are reached from one pointer by the distance between them, and twice that."""
MANY_TILES = 8
"""From so many on the next columns are asked for; where there are fewer, the processor does so early enough."""


def dotted(weight: torch.Tensor) -> torch.Tensor:
    """A weight `[out, in]` of int8 as it is multiplied, in one dimension of `dotted_bytes` bytes: tiled, and then where
    its columns' sums begin."""
    starts = torch.zeros(-(-len(weight) // SIDE) * SIDE, dtype=torch.int32)
    starts[: len(weight)] = weight.sum(dim=1, dtype=torch.int32) * -ZERO_POINT
    return torch.cat((tiled(weight), starts.view(torch.int8)))


def dotted_bytes(rows: int, columns: int) -> int:
    return tiled_bytes(rows, columns) + -(-rows // SIDE) * SIDE * SUM_BYTES


@cache
def are_ours() -> bool:
    """Whether this processor has the instruction, for sixteen sums at a time, and no tile registers that are ours."""
    return has_features("avx512f", "avx512vnni") and not tile_registers.are_ours()


def _instructions(many: int) -> str:
    """Those of `_tile`, in the assembler's notation: LLVM orders its own so that sums go to memory and back.

    Operands 0 to 3 go on (and are 4 to 7 as well): the left matrix's first byte, the right one's, what is asked for,
    and the steps. Operands 8 to 11 stay: from one row of the left matrix to the next, how far what is asked for goes on
    in a turn, where the sums begin, and where they go.
    """
    pointers = ("$0", "%r8", "%r9", "%r10")[: -(-many // POINTER_ROWS)]
    lines = []
    for before, pointer in itertools.pairwise(pointers):
        lines += [f"lea ({before},$8,2), {pointer}", f"add $8, {pointer}"]
    for half in range(HALVES):
        lines += [f"vmovdqu64 {half * LINE}($10), {_sum(row, half)}" for row in range(many)]
    lines += ["1:", "prefetcht1 ($2)", "add $9, $2"]
    for step in range(UNROLLED):
        lines += [f"vmovdqu64 {step * STEP + half * LINE}($1), %zmm{THEIRS + half}" for half in range(HALVES)]
        for row in range(many):
            pointer, index = pointers[row // POINTER_ROWS], ("", ",$8", ",$8,2")[row % POINTER_ROWS]
            ours = f"%zmm{OURS + row % 2}"
            lines.append(f"vpbroadcastd {step * TOGETHER}({pointer}{index}), {ours}")
            lines += [f"vpdpbusd %zmm{THEIRS + half}, {ours}, {_sum(row, half)}" for half in range(HALVES)]
    lines += [f"add $${UNROLLED * TOGETHER}, {pointer}" for pointer in pointers]
    lines += [f"sub $${-UNROLLED * STEP}, $1", f"sub $${UNROLLED}, $3", "jg 1b"]
    for row in range(many):
        lines += [f"vmovdqu64 {_sum(row, half)}, {(HALVES * row + half) * LINE}($11)" for half in range(HALVES)]
    return "\n".join(lines)


def _sum(row: int, half: int) -> str:
    """The register with the sums of a row and half of the columns."""
    return f"%zmm{HALVES * row + half}"


def _tile(many: int) -> Any:
    """The intrinsic that adds up the products of `many` rows with 32 columns.

    Row r of the left matrix has its unsigned bytes in `left` from `at` + r * `stride` on; step s has its bytes of all
    columns in `right` from `origin` + s * `STEP` on, and `steps` is a multiple of `UNROLLED`. The sums begin as the 32
    int32 in `right` from `start` on, and go to `sums`, row by row, from `to` on. Meanwhile `right` is asked for from
    `soon` on, `pace` bytes further in each turn.
    """
    goes_on, stays = ["=&r"] * 4, ["r"] * 4
    scratch = ("r8", "r9", "r10", *(f"zmm{each}" for each in range(32)), "memory", "cc")
    constraints = ",".join([*goes_on, *map(str, range(4)), *stays, *(f"~{{{each}}}" for each in scratch)])

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, out = (memory_of(context, builder, signature.args[at], arguments[at]) for at in (0, 3, 9))
        at, stride, origin, steps, start, soon, pace, to = (arguments[index] for index in (1, 2, 4, 5, 6, 7, 8, 10))
        moving = builder.gep(left, [at]), builder.gep(right, [origin]), builder.gep(right, [soon]), steps
        given = *moving, stride, pace, builder.gep(right, [start]), builder.gep(out, [to])
        moved = ir.LiteralStructType([each.type for each in moving])
        kind = ir.FunctionType(moved, [each.type for each in given])
        builder.asm(kind, _instructions(many), constraints, given, side_effect=True)
        return context.get_dummy_value()

    def tile(
        _context: Any,
        left: Any,
        _at: Any,
        _stride: Any,
        right: Any,
        _origin: Any,
        _steps: Any,
        _start: Any,
        _soon: Any,
        _pace: Any,
        sums: Any,
        _to: Any,
    ) -> Any:
        whole = types.int64
        return types.void(left, whole, whole, right, whole, whole, whole, whole, whole, sums, whole), generate

    return intrinsic(tile)


_twelve: Any = _tile(TILE_ROWS)
_eight: Any = _tile(8)
_four: Any = _tile(4)
_two: Any = _tile(2)
_one: Any = _tile(1)


@njit(nogil=True, inline="always")
def row_place(row: int, _count: int) -> Any:
    """Where a row's sums begin."""
    return row * SIDE


@njit(nogil=True, inline="always")
def column_place(column: int) -> Any:
    """How far behind that the one of a column is."""
    return column


@njit(nogil=True)
def _add_up(
    left: Any,
    at: int,
    many: int,
    stride: int,
    right: Any,
    origin: int,
    steps: int,
    start: int,
    soon: int,
    pace: int,
    sums: Any,
) -> None:
    """The sums of up to `TILE_ROWS` rows from the one at `at` on."""
    row = 0
    while row < many:
        own, to, rest = at + row * stride, row * SIDE, many - row
        if rest == TILE_ROWS:
            _twelve(left, own, stride, right, origin, steps, start, soon, pace, sums, to)
            row += TILE_ROWS
        elif rest >= 8:
            _eight(left, own, stride, right, origin, steps, start, soon, pace, sums, to)
            row += 8
        elif rest >= 4:
            _four(left, own, stride, right, origin, steps, start, soon, pace, sums, to)
            row += 4
        elif rest >= 2:
            _two(left, own, stride, right, origin, steps, start, soon, pace, sums, to)
            row += 2
        else:
            _one(left, own, stride, right, origin, steps, start, soon, pace, sums, to)
            row += 1


@njit(nogil=True, inline="always")
def _stride(length: int) -> int:
    """From one row of so many bytes to the next in the left matrix: whole lines, and one more, without which many rows
    would share the same few lines of the first cache."""
    return (length + LINE - 1) // LINE * LINE + LINE


def multiplication(lay: Any, tell: Any) -> Any:
    """A product on one of the threads. `lay(numbers, row, scale, left)` writes a row's bytes, `ZERO_POINT` added to
    each, to `left`; `tell` is as `tile_products.Kind` has it."""

    @njit(nogil=True)
    def lay_row(rows: Any, row: int, _values: Any, scale: Any, left: Any) -> None:
        lay(rows[row], row, scale, left[row * _stride(rows.shape[1]) :])

    lay_all = laying(lay_row)

    @njit(nogil=True)
    def multiply(
        counter: Any, rows: Any, left: Any, scale: Any, state: Any, weight: Any, columns: Any, out: Any, length: int
    ) -> None:
        lay_all(rows, left, scale, state, length)
        width, stride = out.shape[1], _stride(length)
        steps, squares = (stride - LINE) // TOGETHER, (width + SIDE - 1) // SIDE
        sums, told = aligned(TILE_ROWS * SIDE).view(np.int32), out.reshape(-1)
        tiles = (len(rows) + TILE_ROWS - 1) // TILE_ROWS
        pace = (UNROLLED * STEP + tiles - 1) // tiles if tiles >= MANY_TILES else 0
        square = take(counter)
        while square < squares:
            following = take(counter)  # is asked for while this one is multiplied
            origin, soon = square * steps * STEP, min(following, squares - 1) * steps * STEP
            start = squares * steps * STEP + square * SIDE * SUM_BYTES
            for first in range(0, len(rows), TILE_ROWS):
                many, at = min(TILE_ROWS, len(rows) - first), first * stride
                _add_up(left, at, many, stride, weight, origin, steps, start, soon, pace, sums)
                tell(sums, 1, first, many, scale, columns, square * SIDE, told, width)
                soon += steps // UNROLLED * pace
            square = following

    return multiply
