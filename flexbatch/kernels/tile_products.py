"""Matrix products on a CPU with AMX, with what comes before and after them in one go.

oneDNN gives each thread half of the sums before it begins: both wait for the one that is late, because it also reads or
shares its core with another tenant; and the sums of integers go through memory to be scaled. Here sums of 128 columns
stay in a cache until they are numbers of the result, and threads take columns as they come.

A weight `[out, in]` lies as the registers take it, what is 4 bytes of a column together: `[out / 32, in, 32, 4]` bytes.
What is missing to 32 outputs and 64 bytes is zero.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from flexbatch.kernels.aligned_memory import aligned
from flexbatch.kernels.threads import add_to, share_out, take
from flexbatch.kernels.tile_registers import LINE, ROWS, SIDE, STEP, begin, end

CHUNK = 8
"""Steps whose columns of the weight stay in the first cache (16 kB) while all rows pass."""
WIDE = 4
"""Squares of 32 columns that a thread sums up together where several pairs of registers pass: the left matrix, which
may not fit into the second cache, is read once for all of them, and the result is written by whole lines."""
FEWEST_BLOCKS = 16
"""Of a matrix, so that threads end at nearly the same time."""
GROUP = 4
"""Rows that a thread lays out at a time."""
TILE = ROWS * ROWS
"""Sums of a register."""
SUMS = 4 * TILE
READING = 24
"""Rows whose multiplications take as long as reading the weight."""


class Kind(NamedTuple):
    """What is multiplied and how: `squares` with one register of rows and with two, whose sums are of type `sums`;
    `values_of` gives a row as the registers take it, in bytes; `bring` the weight for some squares of columns, some of
    their steps, and where in it those begin; `tell` writes what becomes of their sums.

    `slice_steps` says how many steps of a square `bring` writes into its room (0: none, it finds all of them).
    """

    squares: tuple[Any, Any]
    sums: Any
    values_of: Callable[..., Any]
    bring: Callable[..., Any]
    tell: Callable[..., None]
    slice_steps: int = 0


def tiled(weight: torch.Tensor) -> torch.Tensor:
    """A weight `[out, in]` as it is multiplied, in one dimension of `tiled_bytes` bytes."""
    rows, columns = weight.shape
    together, whole = 4 // weight.itemsize, (_whole(rows, SIDE), _whole(columns, LINE // weight.itemsize))
    if whole != (rows, columns):
        padded = weight.new_zeros(whole)
        padded[:rows, :columns] = weight
        weight = padded
    blocks = weight.reshape(-1, SIDE, whole[1] // together, together)
    return blocks.transpose(1, 2).contiguous().view(-1)


def tiled_bytes(rows: int, row_bytes: int) -> int:
    return _whole(rows, SIDE) * _whole(row_bytes, LINE)


def multiply_rows(kernel: Any, rows: Any, most: int, pairs: int, given: tuple[Any, ...], out: Any) -> None:
    """Calls `kernel` for about `most` rows at a time. A product of one row has so many `pairs` of numbers that an
    instruction multiplies at once."""
    steps, at_once = _whole(rows.shape[1] * rows.itemsize, LINE) // LINE, rows_at_once(len(rows), most)
    for first in range(0, len(rows), at_once):
        part = slice(first, min(len(rows), first + at_once))
        many = part.stop - first
        left = _left_room(pairs_of(many) * SIDE * (steps + 1) * LINE)
        before = rows[part], left, np.empty(many, np.float32), np.zeros(2, np.int64)
        share_out(kernel, *before, *given, out[part], operations=(READING + many) * pairs)


def rows_at_once(rows: int, most: int) -> int:
    """Of so many rows, in parts of like size and up to an eighth more than `most`: a few left over would read the whole
    weight for themselves."""
    parts = max(1, -(-8 * rows // (9 * most)))
    return _whole(-(-rows // parts), SIDE)


_rooms = threading.local()


def _left_room(nbytes: int) -> Any:
    """Memory for a left matrix, int8: the calling thread's, and the same for its next product. Taken anew each time,
    blocks of so many sizes would make the heap grow."""
    room = getattr(_rooms, "left", None)
    if room is None or len(room) < nbytes:
        room = _rooms.left = torch.empty(nbytes, dtype=torch.int8)
    return room[:nbytes].numpy()


def _whole(size: int, part: int) -> int:
    return -(-size // part) * part


@njit(nogil=True, inline="always", cache=True)
def pairs_of(rows: int) -> int:
    """Pairs of registers that so many rows take."""
    return (rows + SIDE - 1) // SIDE


@njit(nogil=True, inline="always")
def row_place(row: int, count: int) -> Any:
    """Where a row's sums begin, of `count` squares of columns."""
    return row // SIDE * count * SUMS + row % SIDE // ROWS * 2 * TILE + row % ROWS * ROWS


@njit(nogil=True, inline="always")
def column_place(column: int) -> Any:
    """How far behind that the one of a column of the squares is."""
    return column // SIDE * SUMS + column % SIDE // ROWS * TILE + column % ROWS


