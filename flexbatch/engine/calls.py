"""The kinds of model calls in a pass: the decode batch, prefixes, and micro-batches of joining or scored prompts.

Each builds the inputs of one ordinary `model(...)` call: left-padded tokens, the padding mask, the positions, a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from flexbatch.engine.cache_layers import (
    CopiedPrefixLayer,
    CopyingPrefillLayer,
    DecodeLayer,
    ExtendLayer,
    MergingDecodeLayer,
    MergingPrefillLayer,
    PrefillLayer,
    PrefixLayer,
)
from flexbatch.engine.kv_arena import KVArena, LayerStore
from flexbatch.engine.model import SteppedModel
from flexbatch.engine.prefix import Prefix
from flexbatch.engine.schedule import oldest_column


@dataclass(frozen=True)
class DecodeRow:
    """A slot's newest token, how many tokens it has in the arena (0: an empty slot, whose logits mean nothing), and
    the prefix that is kept apart from it."""

    token: int = 0
    length: int = 0
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Caller:
    """What all calls share."""

    stepped: SteppedModel
    arena: KVArena
    device: torch.device
    host_attention: bool = False

    def decode(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        """Next-token logits, float32 `[rows, vocabulary]`, of the slots 0 to rows - 1."""
        lengths = [row.length for row in rows]
        end, first = self.arena.end, oldest_column(self.arena.end, lengths)
        cached = torch.tensor(lengths, device=self.device)
        columns = torch.arange(first, end + 1, device=self.device)
        mask = (columns[None] >= (end - cached)[:, None]).long()
        ids = torch.tensor([row.token for row in rows], device=self.device)[:, None]
        before = torch.tensor([len(row.prefix) if row.prefix else 0 for row in rows], device=self.device)
        shared = [(prefix, torch.tensor(members, device=self.device)) for prefix, members in _members(rows)]
        cache = Cache(layers=[self._decode_layer(layer, len(rows), first, shared) for layer in self.arena.layers])
        return self._call(ids, mask, (cached + before)[:, None], cache, 1)[:, -1]

    def _decode_layer(
        self, store: LayerStore, rows: int, first: int, shared: Sequence[tuple[Prefix, torch.Tensor]]
    ) -> DecodeLayer:
        if self.stepped.merges_prefixes:
            return MergingDecodeLayer(store, rows, first, self.arena.end, shared, self.host_attention)
        return DecodeLayer(store, rows, first, self.arena.end)

    def compute(self, prefix: Prefix) -> None:
        """The keys and values of a prefix."""
        ids = torch.tensor([prefix.tokens], device=self.device)
        positions = torch.arange(len(prefix), device=self.device)[None]
        kind = PrefixLayer if self.stepped.merges_prefixes else CopiedPrefixLayer
        cache = Cache(layers=[kind(layer, prefix) for layer in self.arena.layers])
        self._call(ids, torch.ones_like(ids), positions, cache, 1)

    def prefill(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[int], logits_to_keep: int, width: int = 0
    ) -> torch.Tensor:
        """Logits of the last `logits_to_keep` positions, float32 `[rows, logits_to_keep, vocabulary]`.

        `prompts` are padded on the left to at least `width` tokens. Their keys and values go into `slots`, or nowhere
        if there are none.
        """
        ids, mask = self._padded(prompts, width)
        end = self.arena.end
        cache = Cache(layers=[PrefillLayer(layer, slots, end) for layer in self.arena.layers])
        return self._call(ids, mask, _positions(mask), cache, logits_to_keep)

    def prefill_after(
        self, prefix: Prefix, prompts: Sequence[Sequence[int]], slots: Sequence[int], logits_to_keep: int
    ) -> torch.Tensor:
        """As `prefill`, for the tokens that come after a shared prefix."""
        ids, mask = self._padded(prompts, 0)
        positions, end, layers = _positions(mask) + len(prefix), self.arena.end, self.arena.layers
        if self.stepped.merges_prefixes:
            rows = torch.arange(len(prompts), device=self.device)
            cache = Cache(layers=[MergingPrefillLayer(layer, slots, end, prefix, rows) for layer in layers])
        else:
            own = [len(prompt) for prompt in prompts]
            cache = Cache(layers=[CopyingPrefillLayer(layer, slots, end, prefix, own) for layer in layers])
            columns = torch.arange(len(prefix) + ids.shape[1], device=self.device)
            mask = (columns[None] >= ids.shape[1] - torch.tensor(own, device=self.device)[:, None]).long()
        return self._call(ids, mask, positions, cache, logits_to_keep)

    def extend(
        self,
        tokens: Sequence[Sequence[int]],
        slots: Sequence[int],
        before: Sequence[int],
        end: int,
        logits_to_keep: int,
    ) -> torch.Tensor:
        """Logits of the last `logits_to_keep` of these tokens, float32 `[rows, logits_to_keep, vocabulary]`.

        `tokens` (as many for each row) come after the `before` tokens that a row has in the arena already, and end at
        column `end`. The first part of a prompt has none before it.
        """
        ids = torch.tensor([list(each) for each in tokens], device=self.device)
        start = end + 1 - ids.shape[1]
        cached = torch.tensor(before, device=self.device)
        first = start - max(before)
        columns = torch.arange(first, end + 1, device=self.device)
        mask = (columns[None] >= (start - cached)[:, None]).long()
        positions = cached[:, None] + torch.arange(ids.shape[1], device=self.device)[None]
        cache = Cache(layers=[ExtendLayer(layer, slots, first, start) for layer in self.arena.layers])
        return self._call(ids, mask, positions, cache, logits_to_keep)

    def _padded(self, prompts: Sequence[Sequence[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask, int64 `[rows, width]`."""
        width = max(width, *(len(prompt) for prompt in prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def _call(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache, logits_to_keep: int
    ) -> torch.Tensor:
        inputs: dict[str, Any] = {"position_ids": positions} if self.stepped.takes_position_ids else {}
        output = self.stepped.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **inputs,
        )
        logits: torch.Tensor = output.logits
        return logits.float()


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _members(rows: Sequence[DecodeRow]) -> list[tuple[Prefix, list[int]]]:
    """The rows of each prefix that is kept apart."""
    members: dict[int, tuple[Prefix, list[int]]] = {}
    for index, row in enumerate(rows):
        if row.prefix is not None:
            members.setdefault(id(row.prefix), (row.prefix, []))[1].append(index)
    return list(members.values())
