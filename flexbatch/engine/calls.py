"""The two kinds of model calls in a pass: the decode batch, and micro-batches of joining prompts (or prompts to score).

Each builds the inputs of one ordinary `model(...)` call: left-padded tokens, the padding mask, the positions, a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.model import SteppedModel
from flexbatch.engine.schedule import oldest_column


def decode(
    stepped: SteppedModel, arena: KVArena, tokens: Sequence[int], lengths: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Next-token logits, float32 `[rows, vocabulary]`, of the slots 0 to rows - 1.

    `tokens[slot]` is the slot's newest token, `lengths[slot]` how many tokens it has in the arena (0: an empty slot,
    whose logits mean nothing).
    """
    first = oldest_column(arena.end, lengths)
    cached = torch.tensor(lengths, device=device)
    columns = torch.arange(first, arena.end + 1, device=device)
    mask = (columns[None] >= (arena.end - cached)[:, None]).long()
    ids = torch.tensor(tokens, device=device)[:, None]
    return _call(stepped, ids, mask, cached[:, None], arena.decode_cache(len(tokens), first), 1)[:, -1]


def prefill(
    stepped: SteppedModel,
    arena: KVArena,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    logits_to_keep: int,
    width: int,
    device: torch.device,
) -> torch.Tensor:
    """Logits of the last `logits_to_keep` positions, float32 `[rows, logits_to_keep, vocabulary]`.

    `prompts` are padded on the left to at least `width` tokens. Their keys and values go into `slots`, or nowhere if
    there are none.
    """
    width = max(width, *(len(prompt) for prompt in prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)
    return _call(stepped, ids, mask, positions, arena.prefill_cache(slots), logits_to_keep)


def _call(
    stepped: SteppedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache,
    logits_to_keep: int,
) -> torch.Tensor:
    inputs: dict[str, Any] = {"position_ids": positions} if stepped.takes_position_ids else {}
    output = stepped.model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=logits_to_keep,
        **inputs,
    )
    logits: torch.Tensor = output.logits
    return logits.float()
