"""One tile of attention for a kernel: at most `COLUMNS` queries of a head that see keys block by block, in one pass
(FlashAttention, arXiv 2205.14135, algorithm 1), on one thread of a CPU with AMX, AVX512-BF16 or AVX2.

A key's scores lie with the queries side by side, so nothing in the softmax goes across a vector. Numbers are multiplied
in units (small_products.py). Where a unit is a pair of bfloat16, these are two numbers of a query or key, or those of
two keys' values. Logarithms and powers are of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from flexbatch.kernels import vectors
from flexbatch.kernels.aligned_memory import aligned
from flexbatch.kernels.floats import LOWEST, narrowed, widened
from flexbatch.kernels.small_products import (
    COLUMNS,
    HAS_TILES,
    NUMBERS,
    ROWS,
    STEPS,
    add_product,
    multiply,
)
from flexbatch.kernels.transposition import transpose
from flexbatch.kernels.vectors import WIDTH, fill, fused, in_pairs, larger, load, prefetch, store, two_to

ZERO = np.float32(0)
LN_OF_2 = np.float32(0.6931471805599453)
BLOCK = 64 if HAS_TILES else 96
"""Keys at a time: their scores stay in the first cache."""


class Tile(NamedTuple):
    """What a thread works on, each with `COLUMNS` queries side by side: the queries' `units`, a block's scores and its
    softmax weights' units, the sums of weighted values so far, in `rows`, and of the softmax so far the highest score
    and the sum of weights. `asked` and `told` have sixteen queries' units and results one after the other."""

    units: int
    rows: int
    queries: Any
    scores: Any
    shares: Any
    sums: Any
    highest: Any
    total: Any
    asked: Any
    told: Any


UNIT = np.uint32 if NUMBERS == 2 else np.float32
"""The type that holds a unit."""


@njit(nogil=True, inline="always")
def units_of(numbers: int) -> Any:
    """Units of so many numbers, as a product takes them."""
    return (numbers + NUMBERS * STEPS - 1) // (NUMBERS * STEPS) * STEPS


@njit(nogil=True, inline="always")
def rows_of(count: int) -> Any:
    """So many rows, as a product takes them."""
    return (count + ROWS - 1) // ROWS * ROWS


@njit(nogil=True, inline="always")
def _whole(count: int) -> Any:
    """So many numbers, as they are transposed."""
    return (count + WIDTH - 1) // WIDTH * WIDTH


