"""One tile of attention for a kernel: at most 64 queries of a head that see keys block by block, in one pass
(FlashAttention, arXiv 2205.14135, algorithm 1), on one thread of a CPU with AVX512-BF16 or AVX2.

A key's scores lie with the queries side by side, so nothing in the softmax goes across a vector. Numbers are multiplied
in units (small_products.py). Where a unit is a pair of bfloat16, these are two numbers of a query or key, or those of
two keys' values. Logarithms and powers are of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from flexbatch.kernels import vectors
from flexbatch.kernels.floats import LOWEST, narrowed, widened
from flexbatch.kernels.small_products import COLUMNS, NUMBERS, ROWS, add_product, multiply
from flexbatch.kernels.vectors import WIDTH, fill, fused, in_pairs, larger, load, store, two_to

ZERO = np.float32(0)
LN_OF_2 = np.float32(0.6931471805599453)
BLOCK = 96
"""Keys at a time: their scores stay in the first cache."""


class Tile(NamedTuple):
    """What a thread works on, each with `COLUMNS` queries side by side: the queries' units `[head_dim / NUMBERS]`, a
    block's scores and its softmax weights' units, the sums of weighted values so far `[value_dim]`, and of the softmax
    so far the highest score, the sum of weights, and by how much the last block made earlier weights smaller."""

    queries: Any
    scores: Any
    shares: Any
    sums: Any
    highest: Any
    total: Any
    shrunk: Any


UNIT = np.uint32 if NUMBERS == 2 else np.float32
"""The type that holds a unit."""


@njit(nogil=True)
def new_tile(size: int, value_size: int) -> Any:
    """For heads of these sizes; nothing is filled in."""
    return Tile(
        np.empty(size // NUMBERS * COLUMNS, UNIT),
        np.empty(BLOCK * COLUMNS, np.float32),
        np.empty(BLOCK // NUMBERS * COLUMNS, UNIT),
        np.empty(value_size * COLUMNS, np.float32),
        np.empty(COLUMNS, np.float32),
        np.empty(COLUMNS, np.float32),
        np.empty(COLUMNS, np.float32),
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
    half = size // NUMBERS
    for key in range(count):
        numbers, units = source[at + key * stride : at + key * stride + size], out[key * half : (key + 1) * half]
        for index in range(half):
            units[index] = _unit(numbers[NUMBERS * index], numbers[NUMBERS * index + NUMBERS - 1])


@njit(nogil=True)
def gather_values(source: Any, at: int, stride: int, count: int, size: int, out: Any) -> None:
    """`count` values, a unit of one or two keys' values; beside the last of an odd number of keys are zeros."""
    whole = count // NUMBERS
    for unit in range(whole):
        here = at + unit * NUMBERS * stride
        there = here + (NUMBERS - 1) * stride
        first, second, units = source[here : here + size], source[there : there + size], out[unit * size :]
        for index in range(size):
            units[index] = _unit(first[index], second[index])
    if count > whole * NUMBERS:
        here = at + (count - 1) * stride
        first, units = source[here : here + size], out[whole * size :]
        for index in range(size):
            units[index] = _unit(first[index], np.uint16(0))


@njit(nogil=True)
def begin(tile: Any, source: Any, at: int, stride: int, count: int, size: int) -> None:
    """`count` queries that have seen nothing yet; columns without one get zeros."""
    if count < COLUMNS:
        tile.queries[:] = 0
    for lane in range(count):
        numbers = source[at + lane * stride : at + lane * stride + size]
        for unit in range(size // NUMBERS):
            here = NUMBERS * unit
            tile.queries[unit * COLUMNS + lane] = _unit(numbers[here], numbers[here + NUMBERS - 1])
    tile.sums[:] = 0
    tile.highest[:] = LOWEST
    tile.total[:] = 0


@njit(nogil=True)
def see(tile: Any, keys: Any, values: Any, newest: int, count: int, width: int, scale: Any) -> None:
    """The `width` queries see the first `count` keys: the query in column x those up to number `newest` + x."""
    half, value_size = len(tile.queries) // COLUMNS, len(tile.sums) // COLUMNS
    for start in range(0, count, BLOCK):
        block = min(BLOCK, count - start)
        rows, units = (block + ROWS - 1) // ROWS * ROWS, (block + NUMBERS - 1) // NUMBERS
        multiply(keys, start * half, half, 1, rows, tile.queries, half, width, tile.scores)
        for key in range(max(0, newest + 1 - start), block):
            tile.scores[key * COLUMNS : key * COLUMNS + min(width, start + key - newest)] = LOWEST
        if units * NUMBERS > block:
            tile.scores[block * COLUMNS : block * COLUMNS + width] = LOWEST
        _soften(tile, units, width, scale)
        begun = start // NUMBERS * value_size
        add_product(values, begun, 1, value_size, value_size, tile.shares, units, width, tile.sums)


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
        for at in range(lane, len(tile.sums), COLUMNS):
            store(tile.sums, at, vectors.multiply(load(tile.sums, at), shrunk))


@njit(nogil=True, error_model="numpy")
def answer(tile: Any, first: int, count: int, out: Any, at: int, stride: int, weight: Any) -> None:
    """What the queries `first` to `count` - 1 have seen, as bfloat16 from `at` on, and its log-sum-exp (natural); zeros
    and the lowest number for those before."""
    size = len(tile.sums) // COLUMNS
    for lane in range(count):
        numbers, is_seen = out[at + lane * stride : at + lane * stride + size], lane >= first
        share = np.float32(1) / tile.total[lane] if is_seen else ZERO
        for index in range(size):
            numbers[index] = narrowed(tile.sums[index * COLUMNS + lane] * share)
        weight[lane] = tile.highest[lane] * LN_OF_2 + np.log(tile.total[lane]) if is_seen else np.float32(LOWEST)
