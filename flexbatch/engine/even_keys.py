"""As many keys as products of bfloat16 on AMX are fast for."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from flexbatch.engine.schedule import EVEN_KEYS
from flexbatch.kernels.vectors import multiplies_tiles


def missing_keys(query: torch.Tensor, key: torch.Tensor) -> int:
    """Columns by which keys fall short of what the products of bfloat16 on AMX are fast for."""
    suits = query.device.type == "cpu" and query.dtype == torch.bfloat16 and multiplies_tiles()
    return -key.shape[2] % EVEN_KEYS if suits else 0


def even_keys(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, values and mask with so many more columns, which nothing sees, that products of bfloat16 on AMX take
    the fast way: with 273 they take three times as long as with 288 (docs/benchmarks.md). Without a mask the queries
    see causally, from the first key on, or all keys."""
    missing = missing_keys(query, key)
    if not missing:
        return key, value, mask
    if mask is None and not causal:
        mask = query.new_zeros(1, 1, 1, key.shape[2])
    if mask is not None:
        unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = pad(mask, (0, missing), value=unseen)
    return pad(key, (0, 0, 0, missing)), pad(value, (0, 0, 0, missing)), mask
