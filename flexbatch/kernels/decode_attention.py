"""Attention of one query a row to a bfloat16 cache on the CPU, at the rate at which memory gives the cache.

torch's own kernels are made for many queries: with one they read the cache at a third of that rate and less
(docs/benchmarks.md). Sums are float32 throughout. Numba compiles at the first call, and keeps it beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit

from flexbatch.kernels.flat_memory import flat
from flexbatch.kernels.floats import ARITHMETIC, LOWEST, widened
from flexbatch.kernels.row_softmax import room, weigh
from flexbatch.kernels.threads import take, take_turns
from flexbatch.kernels.vectors import prefetch

UNSEEN = -1e30  # a score with this added is none
MOST_QUERIES = 2  # to the same keys; with more of them torch's products are the faster way
LINE = 32  # numbers of a line of the processor's caches
SMALL = 1 << 17  # numbers of the cache; with fewer a second thread costs more than it brings


def suits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `decode_attention` takes these."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.shape[2] <= MOST_QUERIES
        and key.stride(3) == value.stride(3) == 1
        and (mask is None or mask.shape[1] == mask.shape[2] == 1)
    )


def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` bfloat16 `[rows, kv_heads, queries, head_dim]`, each of which sees all of `key` `[rows, kv_heads,
    columns, head_dim]` that `mask` `[rows or 1, 1, 1, columns]` allows (bool, or what to add to scores). The result is
    bfloat16 `[rows, kv_heads, queries, value_dim]`, with its log-sum-exp, float32 `[rows, kv_heads, queries]`. A row
    that may see nothing gets zeros and the lowest float32."""
    sources = flat(key), key.stride()[:3], flat(value), value.stride()[:3]
    return for_all_pairs(_attend, query, sources, key.shape[2], value.shape[3], mask, scale)


def for_all_pairs(
    kernel: Any,
    query: torch.Tensor,
    sources: Sequence[Any],
    columns: int,
    value_size: int,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `kernel(query, *sources, added, scale, output, weight, counter, threads)` makes of all pairs of a row and a
    head: attention of `query` to so many `columns` of keys and values, with its log-sum-exp, as `decode_attention` has
    it."""
    rows, heads, queries, size = query.shape
    output, weight = torch.empty(rows, heads, queries, value_size), torch.empty(rows, heads, queries)
    arguments = (
        query.float().contiguous().numpy(),
        *sources,
        added_scores(mask, rows, columns),
        np.float32(scale),
        output.numpy(),
        weight.numpy(),
    )
    threads = 1 if rows * heads * columns * size < SMALL else None
    take_turns(lambda counter, count: kernel(*arguments, counter, count), threads)
    return output.to(query.dtype), weight


def added_scores(mask: torch.Tensor | None, rows: int, columns: int) -> Any:
    """What `mask` `[rows or 1, 1, queries or 1, columns]` adds to scores, float32 `[rows * queries, columns]`."""
    if mask is None:
        return np.zeros((rows, columns), np.float32)
    allowed = mask[:, 0].expand(rows, -1, columns).reshape(-1, columns)
    if allowed.dtype == torch.bool:
        return torch.zeros(allowed.shape).masked_fill_(~allowed, LOWEST).numpy()
    return allowed.float().contiguous().numpy()


@njit(nogil=True, cache=True, fastmath=ARITHMETIC, error_model="numpy")
def _attend(
    query: Any,
    keys: Any,
    key_strides: Any,
    values: Any,
    value_strides: Any,
    added: Any,
    scale: Any,
    output: Any,
    weight: Any,
    counter: Any,
    threads: int,
) -> None:
    """Pairs of a row and a head that no other of the `threads` takes."""
    rows, heads, queries, size = query.shape
    columns, value_size = added.shape[1], output.shape[3]
    scores = room(columns)
    sums = np.empty(value_size, np.float32)
    pair = take(counter)
    while pair < rows * heads:
        row, head = pair // heads, pair % heads
        next_row, next_head = (pair + threads) // heads, (pair + threads) % heads
        start = 0
        while start < columns and added[row, start] <= UNSEEN:
            start += 1
        for number in range(queries):
            asked = query[row, head, number]
            highest = np.float32(LOWEST)
            for column in range(start, columns):
                at = row * key_strides[0] + head * key_strides[1] + column * key_strides[2]
                key = keys[at : at + size]
                # The values' turn comes when all keys are seen: until then memory would have nothing to do with them.
                ahead = row * value_strides[0] + head * value_strides[1] + column * value_strides[2]
                for line in range(0, value_size, LINE):
                    prefetch(values, ahead + line)
                score = np.float32(0)
                for index in range(size):
                    score += asked[index] * widened(key[index])
                scores[column] = score * scale + added[row, column]
                highest = max(highest, scores[column])
            total = weigh(scores, start, columns, highest)
            sums[:] = 0
            for column in range(start, columns):
                at = row * value_strides[0] + head * value_strides[1] + column * value_strides[2]
                value = values[at : at + value_size]
                ahead = next_row * key_strides[0] + next_head * key_strides[1] + column * key_strides[2]
                for line in range(0, size, LINE):
                    prefetch(keys, ahead + line)
                share = scores[column]
                for index in range(value_size):
                    sums[index] += share * widened(value[index])
            for index in range(value_size):
                output[row, head, number, index] = sums[index] / total if start < columns else np.float32(0)
            weight[row, head, number] = highest + np.log(total) if start < columns else np.float32(LOWEST)
        pair = take(counter)
