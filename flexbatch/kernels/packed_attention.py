"""Attention of one query a row to a packed cache on the CPU, which is read as it is kept: keys of 8 bits, values of 8
or 4.

A key's numbers are q * scale + minimum, by groups; so its product with a query is a sum of products with q for each
group, times the scale, and the minimum times the sum of the query's own numbers. Values likewise. Sums are float32
throughout, and nothing is rounded between the packed numbers and the result.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from flexbatch.kernels.decode_attention import UNSEEN, for_all_pairs
from flexbatch.kernels.flat_memory import flat
from flexbatch.kernels.floats import ARITHMETIC, LOWEST
from flexbatch.kernels.packed_numbers import (
    GROUP,
    converts_float16,
    load_bytes,
    load_high_halves,
    load_low_halves,
    widen_all,
)
from flexbatch.kernels.row_softmax import room, weigh
from flexbatch.kernels.threads import take
from flexbatch.kernels.vectors import WIDTH, add, fill, fused, load, multiply, prefetch, repeat, store, total

LINE = 64
"""Bytes of a line of the processor's caches."""

TOGETHER = 4
"""Columns of values that are added up at a time."""

Packed = tuple[torch.Tensor, ...]
"""Keys or values `[rows, kv_heads, columns, ...]`: uint8 numbers, float16 scales and minima `[..., groups]`, a head's
columns side by side. A byte holds a number of 8 bits, or one of 4 bits of the head's first half (low) and the one half
a head further on (high). Heads have whole groups; where values have 4 bits, whole pairs of them."""


class States(NamedTuple):
    """Keys or values for the kernel: numbers, scales and minima in memory, where a head's columns lie side by side, and
    the steps between rows, heads and columns of the numbers and of the others."""

    numbers: Any
    scales: Any
    minima: Any
    steps: tuple[int, ...]
    parameter_steps: tuple[int, ...]


class Head(NamedTuple):
    """The keys or values of a row and a head: the numbers from index `at` on, `width` bytes a column, and scales and
    minima as float32 `[columns * groups]`."""

    numbers: Any
    at: int
    width: int
    scales: Any
    minima: Any


def is_available() -> bool:
    """Whether this processor is one that the kernel is for."""
    return converts_float16()