@njit(nogil=True)
def _lay(values: Any, row: int, left: Any, rows: int) -> None:
    """A row's bytes into the left matrix, `[chunk, pair of registers, step, 32, 64]`."""
    steps = (len(values) + LINE - 1) // LINE
    for step in range(steps):
        chunk = step // CHUNK * CHUNK
        at = chunk * pairs_of(rows) + row // SIDE * min(CHUNK, steps - chunk) + step - chunk
        line = left[at * STEP + row % SIDE * LINE :][:LINE]
        source = values[step * LINE : (step + 1) * LINE]
        for index in range(len(source)):
            line[index] = source[index]
        line[len(source) :] = 0


@njit(nogil=True, inline="always")
def _squares_together(rows: int, outputs: int) -> int:
    """How many squares of columns a thread sums up together."""
    squares = (outputs + SIDE - 1) // SIDE
    return max(1, min(WIDE, squares // FEWEST_BLOCKS)) if pairs_of(rows) > 1 else 1


def laying(lay: Any) -> Any:
    """All threads' laying out of the left matrix: `lay(rows, row, values, scale, left)` does a row."""

    @njit(nogil=True)
    def lay_all(rows: Any, left: Any, scale: Any, state: Any, length: int) -> None:
        """Groups of rows as they come. At the end those are done that other threads have taken, too."""
        taken, done, values = state[0:1], state[1:2], np.empty(length, np.int8)
        groups = (len(rows) + GROUP - 1) // GROUP
        group = take(taken)
        while group < groups:
            for row in range(group * GROUP, min(len(rows), (group + 1) * GROUP)):
                lay(rows, row, values, scale, left)
            add_to(done, 1)
            group = take(taken)
        while add_to(done, 0) < groups:
            pass

    return lay_all


def _adding(one_by_two: Any, two_by_two: Any) -> Any:
    """Sums of squares."""

    @njit(nogil=True)
    def add_up(
        left: Any, rows: int, right: Any, square: int, count: int, start: int, steps: int, whole: int, sums: Any
    ) -> None:
        """Adds the products of all rows with `count` squares of the columns in `right` from `square` on to `sums`,
        `[pair of registers, square, 2, 2, 16, 16]`: the steps from `start` on, `steps` of which `right` has, of
        `whole` in all. What comes next of the columns, and of the rows, is asked for meanwhile: there are more rows
        than the second cache keeps."""
        pairs = pairs_of(rows)
        chunk, lines = CHUNK if pairs > 1 else steps, (STEP // LINE + pairs - 1) // pairs if pairs > 1 else 0
        for first in range(0, steps, chunk):
            many, begun = min(chunk, steps - first), start + first
            wide = min(chunk, whole - begun)  # of the left matrix's chunk
            few = STEP // LINE // count if pairs > 1 else 0
            for pair in range(pairs):
                own, asked = (begun * pairs + pair * wide) * STEP, pair * many * lines * LINE
                for each in range(count):
                    their = ((square + each) * steps + first) * STEP
                    # Of the same columns, or of those of the next block.
                    ahead = their + (chunk if first + chunk < steps else (count - 1) * steps + many) * STEP + asked
                    soon = own + many * (STEP + each * few * LINE)
                    to = sums[(pair * count + each) * SUMS :][:SUMS]
                    if rows - pair * SIDE > ROWS:
                        two_by_two(left, own, right, their, many, to, begun, lines, ahead, few, soon)
                    else:
                        one_by_two(left, own, right, their, many, to, begun, lines, ahead, few, soon)

    return add_up


def multiplication(kind: Kind) -> Any:
    """A product of this kind on one of the threads."""
    values_of, bring, tell, sum_type, slice_steps = kind.values_of, kind.bring, kind.tell, kind.sums, kind.slice_steps

    @njit(nogil=True)
    def lay(rows: Any, row: int, values: Any, scale: Any, left: Any) -> None:
        _lay(values_of(rows[row], values, scale, row), row, left, len(rows))

    lay_all, add_up = laying(lay), _adding(*kind.squares)

    @njit(nogil=True)
    def multiply(
        counter: Any,
        rows: Any,
        left: Any,
        scale: Any,
        state: Any,
        weight: Any,
        columns: Any,
        out: Any,
        length: int,
    ) -> None:
        """`length` is a row's bytes as the registers take it."""
        lay_all(rows, left, scale, state, length)
        width, whole = out.shape[1], (length + LINE - 1) // LINE
        together, squares = _squares_together(len(rows), width), (width + SIDE - 1) // SIDE
        sums, told = aligned(pairs_of(len(rows)) * together * SUMS).view(sum_type), out.reshape(-1)
        room = aligned(together * slice_steps * STEP // 4)
        begin()
        square = take(counter) * together
        while square < squares:
            count = min(together, squares - square)
            for start in range(0, whole, slice_steps or whole):
                steps = min(slice_steps or whole, whole - start)
                right, first = bring(weight, square, count, start, steps, whole, room)
                add_up(left, len(rows), right, first, count, start, steps, whole, sums)
            tell(sums, count, 0, len(rows), scale, columns, square * SIDE, told, width)
            square = take(counter) * together
        end()

    return multiply


@njit(nogil=True, inline="always")
def as_it_is(numbers: Any, _values: Any, _scale: Any, _row: int) -> Any:
    """`Kind.values_of` a row that is in the registers' numbers already."""
    return numbers


@njit(nogil=True, inline="always")
def as_it_lies(weight: Any, square: int, _count: int, _start: int, _steps: int, _whole: int, _room: Any) -> Any:
    """`Kind.bring` of a weight that is multiplied where it is."""
    return weight, square
