"""The engine's decisions, as pure functions of numbers: in which micro-batches, at which column."""

from __future__ import annotations

from collections.abc import Sequence

from flexbatch.plan.memory_need import MICRO_BATCH_TOKENS


def pack(lengths: Sequence[int], limit: int = MICRO_BATCH_TOKENS) -> list[list[int]]:
    """Indices of prompts grouped into micro-batches of at most `limit` padded tokens, longest first.

    A micro-batch is padded to its own longest row, so rows of like length share one. A row longer than `limit` is
    alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        widest = lengths[batches[-1][0]] if batches else 0
        if batches and widest * (len(batches[-1]) + 1) <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pack_alike(lengths: Sequence[int], limit: int = MICRO_BATCH_TOKENS) -> list[list[int]]:
    """The same without padding: rows of one length share a group of at most `limit` tokens, longest first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        if groups and lengths[groups[-1][0]] == length and length * (len(groups[-1]) + 1) <= limit:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def in_turn(sizes: Sequence[int], limit: int = MICRO_BATCH_TOKENS) -> list[slice]:
    """Consecutive sizes (tokens) in groups of at most `limit`; what is larger is alone."""
    groups: list[slice] = []
    total = 0
    for index, size in enumerate(sizes):
        if groups and total + size <= limit:
            groups[-1], total = slice(groups[-1].start, index + 1), total + size
        else:
            groups.append(slice(index, index + 1))
            total = size
    return groups


def oldest_column(end: int, lengths: Sequence[int]) -> int:
    """The first column that any live row of these cached lengths still needs, when the next token goes to `end`."""
    return end - max(lengths)
