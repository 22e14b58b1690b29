"""Attention of many queries to bfloat16 keys on a CPU with AMX or AVX512-BF16, or with AVX2 and no bfloat16: to keys
that all rows share and to each row's own, in one softmax.

torch's kernel multiplies at a quarter of the processor's rate here, computes what is masked, and has to be asked once
for shared keys and once for own ones (docs/benchmarks.md). Scores, sums and the softmax are float32; for the product
with the values the softmax's weights are rounded to bfloat16 where the processor multiplies that, as in torch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from flexbatch.kernels import small_products, widened_products
from flexbatch.kernels.aligned_memory import aligned
from flexbatch.kernels.flat_memory import flat
from flexbatch.kernels.floats import LOG2_OF_E
from flexbatch.kernels.online_softmax import (
    UNIT,
    answer,
    ask_for,
    begin,
    gather_keys,
    gather_values,
    new_tile,
    rows_of,
    see,
    units_of,
)
from flexbatch.kernels.result_memory import result
from flexbatch.kernels.small_products import COLUMNS
from flexbatch.kernels.threads import take, take_turns
from flexbatch.kernels.vectors import WIDTH, multiplies_pairs

SMALL = 1 << 22  # products of two numbers; with fewer a second thread costs more than it brings
SIZES = 8
"""Sizes of heads are multiples of it."""
SHARES = 8
"""Pieces of work for a thread, where there are so many: one that takes longer then matters little."""

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class Source(NamedTuple):
    """Keys and values of `columns` for the kernel, in memory with strides of rows, heads and columns."""

    keys: Any
    key_strides: tuple[int, ...]
    values: Any
    value_strides: tuple[int, ...]
    columns: int


def is_available() -> bool:
    """Whether this processor is one that the kernel is for."""
    return multiplies_pairs() or widened_products.suit(torch.bfloat16)


def suits(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `prefill_attention` takes these."""
    return (
        query.device.type == "cpu"
        and query.dtype == keys.dtype == values.dtype == torch.bfloat16
        and query.shape[3] % SIZES == values.shape[3] % SIZES == 0
        and query.stride(3) == keys.stride(3) == values.stride(3) == 1
        and is_available()
    )


