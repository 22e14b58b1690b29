"""One tile of attention for a kernel: at most 64 queries of a head that see keys block by block, in one pass
(FlashAttention, arXiv 2205.14135, algorithm 1), on one thread of a CPU with AVX512-BF16.

A key's scores lie with the queries side by side, so nothing in the softmax goes across a vector. Two bfloat16 that are
multiplied together are a pair (vectors.py): two numbers of a query or key, or those of two keys' values. Logarithms
and powers are of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from flexbatch.kernels import vectors
from flexbatch.kernels.floats import LOWEST, narrowed
from flexbatch.kernels.pair_products import COLUMNS, ROWS, add_product, multiply
from flexbatch.kernels.vectors import WIDTH, fill, fused, in_pairs, larger, load, store, two_to

ZERO = np.float32(0)
LN_OF_2 = np.float32(0.6931471805599453)
BLOCK = 96
"""Keys at a time: their scores stay in the first cache."""


class Tile(NamedTuple):
    """What a thread works on, each with `COLUMNS` queries side by side: the queries' pairs `[head_dim / 2]`, a block's
    scores and its softmax weights' pairs, the sums of weighted values so far `[value_dim]`, and of the softmax so far
    the highest score, the sum of weights, and by how much the last block made earlier weights smaller."""

    queries: Any
    scores: Any
    shares: Any
    sums: Any
    highest: Any
    total: Any
    shrunk: Any


@njit(nogil=True)
def new_tile(size: int, value_size: int) -> Any:
    """For heads of these sizes; nothing is filled in."""
    return Tile(
        np.empty(size // 2 * COLUMNS, np.uint32),
        np.empty(BLOCK * COLUMNS, np.float32),
        np.empty(BLOCK // 2 * COLUMNS, np.uint32),
        np.empty(value_size * COLUMNS, np.float32),
        np.empty(COLUMNS, np.float32),
        np.empty(COLUMNS, np.float32),
        np.empty(COLUMNS, np.float32),
    )


@njit(nogil=True, inline="always")
def _pair(first: Any, second: Any) -> Any:
    return np.uint32(first) | np.uint32(second) << np.uint32(16)


@njit(nogil=True)
def gather_keys(source: Any, at: int, stride: int, count: int, size: int, out: Any) -> None:
    """`count` keys, a key's pairs side by side."""
    half = size // 2
    for key in range(count):
        numbers, pairs = source[at + key * stride : at + key * stride + size], out[key * half : (key + 1) * half]
        for index in range(half):
            pairs[index] = _pair(numbers[2 * index], numbers[2 * index + 1])


@njit(nogil=True)
def gather_values(source: Any, at: int, stride: int, count: int, size: int, out: Any) -> None:
    """`count` values, pairs of two keys' values side by side; beside the last of an odd number are zeros."""
    for key in range(0, count - 1, 2):
        here = at + key * stride
        first, second = source[here : here + size], source[here + stride : here + stride + size]
        pairs = out[key // 2 * size : (key // 2 + 1) * size]
        for index in range(size):
            pairs[index] = _pair(first[index], second[index])
    if count % 2:
        here = at + (count - 1) * stride
        first, pairs = source[here : here + size], out[count // 2 * size : (count // 2 + 1) * size]
        for index in range(size):
            pairs[index] = np.uint32(first[index])


@njit(nogil=True)
def begin(tile: Any, source: Any, at: int, stride: int, count: int, size: int) -> None:
    """`count` queries that have seen nothing yet; columns without one get zeros."""
    if count < COLUMNS:
        tile.queries[:] = 0
    for lane in range(count):
        numbers = source[at + lane * stride : at + lane * stride + size]
        for pair in range(size // 2):
            tile.queries[pair * COLUMNS + lane] = _pair(numbers[2 * pair], numbers[2 * pair + 1])
    tile.sums[:] = 0
    tile.highest[:] = LOWEST
    tile.total[:] = 0


@njit(nogil=True)
def see(tile: Any, keys: Any, values: Any, newest: int, count: int, width: int, scale: Any) -> None:
    """The `width` queries see the first `count` keys: the query in column x those up to number `newest` + x."""
    half, value_size = len(tile.queries) // COLUMNS, len(tile.sums) // COLUMNS
    for start in range(0, count, BLOCK):
        block = min(BLOCK, count - start)
        rows = (block + ROWS - 1) // ROWS * ROWS
        multiply(keys, start * half, half, 1, rows, tile.queries, half, width, tile.scores)
        for key in range(max(0, newest + 1 - start), block):
            tile.scores[key * COLUMNS : key * COLUMNS + min(width, start + key - newest)] = LOWEST
        if block % 2:
            tile.scores[block * COLUMNS : block * COLUMNS + width] = LOWEST
        _soften(tile, (block + 1) // 2, width, scale)
        add_product(
            values, start // 2 * value_size, 1, value_size, value_size, tile.shares, (block + 1) // 2, width, tile.sums
        )


@njit(nogil=True)
def _soften(tile: Any, pairs: int, width: int, scale: Any) -> None:
    """A block's scores, times `scale`, become weights of the softmax over all that has been seen."""
    for lane in range(0, width, WIDTH):
        highest = load(tile.scores, lane)
        for key in range(1, 2 * pairs):
            highest = larger(highest, load(tile.scores, key * COLUMNS + lane))
        before = load(tile.highest, lane)
        highest = larger(before, vectors.multiply(highest, fill(scale)))
        shrunk, less = two_to(vectors.subtract(before, highest)), vectors.subtract(fill(ZERO), highest)
        total = vectors.multiply(load(tile.total, lane), shrunk)
        for pair in range(pairs):
            at = 2 * pair * COLUMNS + lane
            first = two_to(fused(load(tile.scores, at), fill(scale), less))
            second = two_to(fused(load(tile.scores, at + COLUMNS), fill(scale), less))
            total = vectors.add(total, vectors.add(first, second))
            store(tile.shares, pair * COLUMNS + lane, in_pairs(first, second))
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
