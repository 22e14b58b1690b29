"""Attention of one or a few queries a row to a compressed cache on the CPU, which is read as it is kept.

Sums are float32 throughout. Exceptions are zero in the sums over all numbers, and are added by themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

from flexbatch.kernels.compressed_states import BLOCK, LISTED_BYTES, Compressed, block_words, every, joined
from flexbatch.kernels.decode_attention import UNSEEN, for_all_pairs
from flexbatch.kernels.flat_memory import flat
from flexbatch.kernels.floats import ARITHMETIC, LOWEST, widened
from flexbatch.kernels.row_softmax import room, weigh
from flexbatch.kernels.threads import take
from flexbatch.kernels.vectors import (
    FLOATS,
    PAIRS,
    WIDTH,
    add,
    fill,
    floats,
    fused,
    load,
    memory_of,
    prefetch,
    repeat,
    store,
    total,
)

LINE = 64
"""Bytes of a line of the processor's caches."""


class States(NamedTuple):
    """Keys or values for the kernel: codes and exceptions in memory, the steps between rows, heads and columns of the
    former, and between rows and columns of the latter."""

    codes: Any
    exceptions: Any
    steps: tuple[int, ...]
    exception_steps: tuple[int, ...]


def compressed_attention(
    query: torch.Tensor, keys: Compressed, values: Compressed, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` `[rows, kv_heads, queries, head_dim]`, float32 or bfloat16, each of which sees the columns of `keys` that
    `mask` `[rows or 1, 1, queries or 1, columns]` allows (bool, or what to add to scores). The result has the query's
    type, `[rows, kv_heads, queries, value_dim]`, with its log-sum-exp, float32 `[rows, kv_heads, queries]`. A query
    that may see nothing gets zeros and the lowest float32."""
    columns, value_size = keys[0].shape[2], values[0].shape[3] * 2 // 3
    return for_all_pairs(_attend, query, (_states(keys), _states(values)), columns, value_size, mask, scale)


def _states(compressed: Compressed) -> States:
    codes, exceptions = compressed
    return States(flat(codes), flat(exceptions), codes.stride()[:3], (exceptions.stride(0), exceptions.stride(2)))


def _block(_context: Any, codes: Any, rest_at: Any, code_at: Any, highest: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = memory_of(context, builder, signature.args[0], arguments[0])
        made = []
        for words in block_words(builder, memory, *arguments[1:]):
            pairs = builder.bitcast(words, PAIRS)
            even = builder.shl(pairs, every(PAIRS, 16))
            odd = builder.and_(pairs, every(PAIRS, 0xFFFF0000))
            made += [builder.bitcast(each, FLOATS) for each in (even, odd)]
        return context.make_tuple(builder, signature.return_type, made)

    return types.UniTuple(floats, 4)(codes, rest_at, code_at, highest), generate  # type: ignore[no-untyped-call]


block: Any = intrinsic(_block)
"""The 64 numbers of signs and mantissas and codes from two indices on, and the largest exponent: those of the first
half with even indices, those with odd ones, and the same of the second half."""


@njit(nogil=True)
def _sort(numbers: Any, sorted_numbers: Any) -> None:
    """In the order of `block`."""
    for place in range(len(numbers)):
        sorted_numbers[place] = numbers[_index(place)]


@njit(nogil=True, inline="always")
def _index(place: int) -> int:
    """Of the number that `block` has at this place."""
    return place // 32 * 32 + place % 16 * 2 + place % 32 // 16


@njit(nogil=True, cache=True, fastmath=ARITHMETIC, error_model="numpy")
def _attend(
    query: Any, keys: Any, values: Any, added: Any, scale: Any, output: Any, weight: Any, counter: Any, threads: int
) -> None:
    """Pairs of a row and a head that no other of the `threads` takes. `added` has for each row one mask, or one a
    query."""
    rows, heads, queries, size = query.shape
    columns, masks = added.shape[1], len(added) // rows
    scores = np.empty((queries, len(room(columns))), np.float32)
    sums, asked = np.empty((queries, output.shape[3]), np.float32), np.empty((queries, size), np.float32)
    key_listing, value_listing = _listing_room(keys, columns), _listing_room(values, columns)
    listed_row, key_count, value_count = -1, 0, 0
    pair = take(counter)
    while pair < rows * heads:
        row, head = pair // heads, pair % heads
        own = added[row * masks : (row + 1) * masks]
        for each in range(queries):
            _sort(query[row, head, each], asked[each])
        start = _first_seen(own)
        stop = _after_last_seen(own, start)
        keys_at, values_at = _place(keys, row, head), _place(values, row, head)
        scores[:] = 0
        sums[:] = 0
        if row != listed_row:
            key_count = _list_exceptions(keys, row, start, stop, size, key_listing)
            value_count = _list_exceptions(values, row, start, stop, sums.shape[1], value_listing)
            listed_row = row
        _add_exceptional_keys(keys, row, head, key_listing, key_count, query[row, head], scores)
        if queries == 1:
            _score(asked[0], keys, keys_at, values, values_at, start, stop, scores[0])
        else:
            _score_all(asked, keys, keys_at, values, values_at, start, stop, scores)
        for each in range(queries):
            weight[row, head, each] = _weigh(scores[each], own[each % masks], start, stop, scale)
        following = _place(keys, (pair + threads) // heads, (pair + threads) % heads)
        if queries == 1:
            _sum(values, values_at, scores[0], start, stop, keys, following, sums[0])
        else:
            _sum_all(values, values_at, scores, start, stop, keys, following, sums)
        told = output[row, head]
        for each in range(queries):
            for place in range(told.shape[1]):
                told[each, _index(place)] = sums[each, place]
        _add_exceptional_values(values, row, head, value_listing, value_count, scores, told)
        pair = take(counter)


@njit(nogil=True)
def _first_seen(added: Any) -> Any:
    """The first column that one of the queries sees."""
    for column in range(added.shape[1]):
        if _is_seen(added, column):
            return column
    return added.shape[1]


@njit(nogil=True)
def _after_last_seen(added: Any, start: int) -> Any:
    """The column behind the last one that one of the queries sees; none is seen before `start`."""
    for column in range(added.shape[1] - 1, start - 1, -1):
        if _is_seen(added, column):
            return column + 1
    return start


@njit(nogil=True, inline="always")
def _is_seen(added: Any, column: int) -> Any:
    is_seen = False
    for each in range(len(added)):
        is_seen |= not added[each, column] <= UNSEEN
    return is_seen


@njit(nogil=True, inline="always")
def _place(states: Any, row: int, head: int) -> Any:
    return row * states.steps[0] + head * states.steps[1]


@njit(nogil=True, inline="always")
def _ask(states: Any, at: int, width: int) -> None:
    """For the codes of a column."""
    for line in range(0, width, LINE):
        prefetch(states.codes, at + line)


@njit(nogil=True, fastmath=ARITHMETIC)
def _score(asked: Any, keys: Any, at: int, values: Any, values_at: int, start: int, columns: int, scores: Any) -> None:
    """Adds the products with all keys from column `start` on. Asks for the values meanwhile, whose turn comes when all
    keys are seen: until then memory would have nothing to do with them."""
    size, codes = len(asked), keys.codes
    for column in range(start, columns):
        _ask(values, values_at + column * values.steps[2], values.steps[2])
        own = at + column * keys.steps[2]
        highest, sums, others = codes[own + size + size // 2], fill(np.float32(0)), fill(np.float32(0))
        for index in range(0, size, BLOCK):
            one, two, three, four = block(codes, own + index, own + size + index // 2, highest)
            sums = fused(load(asked, index), one, sums)
            others = fused(load(asked, index + WIDTH), two, others)
            sums = fused(load(asked, index + 2 * WIDTH), three, sums)
            others = fused(load(asked, index + 3 * WIDTH), four, others)
        scores[column] += total(add(sums, others))


@njit(nogil=True, inline="always")
def _expand_column(states: Any, at: int, numbers: Any) -> None:
    """A head's column whose codes begin at `at`, but for its exceptions."""
    size, codes = len(numbers), states.codes
    highest = codes[at + size + size // 2]
    for index in range(0, size, BLOCK):
        one, two, three, four = block(codes, at + index, at + size + index // 2, highest)
        store(numbers, index, one)
        store(numbers, index + WIDTH, two)
        store(numbers, index + 2 * WIDTH, three)
        store(numbers, index + 3 * WIDTH, four)


@njit(nogil=True, fastmath=ARITHMETIC)
def _score_all(
    asked: Any, keys: Any, at: int, values: Any, values_at: int, start: int, columns: int, scores: Any
) -> None:
    """The same for several queries."""
    queries, size = asked.shape
    numbers = np.empty(size, np.float32)
    for column in range(start, columns):
        _ask(values, values_at + column * values.steps[2], values.steps[2])
        _expand_column(keys, at + column * keys.steps[2], numbers)
        for each in range(queries):
            sums, mine = fill(np.float32(0)), asked[each]
            for index in range(0, size, WIDTH):
                sums = fused(load(mine, index), load(numbers, index), sums)
            scores[each, column] += total(sums)


@njit(nogil=True, fastmath=ARITHMETIC)
def _sum(values: Any, at: int, shares: Any, start: int, columns: int, keys: Any, following: int, sums: Any) -> None:
    """Adds the values from column `start` on by their shares; asks meanwhile for the next head's keys, which begin at
    `following`. Two columns at a time: beyond the last one it is that one again, with next to no share."""
    size, codes, width = len(sums), values.codes, values.steps[2]
    for column in range(start, columns, 2):
        other = min(column + 1, columns - 1)
        _ask(keys, following + column * keys.steps[2], 2 * keys.steps[2])
        first, second = at + column * width, at + other * width
        share, other_share = repeat(shares, column), repeat(shares, column + 1)
        highest, other_highest = codes[first + size + size // 2], codes[second + size + size // 2]
        for index in range(0, size, BLOCK):
            these = block(codes, first + index, first + size + index // 2, highest)
            others = block(codes, second + index, second + size + index // 2, other_highest)
            for part in range(4):
                place = index + part * WIDTH
                added = fused(share, these[part], load(sums, place))
                store(sums, place, fused(other_share, others[part], added))


@njit(nogil=True, fastmath=ARITHMETIC)
def _sum_all(values: Any, at: int, shares: Any, start: int, columns: int, keys: Any, following: int, sums: Any) -> None:
    """The same for several queries."""
    queries, size = sums.shape
    numbers = np.empty(size, np.float32)
    for column in range(start, columns):
        _ask(keys, following + column * keys.steps[2], keys.steps[2])
        _expand_column(values, at + column * values.steps[2], numbers)
        for each in range(queries):
            mine, share = sums[each], fill(shares[each, column])
            for index in range(0, size, WIDTH):
                store(mine, index, fused(share, load(numbers, index), load(mine, index)))


@njit(nogil=True)
def _weigh(scores: Any, added: Any, start: int, columns: int, scale: Any) -> Any:
    """Makes products their shares of the softmax; its log-sum-exp. All are zero where nothing may be seen."""
    highest = np.float32(LOWEST)
    for column in range(start, columns):
        scores[column] = scores[column] * scale + added[column]
        highest = max(highest, scores[column])
    if highest <= UNSEEN:
        scores[:] = 0
        return np.float32(LOWEST)
    shares = weigh(scores, start, columns, highest)
    inverse = np.float32(1) / shares
    for column in range(start, columns):
        scores[column] *= inverse
    return highest + np.log(shares)


@njit(nogil=True, inline="always")
def _listing_room(states: Any, columns: int) -> Any:
    """For the exceptions of one row."""
    return np.empty((columns * (states.exception_steps[1] // LISTED_BYTES), 2), np.int32)


@njit(nogil=True)
def _list_exceptions(states: Any, row: int, start: int, columns: int, size: int, listing: Any) -> int:
    """Lists the columns of a row's exceptions from column `start` on, and where each is told; how many there are. That
    is done once for all heads: their counts lie far apart. A column that nothing sees may hold anything."""
    count, places, exceptions = 0, states.exception_steps[1] // LISTED_BYTES, states.exceptions
    for column in range(start, columns):
        at = _told(states, row, column, 0)
        for each in range(min(exceptions[at], places)):
            place = 1 + LISTED_BYTES * each
            if exceptions[at + place + 1] < size:
                listing[count, 0], listing[count, 1] = column, place
                count += 1
    return count


@njit(nogil=True, inline="always")
def _told(states: Any, row: int, column: int, place: int) -> Any:
    """Where a listed exception's head is told; behind it are its index and its exponent."""
    return row * states.exception_steps[0] + column * states.exception_steps[1] + place


@njit(nogil=True, inline="always")
def _exception(states: Any, row: int, head: int, column: int, told: int) -> Any:
    """The index of a head's exception, and the number."""
    index, at = states.exceptions[told + 1], _place(states, row, head) + column * states.steps[2]
    return index, widened(joined(states.codes[at + index], states.exceptions[told + 2]))


@njit(nogil=True)
def _add_exceptional_keys(keys: Any, row: int, head: int, listing: Any, count: int, asked: Any, scores: Any) -> None:
    """Adds the products with a head's exceptions, whose codes stand for zero."""
    for column, place in listing[:count]:
        told = _told(keys, row, column, place)
        if keys.exceptions[told] == head:
            index, key = _exception(keys, row, head, column, told)
            for query in range(len(asked)):
                scores[query, column] += asked[query, index] * key


@njit(nogil=True)
def _add_exceptional_values(values: Any, row: int, head: int, listing: Any, count: int, shares: Any, sums: Any) -> None:
    """The same of the values by their shares."""
    for column, place in listing[:count]:
        told = _told(values, row, column, place)
        if values.exceptions[told] == head:
            index, value = _exception(values, row, head, column, told)
            for query in range(len(sums)):
                sums[query, index] += shares[query, column] * value