def prefill_attention(
    query: torch.Tensor, shared: KeysAndValues, own: KeysAndValues, starts: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` bfloat16 `[rows, heads, tokens, head_dim]` to `shared` keys and values `[1, kv_heads, columns, head_dim]`
    and to each row's `own` `[rows, kv_heads, columns, head_dim]`, whose last columns are the queries' own tokens;
    either may have no columns. A query sees all that is shared, and of its row's own the columns from `starts[row]`
    (int64 `[rows]`) up to its own.

    The result is bfloat16 `[rows, heads, tokens, value_dim]`, in memory a token's heads side by side, with its
    log-sum-exp, float32 `[rows, heads, tokens]`. A query that sees nothing gets zeros and the lowest float32.
    """
    rows, heads, tokens, size = query.shape
    kv_heads, value_size = own[1].shape[1], own[1].shape[3]
    output = result((rows, tokens, heads, value_size), query.dtype).transpose(1, 2)
    weight = torch.empty(rows, heads, tokens)
    threads = 1 if query.numel() * (shared[0].shape[2] + own[0].shape[2]) < SMALL else torch.get_num_threads()
    arguments = (
        *(flat(query), query.stride()[:3], _source(*shared), _source(*own), starts.numpy()),
        (rows, kv_heads, heads // kv_heads, tokens, size, value_size),
        _division(rows, kv_heads, heads // kv_heads, threads, together=shared[0].shape[2] > 0),
        np.float32(scale) * LOG2_OF_E,
        *(flat(output), output.stride()[:3], weight.numpy()),
        small_products.MARK,
    )
    take_turns(lambda counter, _threads: _attend(*arguments, counter), threads)
    return output, weight


def _source(keys: torch.Tensor, values: torch.Tensor) -> Source:
    if keys.shape[2] == 0:
        nothing = np.zeros(1, np.uint16)
        return Source(nothing, (0, 0, 0), nothing, (0, 0, 0), 0)
    return Source(flat(keys), keys.stride()[:3], flat(values), values.stride()[:3], keys.shape[2])


def _division(rows: int, kv_heads: int, group: int, threads: int, *, together: bool) -> tuple[int, int]:
    """Into how many pieces of work the rows, and the query heads of a KV head, are divided. Each gathers the keys that
    it sees, so rows that share some stay `together` where there are heads enough."""
    wanted = -(-SHARES * threads // kv_heads)
    row_pieces = min(rows, wanted) if together else rows
    return row_pieces, min(group, -(-wanted // row_pieces))


@njit(nogil=True, cache=True, error_model="numpy")
def _attend(
    query: Any,
    query_strides: Any,
    shared: Any,
    own: Any,
    starts: Any,
    shape: Any,
    division: Any,
    scale: Any,
    output: Any,
    output_strides: Any,
    weight: Any,
    _mark: Any,
    counter: Any,
) -> None:
    """Pieces of work that no other thread takes."""
    rows, kv_heads, group, tokens, size, value_size = shape
    row_pieces, head_pieces = division
    shared_keys, shared_values = _room(shared.columns, size, value_size)
    own_keys, own_values = _room(own.columns, size, value_size)
    tile = new_tile(size, value_size)
    small_products.begin()
    piece = take(counter)
    while piece < kv_heads * row_pieces * head_pieces:
        kv_head, row_piece = piece % kv_heads, piece // kv_heads % row_pieces
        heads = _share(group, piece // kv_heads // row_pieces, head_pieces)
        _gather(shared, 0, kv_head, 0, size, value_size, shared_keys, shared_values)
        for row in _share(rows, row_piece, row_pieces):
            _gather(own, row, kv_head, starts[row], size, value_size, own_keys, own_values)
            for head in heads:
                head = kv_head * group + head
                asked = row * query_strides[0] + head * query_strides[1]
                told = row * output_strides[0] + head * output_strides[1]
                for token in range(0, tokens, COLUMNS):
                    count, newest = min(COLUMNS, tokens - token), own.columns - starts[row] - tokens + token
                    width = (count + WIDTH - 1) // WIDTH * WIDTH
                    begin(tile, query, asked + token * query_strides[2], query_strides[2], count, size)
                    at = told + token * output_strides[2]
                    ask_for(output, at, output_strides[2], count, value_size)
                    after = asked + (token + COLUMNS) * query_strides[2]
                    ask_for(query, after, query_strides[2], min(COLUMNS, tokens - token - COLUMNS), size)
                    see(tile, shared_keys, shared_values, shared.columns, shared.columns, width, scale)
                    see(tile, own_keys, own_values, newest, newest + count, width, scale)
                    unseen = 0 if shared.columns else max(0, -newest)
                    here = weight[row, head, token : token + count]
                    answer(tile, unseen, count, output, at, output_strides[2], value_size, here)
        piece = take(counter)
    small_products.end()


@njit(nogil=True)
def _room(count: int, size: int, value_size: int) -> Any:
    """Memory for so many keys' and values' units, in whole products."""
    keys, values = aligned(rows_of(count) * units_of(size)), aligned(units_of(count) * rows_of(value_size))
    return keys.view(UNIT), values.view(UNIT)


@njit(nogil=True)
def _gather(source: Any, row: int, head: int, start: int, size: int, value_size: int, keys: Any, values: Any) -> None:
    """Columns from `start` on."""
    strides, count = source.key_strides, source.columns - start
    at = row * strides[0] + head * strides[1] + start * strides[2]
    gather_keys(source.keys, at, strides[2], count, size, keys)
    strides = source.value_strides
    at = row * strides[0] + head * strides[1] + start * strides[2]
    gather_values(source.values, at, strides[2], count, value_size, values)


@njit(nogil=True)
def _share(count: int, number: int, pieces: int) -> Any:
    return range(count * number // pieces, count * (number + 1) // pieces)
