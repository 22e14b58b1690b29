"""What belongs to keys on their way from the cache to attention.

The cache's `update` hands keys to the attention function through the model's own forward. What belongs to them
(prefixes before them, the other tiers' keys, which rows they are of) they carry along as an attribute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import CacheLayerMixin

from flexbatch.engine.kv_form import Attend, Parts


@dataclass(frozen=True, slots=True)
class SharedKeys:
    """A prefix's keys and values `[1, kv_heads, tokens, head_dim]` and the rows of the batch that have it."""

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """The keys and values `[rows, kv_heads, columns, head_dim]` of some of the batch's rows, on any device. So many of
    the batch's columns come `before` a row's first one here, which are behind its last one then; None: none."""

    keys: torch.Tensor
    values: torch.Tensor
    rows: slice
    before: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class PackedKeys:
    """The same as they are kept, packed or compressed, as `attend` reads them: for one query a row if `is_single`."""

    keys: Parts
    values: Parts
    rows: slice
    before: Sequence[int] | None
    attend: Attend
    is_single: bool


@dataclass(frozen=True, slots=True)
class Carried:
    """What belongs to the keys that a cache returns. `parts` replace those keys if given: all rows in their order, each
    part to be used before the next one is asked for."""

    shared: Sequence[SharedKeys] = ()
    parts: Iterator[OwnKeys | PackedKeys] | None = None

    def __bool__(self) -> bool:
        return bool(self.shared) or self.parts is not None


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some of the tokens of a call that are side by side in one row: really `rows` rows of their own, with a cache
    layer of their own. Each sees its keys from `starts` (int64 `[rows]`) up to itself; `mask` is what that adds to
    scores (None: nothing but causality), and says it alone where there are no `starts`. Of each row attention is asked
    for the last `read` tokens (None: for all)."""

    tokens: slice
    rows: int
    cache: CacheLayerMixin
    starts: torch.Tensor | None
    mask: torch.Tensor | None
    read: int | None = None

    def own(self, states: torch.Tensor) -> torch.Tensor:
        """Its part of queries, keys or values `[1, heads, tokens of all, head_dim]`, as `[rows, heads, tokens,
        head_dim]`."""
        mine = states[0, :, self.tokens]
        return mine.reshape(mine.shape[0], self.rows, -1, mine.shape[2]).transpose(0, 1)


def lay_side_by_side(keys: torch.Tensor, stretches: Sequence[Stretch]) -> torch.Tensor:
    """`keys`, which attention will cut into stretches before it hands them to the stretches' caches."""
    keys.stretches = stretches  # type: ignore[attr-defined]
    return keys


def carry(
    keys: torch.Tensor, shared: Sequence[SharedKeys], parts: Iterator[OwnKeys | PackedKeys] | None = None
) -> torch.Tensor:
    """`keys`, with what belongs to them."""
    keys.carried = Carried(shared, parts)  # type: ignore[attr-defined]
    return keys