@njit(nogil=True)
def new_tile(size: int, value_size: int) -> Any:
    """For heads of these sizes; nothing is filled in."""
    return Tile(
        units_of(size),
        rows_of(value_size),
        aligned(_whole(units_of(size)) * COLUMNS).view(UNIT),
        aligned(BLOCK * COLUMNS),
        aligned(BLOCK // NUMBERS * COLUMNS).view(UNIT),
        aligned(_whole(rows_of(value_size)) * COLUMNS),
        aligned(COLUMNS),
        aligned(COLUMNS),
        np.zeros(WIDTH * _whole(units_of(size)), UNIT),
        aligned(WIDTH * _whole(rows_of(value_size))),
    )


@njit(nogil=True, inline="always")
def _pair(first: Any, second: Any) -> Any:
    return np.uint32(first) | np.uint32(second) << np.uint32(16)


@njit(nogil=True, inline="always")
def _alone(first: Any, second: Any) -> Any:  # noqa: ARG001 - there is no second number
    return widened(first)


@njit(nogil=True, inline="always")
def _soften_pair(scores: Any, shares: Any, at: int, to: int, scale: Any, less: Any) -> Any:
    """The scores of two keys from `at` on become a unit of weights of the softmax; their sum."""
    first = two_to(fused(load(scores, at), scale, less))
    second = two_to(fused(load(scores, at + COLUMNS), scale, less))
    store(shares, to, in_pairs(first, second))
    return vectors.add(first, second)


@njit(nogil=True, inline="always")
def _soften_one(scores: Any, shares: Any, at: int, to: int, scale: Any, less: Any) -> Any:
    """The same of one key. The score is rounded as `less` was, so the highest is never above zero."""
    share = two_to(vectors.add(vectors.multiply(load(scores, at), scale), less))
    store(shares, to, share)
    return share


_unit, _softened = (_pair, _soften_pair) if NUMBERS == 2 else (_alone, _soften_one)


@njit(nogil=True)
def gather_keys(source: Any, at: int, stride: int, count: int, size: int, out: Any) -> None:
    """`count` keys, a key's units side by side."""
    whole = units_of(size)
    for key in range(count):
        numbers, units = source[at + key * stride : at + key * stride + size], out[key * whole : (key + 1) * whole]
        for index in range(size // NUMBERS):
            units[index] = _unit(numbers[NUMBERS * index], numbers[NUMBERS * index + NUMBERS - 1])
        units[size // NUMBERS :] = 0


@njit(nogil=True)
def gather_values(source: Any, at: int, stride: int, count: int, size: int, out: Any) -> None:
    """`count` values: `STEPS` units of one or two keys' values side by side, then those of the values' next number, and
    behind all of them the next keys'. What is missing to whole units, steps and rows is zero."""
    rows, units, together = rows_of(size), units_of(count), NUMBERS * STEPS
    if STEPS == 1:
        if rows > size:
            out[: units * rows] = 0
        _gather_units(source, at, stride, count, size, rows, out)
        return
    lines = np.zeros(STEPS * rows, UNIT)
    for first in range(0, count, together):
        if count - first < together:
            lines[:] = 0
        _gather_units(source, at + first * stride, stride, min(together, count - first), size, rows, lines)
        for row in range(0, rows, STEPS):
            transpose(lines, row, rows, out, first // NUMBERS * rows + row * STEPS, STEPS)


@njit(nogil=True, inline="always")
def _gather_units(source: Any, at: int, stride: int, count: int, size: int, rows: int, out: Any) -> None:
    """The units of `count` keys' values, each with its numbers side by side, `rows` further on than the one before."""
    for unit in range(count // NUMBERS):
        here = at + unit * NUMBERS * stride
        there = here + (NUMBERS - 1) * stride
        first, second, units = source[here : here + size], source[there : there + size], out[unit * rows :]
        for index in range(size):
            units[index] = _unit(first[index], second[index])
    if count % NUMBERS:
        here = at + (count - 1) * stride
        first, units = source[here : here + size], out[count // NUMBERS * rows :]
        for index in range(size):
            units[index] = _unit(first[index], np.uint16(0))


@njit(nogil=True, inline="always")
def ask_for(source: Any, at: int, stride: int, count: int, size: int) -> None:
    """Fetches so many rows of numbers of two bytes, which lie too far apart for the processor to guess."""
    for row in range(count):
        for index in range(0, size, 32):
            prefetch(source, at + row * stride + index)


@njit(nogil=True)
def begin(tile: Any, source: Any, at: int, stride: int, count: int, size: int) -> None:
    """`count` queries that have seen nothing yet; columns without one get zeros."""
    line = len(tile.asked) // WIDTH
    for first in range(0, count, WIDTH):
        many = min(WIDTH, count - first)
        if many < WIDTH:
            tile.asked[:] = 0
        for lane in range(many):
            here = at + (first + lane) * stride
            numbers, units = source[here : here + size], tile.asked[lane * line : (lane + 1) * line]
            for unit in range(size // NUMBERS):
                units[unit] = _unit(numbers[NUMBERS * unit], numbers[NUMBERS * unit + NUMBERS - 1])
        for unit in range(0, line, WIDTH):
            transpose(tile.asked, unit, line, tile.queries, unit * COLUMNS + first, COLUMNS)
    tile.sums[:] = 0
    tile.highest[:] = LOWEST
    tile.total[:] = 0


@njit(nogil=True)
def see(tile: Any, keys: Any, values: Any, newest: int, count: int, width: int, scale: Any) -> None:
    """The `width` queries see the first `count` keys: the query in column x those up to number `newest` + x."""
    for start in range(0, count, BLOCK):
        block = min(BLOCK, count - start)
        rows, units = rows_of(block), units_of(block)
        multiply(keys, start * tile.units, tile.units, STEPS, rows, tile.queries, tile.units, width, tile.scores)
        for key in range(max(0, newest + 1 - start), block):
            tile.scores[key * COLUMNS : key * COLUMNS + min(width, start + key - newest)] = LOWEST
        for key in range(block, units * NUMBERS):
            tile.scores[key * COLUMNS : key * COLUMNS + width] = LOWEST
        _soften(tile, units, width, scale)
        begun = start // NUMBERS * tile.rows
        add_product(values, begun, STEPS, tile.rows * STEPS, tile.rows, tile.shares, units, width, tile.sums)


@njit(nogil=True)
def _soften(tile: Any, units: int, width: int, scale: Any) -> None:
    """A block's scores, times `scale`, become weights of the softmax over all that has been seen."""
    for lane in range(0, width, WIDTH):
        highest = load(tile.scores, lane)
        for key in range(1, NUMBERS * units):
            highest = larger(highest, load(tile.scores, key * COLUMNS + lane))
        before = load(tile.highest, lane)
        highest = larger(before, vectors.multiply(highest, fill(scale)))
        shrunk, less = two_to(vectors.subtract(before, highest)), vectors.subtract(fill(ZERO), highest)
        total = vectors.multiply(load(tile.total, lane), shrunk)
        for unit in range(units):
            at, to = NUMBERS * unit * COLUMNS + lane, unit * COLUMNS + lane
            total = vectors.add(total, _softened(tile.scores, tile.shares, at, to, fill(scale), less))
        store(tile.highest, lane, highest)
        store(tile.total, lane, total)
        for at in range(lane, tile.rows * COLUMNS, COLUMNS):
            store(tile.sums, at, vectors.multiply(load(tile.sums, at), shrunk))


@njit(nogil=True, error_model="numpy")
def answer(tile: Any, first: int, count: int, out: Any, at: int, stride: int, size: int, weight: Any) -> None:
    """What the queries `first` to `count` - 1 have seen, as bfloat16 from `at` on, and its log-sum-exp (natural); zeros
    and the lowest number for those before."""
    line = len(tile.told) // WIDTH
    for begun in range(0, count, WIDTH):
        for row in range(0, line, WIDTH):
            transpose(tile.sums, row * COLUMNS + begun, COLUMNS, tile.told, row, line)
        for lane in range(begun, min(count, begun + WIDTH)):
            here, is_seen = (lane - begun) * line, lane >= first
            numbers, sums = out[at + lane * stride : at + lane * stride + size], tile.told[here : here + size]
            share = np.float32(1) / tile.total[lane] if is_seen else ZERO
            for index in range(size):
                numbers[index] = narrowed(sums[index] * share)
            weight[lane] = tile.highest[lane] * LN_OF_2 + np.log(tile.total[lane]) if is_seen else np.float32(LOWEST)
