"""Squares of 32 by 32 sums of products in the tile registers of a CPU with AMX, for matrices whose numbers lie as the
registers take them.

The left matrix has 32 rows of a line of 64 bytes after another, the right one 32 columns whose numbers of four bytes
lie with the columns side by side (Intel's Optimization Reference Manual, chapter 20).
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from flexbatch.kernels.tile_registers import LEFT, LINE, RIGHT, STEP, TILE, begin_sums, bytes_of, call, load, store_sums
from flexbatch.kernels.vectors import INT64, accumulated, fetch


def _prefetch(builder: Any, memory: Any, at: Any, lines: Any) -> None:
    """Asks for lines of `memory` from `at` on, which may lie beyond it, for the second cache."""

    def ask(line: Any, _none: list[Any]) -> list[Any]:
        place = builder.gep(memory, [builder.add(at, builder.mul(line, INT64(LINE)))])
        fetch(builder, place, nearness=2)
        return []

    accumulated(builder, lines, [], ask)


def _squares(instruction: str, rows: int) -> Any:
    """The intrinsic that adds up products of `rows` registers of rows with two of columns, for `steps` steps.

    The rows' lines are in `left` from byte `own` on, `STEP` bytes a step; the columns' in `right` from `their` on, the
    lines of both registers in turn. `sums` has a register's sums after another's; what is in it is added to unless
    `before` is 0. At each step `lines` lines of `right` are asked for, from `ahead` on, and `few` of `left`, from
    `soon` on.
    """
    places = [(row, column) for row in range(rows) for column in range(2)]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, sums = (bytes_of(context, builder, signature, arguments, at) for at in (0, 2, 5))
        own, their, steps, before, lines, ahead, few, soon = (arguments[at] for at in (1, 3, 4, 6, 7, 8, 9, 10))
        targets = [INT64((2 * row + column) * TILE) for row, column in places]
        adds = builder.icmp_signed("!=", before, INT64(0))
        begin_sums(builder, sums, targets, INT64(LINE), adds)

        def add(step: Any, _none: list[Any]) -> list[Any]:
            for memory, start, many in ((right, ahead, lines), (left, soon, few)):
                _prefetch(builder, memory, builder.add(start, builder.mul(builder.mul(step, many), INT64(LINE))), many)
            ours, theirs = (builder.add(first, builder.mul(step, INT64(STEP))) for first in (own, their))
            for row, column in places:
                if column == 0:
                    load(builder, LEFT[row], left, builder.add(ours, INT64(row * TILE)), INT64(LINE))
                if row == 0:
                    at = builder.add(theirs, INT64(column * LINE))
                    load(builder, RIGHT[column], right, at, INT64(2 * LINE))
                call(builder, instruction, 2 * row + column, LEFT[row], RIGHT[column])
            return []

        accumulated(builder, steps, [], add)
        store_sums(builder, sums, targets, INT64(LINE))
        return context.get_dummy_value()

    def squares(
        _context: Any,
        left: Any,
        own: Any,
        right: Any,
        their: Any,
        steps: Any,
        sums: Any,
        before: Any,
        lines: Any,
        ahead: Any,
        few: Any,
        soon: Any,
    ) -> Any:
        return types.void(left, own, right, their, steps, sums, before, lines, ahead, few, soon), generate

    return intrinsic(squares)


INTEGERS: Any = _squares("tdpbssd", 1), _squares("tdpbssd", 2)
"""Of int8, exact, in int32; with one register of rows and with two."""
FLOATS: Any = _squares("tdpbf16ps", 1), _squares("tdpbf16ps", 2)
"""Of bfloat16, in float32."""
