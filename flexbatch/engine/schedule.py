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


def oldest_column(end: int, lengths: Sequence[int]) -> int:
    """The first column that any live row of these cached lengths still needs, when the next token goes to `end`."""
    return end - max(lengths)
