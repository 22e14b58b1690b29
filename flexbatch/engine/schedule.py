"""The engine's decisions, as pure functions of numbers: in which micro-batches, at which column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexbatch.plan.memory_need import MICRO_BATCH_TOKENS, TOGETHER_TOKENS


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


def in_turn(sizes: Sequence[int], limit: int = TOGETHER_TOKENS) -> list[slice]:
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


# Attention of several queries a row takes so many columns, or a multiple (even_keys).
EVEN_KEYS = 32


@dataclass(frozen=True, slots=True)
class DecodePlaces:
    """The columns of a decode batch. Attention reads `first` to `end`; `newest` is where each row's newest token goes;
    behind it come guesses, `width` tokens in all for every row."""

    first: int
    end: int
    newest: tuple[int, ...]
    width: int

    @property
    def are_even(self) -> bool:
        """Whether every row has one token, in the same column."""
        return self.width == 1 and set(self.newest) == {self.end}


def decode_places(end: int, lengths: Sequence[int], lags: Sequence[int], width: int, columns: int) -> DecodePlaces:
    """For rows of these cached lengths in an arena of so many columns; the next token of those that do not lag goes to
    `end`."""
    newest = tuple(end - lag for lag in lags)
    first = min(column - length for column, length in zip(newest, lengths, strict=True))
    last = max(newest) + width - 1
    if width > 1:
        first -= min(first, -(last + 1 - first) % EVEN_KEYS)
        last += min(columns - 1 - last, -(last + 1 - first) % EVEN_KEYS)
    return DecodePlaces(first, last, newest, width)
