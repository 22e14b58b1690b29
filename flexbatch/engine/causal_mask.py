"""What a query may see, as numbers that are added to attention scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary


def visible(mask: torch.Tensor, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """What to add to attention scores, `[rows, 1, tokens, columns]`: the last `tokens` columns are the queries' own; a
    query sees what `mask` (int64 `[rows, columns]`) lets it and no column after its own. Or `mask` says it for each
    query by itself: `[rows, tokens, columns]`."""
    seen = mask.bool()[:, None]
    if mask.ndim == 2:
        columns = mask.shape[1]
        causal = torch.ones(tokens, columns, dtype=torch.bool, device=mask.device).tril(columns - tokens)
        seen = causal[None, None] & seen[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill_(~seen, torch.finfo(dtype).min)


_lying: Any = WeakTensorKeyDictionary()
"""What `as_keys_lie` made of each mask, which is the same one in all layers of a call."""


def as_keys_lie(mask: torch.Tensor, rows: slice, before: Sequence[int] | None, count: int) -> torch.Tensor:
    """`mask` `[rows, ..., columns]` for some rows, with `count` keys a row, of which the row's first `before`
    columns come after its last ones, if they come at all."""
    columns = mask.shape[-1]
    if before is None or (count == columns and not any(before)):
        return mask[rows]
    made: dict[Any, torch.Tensor] = _lying.setdefault(mask, {})
    key = rows.start, rows.stop, tuple(before), count
    if key not in made:
        places = (torch.arange(count, device=mask.device) + torch.tensor(before, device=mask.device)[:, None]) % columns
        own = mask[rows]
        made[key] = own.gather(-1, places[:, None, None].expand(*own.shape[:-1], count))
    return made[key]
