"""Where packed keys and values are unpacked."""

from __future__ import annotations

import torch

from flexbatch.engine.storage import Storage
from flexbatch.plan.policy import Tier


class Expansion:
    """Room on the device in which packed keys and values are unpacked for one call at a time, layer after layer. Rows
    have up to `span` tokens."""

    def __init__(self, span: int, storage: Storage) -> None:
        self.span, self._storage = span, storage
        self._rooms: dict[str, torch.Tensor] = {}

    def room(self, what: str, shape: tuple[int, ...], dtype: torch.dtype, most_rows: int) -> torch.Tensor:
        """Memory for `what`, `[rows, heads, tokens, head_dim]`, overwritten the next time; admitted at first, for
        `most_rows`."""
        rows, heads, tokens, size = shape
        if what not in self._rooms:
            count = max(most_rows * self.span, rows * tokens) * heads * size
            self._rooms[what] = self._storage.zeros(Tier.DEVICE, (count,), dtype, "KV of one layer, expanded")
        room = self._rooms[what]
        if room.numel() < rows * heads * tokens * size or room.dtype != dtype:
            return torch.empty(shape, dtype=dtype, device=room.device)  # a layer of another shape than the first
        return room[: rows * heads * tokens * size].view(shape)
