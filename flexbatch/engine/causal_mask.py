"""What a query may see, as numbers that are added to attention scores."""

from __future__ import annotations

import torch


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