def packed_attention(
    query: torch.Tensor, keys: Packed, values: Packed, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` `[rows, kv_heads, queries, head_dim]`, float32 or bfloat16, each of which sees all columns of `keys` that
    `mask` `[rows or 1, 1, 1, columns]` allows (bool, or what to add to scores). The result has the query's type,
    `[rows, kv_heads, queries, value_dim]`, with its log-sum-exp, float32 `[rows, kv_heads, queries]`. A row that may
    see nothing gets zeros and the lowest float32."""
    columns, value_size = keys[0].shape[2], values[1].shape[3] * GROUP
    return for_all_pairs(_attend, query, (_states(keys), _states(values)), columns, value_size, mask, scale)


def _states(packed: Packed) -> States:
    numbers, scales, minima = packed
    return States(flat(numbers), flat(scales), flat(minima), numbers.stride()[:3], scales.stride()[:3])


@njit(nogil=True, cache=True, fastmath=ARITHMETIC, error_model="numpy")
def _attend(
    query: Any, keys: Any, values: Any, added: Any, scale: Any, output: Any, weight: Any, counter: Any, threads: int
) -> None:
    """Pairs of a row and a head that no other of the `threads` takes."""
    rows, heads, queries, size = query.shape
    columns = added.shape[1]
    scores, sums = room(columns), np.empty(output.shape[3], np.float32)
    key_room, value_room = _parameter_room(columns, size), _parameter_room(columns, output.shape[3])
    pair = take(counter)
    while pair < rows * heads:
        row, head = pair // heads, pair % heads
        start = 0
        while start < columns and added[row, start] <= UNSEEN:
            start += 1
        own_keys, own_values = _head(keys, row, head, key_room), _head(values, row, head, value_room)
        following = _place(keys, (pair + threads) // heads, (pair + threads) % heads)
        for number in range(queries):
            told = output[row, head, number]
            highest = _score(query[row, head, number], own_keys, own_values, scale, added[row], start, scores)
            all_shares = weigh(scores, start, columns, highest)
            if own_values.width == len(sums):
                _sum_bytes(own_values, scores, start, columns, keys, following, sums)
            else:
                _sum_halves(own_values, scores, start, columns, keys, following, sums)
            for index in range(len(sums)):
                told[index] = sums[index] / all_shares if start < columns else np.float32(0)
            weight[row, head, number] = highest + np.log(all_shares) if start < columns else np.float32(LOWEST)
        pair = take(counter)


@njit(nogil=True, inline="always")
def _place(states: Any, row: int, head: int) -> Any:
    return row * states.steps[0] + head * states.steps[1]


@njit(nogil=True)
def _parameter_room(columns: int, size: int) -> Any:
    """For the scales and the minima of one head."""
    return np.empty(columns * (size // GROUP), np.float32), np.empty(columns * (size // GROUP), np.float32)


@njit(nogil=True)
def _head(states: Any, row: int, head: int, parameters: Any) -> Any:
    scales, minima = parameters
    at = row * states.parameter_steps[0] + head * states.parameter_steps[1]
    widen_all(states.scales, at, len(scales), scales)
    widen_all(states.minima, at, len(minima), minima)
    return Head(states.numbers, _place(states, row, head), states.steps[2], scales, minima)


@njit(nogil=True, fastmath=ARITHMETIC)
def _score(asked: Any, keys: Any, values: Any, scale: Any, added: Any, start: int, scores: Any) -> Any:
    """The scores from column `start` on; gives the highest. Asks for the values meanwhile, whose turn comes when all
    keys are seen: until then memory would have nothing to do with them."""
    groups, highest = len(asked) // GROUP, np.float32(LOWEST)
    for column in range(start, len(added)):
        for line in range(0, values.width, LINE):
            prefetch(values.numbers, values.at + column * values.width + line)
        at, sums = keys.at + column * keys.width, fill(np.float32(0))
        for group in range(groups):
            here, other, parameter = group * GROUP, group * GROUP + WIDTH, column * groups + group
            one, two = load(asked, here), load(asked, other)
            products = multiply(one, load_bytes(keys.numbers, at + here))
            products = fused(two, load_bytes(keys.numbers, at + other), products)
            sums = fused(products, repeat(keys.scales, parameter), sums)
            sums = fused(add(one, two), repeat(keys.minima, parameter), sums)
        score = total(sums) * scale + added[column]
        scores[column] = score
        highest = max(highest, score)
    return highest


@njit(nogil=True, fastmath=ARITHMETIC)
def _sum_bytes(values: Any, shares: Any, start: int, columns: int, keys: Any, following: int, sums: Any) -> None:
    """The sum of the values from column `start` on by their shares; asks meanwhile for the next head's keys, which
    begin at `following`. Four columns at a time: beyond the last one it is that one again, with next to no share."""
    sums[:] = 0
    groups = len(sums) // GROUP
    for column in range(start, columns, TOGETHER):
        these = _four(column, columns)
        _ask(keys, following, these)
        for group in range(groups):
            factors, lowest = _factors(values, shares, column, these, group, groups)
            _add(load_bytes, values, these, group * GROUP, factors, lowest, sums, group * GROUP)


@njit(nogil=True, fastmath=ARITHMETIC)
def _sum_halves(values: Any, shares: Any, start: int, columns: int, keys: Any, following: int, sums: Any) -> None:
    """The same of values of four bits, of which a byte has one of the head's first half, and one of its second."""
    sums[:] = 0
    groups = len(sums) // GROUP
    for column in range(start, columns, TOGETHER):
        these = _four(column, columns)
        _ask(keys, following, these)
        for group in range(groups // 2):
            factors, lowest = _factors(values, shares, column, these, group, groups)
            _add(load_low_halves, values, these, group * GROUP, factors, lowest, sums, group * GROUP)
            other = groups // 2 + group
            factors, lowest = _factors(values, shares, column, these, other, groups)
            _add(load_high_halves, values, these, group * GROUP, factors, lowest, sums, other * GROUP)


@njit(nogil=True, inline="always")
def _four(column: int, columns: int) -> Any:
    return column, min(column + 1, columns - 1), min(column + 2, columns - 1), min(column + 3, columns - 1)


@njit(nogil=True, inline="always")
def _ask(keys: Any, at: int, these: Any) -> None:
    """For the keys of these columns of a head."""
    for column in these:
        for line in range(0, keys.steps[2], LINE):
            prefetch(keys.numbers, at + column * keys.steps[2] + line)


@njit(nogil=True, inline="always")
def _factors(values: Any, shares: Any, column: int, these: Any, group: int, groups: int) -> Any:
    """What a group's packed numbers in four columns are multiplied by, and the sum of what is added to them."""
    one, two = repeat(shares, column), repeat(shares, column + 1)
    three, four = repeat(shares, column + 2), repeat(shares, column + 3)
    first, second = these[0] * groups + group, these[1] * groups + group
    third, fourth = these[2] * groups + group, these[3] * groups + group
    lowest = multiply(one, repeat(values.minima, first))
    lowest = fused(two, repeat(values.minima, second), lowest)
    lowest = fused(three, repeat(values.minima, third), lowest)
    lowest = fused(four, repeat(values.minima, fourth), lowest)
    factors = (
        multiply(one, repeat(values.scales, first)),
        multiply(two, repeat(values.scales, second)),
        multiply(three, repeat(values.scales, third)),
        multiply(four, repeat(values.scales, fourth)),
    )
    return factors, lowest


@njit(nogil=True, inline="always")
def _add(read: Any, values: Any, these: Any, offset: int, factors: Any, lowest: Any, sums: Any, to: int) -> None:
    """One group of four columns, whose packed numbers `read` finds from byte `offset` of a column on."""
    numbers, at, width = values.numbers, values.at + offset, values.width
    for half in range(0, GROUP, WIDTH):
        added = add(load(sums, to + half), lowest)
        added = fused(factors[0], read(numbers, at + half + these[0] * width), added)
        added = fused(factors[1], read(numbers, at + half + these[1] * width), added)
        added = fused(factors[2], read(numbers, at + half + these[2] * width), added)
        added = fused(factors[3], read(numbers, at + half + these[3] * width), added)
        store(sums, to + half, added)
