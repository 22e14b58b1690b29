"""Attention over a shared prefix and a row's own tokens, merged by log-sum-exp, as a Transformers attention function.

Softmax over two sets of keys is the mean of the two softmaxes weighted by the exponentials of their log-sum-exps
(Hydragen, arXiv 2402.05099, section 3.1), so the prefix's part can be computed for all rows of a group in one matrix
product and the result is exact.

Where the rows' own keys lie on several tiers, each tier is attended to by itself, on the host's processor if need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from flexbatch.engine.carried_keys import Carried, OwnKeys, PackedKeys, Stretch
from flexbatch.engine.causal_mask import as_keys_lie
from flexbatch.engine.even_keys import even_keys, missing_keys
from flexbatch.engine.last_layer import ReadTokens, compute_only
from flexbatch.errors import EngineError
from flexbatch.kernels import decode_attention, prefill_attention
from flexbatch.kernels.prefill_attention import KeysAndValues

NAME = "flexbatch_merging"
EVENED_BYTES = 4 << 20
"""Of keys and values that are copied at a time, to have as many as is fast."""

FEWEST_QUERIES = 9
"""For which the kernel for prompts is the faster one (docs/benchmarks.md)."""


def register() -> str:
    """Makes the function known to Transformers and returns its name."""
    AttentionInterface.register(NAME, merging_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def merges_prefixes(config: PreTrainedConfig, model_class: type) -> bool:
    """Whether this model's attention can be replaced: it goes through the interface, and a query sees all keys before
    it under a plain softmax (no window, no soft cap, no attention sinks)."""
    text = config.get_text_config()
    if not (
        getattr(model_class, "_supports_attention_backend", False) and getattr(model_class, "_supports_sdpa", False)
    ):
        return False
    if getattr(text, "kv_lora_rank", None):  # keys and values are made of what is cached, after it
        return False
    if set(getattr(text, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return False
    return not getattr(text, "attn_logit_softcapping", None)


def merging_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query` `[rows, heads, tokens, head_dim]`, `key` and `value` `[rows, kv_heads, columns, head_dim]`; returns
    `[rows, tokens, heads, head_dim]`. Where the keys carry nothing this is Transformers' own SDPA function.

    EngineError where the keys of tokens side by side lost what they carried, and with it which row they are of."""
    stretches: Sequence[Stretch] = getattr(key, "stretches", ())
    if stretches:
        return _attend_stretches(stretches, module, query, key, value, dropout, scaling, **kwargs), None
    if attention_mask is not None and attention_mask.shape[-1] == 1 < key.shape[2]:  # the one of tokens side by side
        raise makes_keys_anew(module)
    starts = torch.zeros(len(query), dtype=torch.long) if attention_mask is None and query.shape[2] > 1 else None
    return _attend_rows(module, query, key, value, attention_mask, starts, dropout, scaling, **kwargs), None


def makes_keys_anew(module: torch.nn.Module) -> EngineError:
    """What a model is refused with whose keys lose, between cache and attention, what they carried."""
    return EngineError(
        f"{type(module).__name__} makes its keys anew after they are cached, which leaves open whose they are.",
        remedy="flexbatch cannot run this architecture yet; please report its model_type.",
    )


def _attend_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> torch.Tensor:
    """`merging_attention` of what is not side by side. Where `starts` are given they say the same as `mask`."""
    carried: Carried = getattr(key, "carried", Carried())
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if starts is not None and _is_many(query, key, value) and (shared := _one_prefix(carried, key, value)):
        output, _ = prefill_attention.prefill_attention(query, shared, (key, value), starts, scale)
        return output.transpose(1, 2).contiguous()
    if not carried and not is_slow_alone(query) and not (mask is not None and _are_few(query)):
        key, value, mask = even_keys(query, key, value, mask, query.shape[2] > 1)
        result: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)[0]
        return result
    parts = carried.parts or (OwnKeys(key, value, slice(None)),)
    made = [attend_own(query, part, mask, scale) for part in parts]
    if not carried.shared and len(made) == 1:
        return made[0][0].transpose(1, 2).contiguous()
    output = torch.cat([output for output, _ in made]).float()
    weight = torch.cat([weight for _, weight in made])
    for prefix in carried.shared:
        theirs, their_weight = attend_prefix(query[prefix.rows], prefix.keys, prefix.values, scale)
        output[prefix.rows] = merge(output[prefix.rows], weight[prefix.rows], theirs.float(), their_weight)
    return output.to(query.dtype).transpose(1, 2).contiguous()


def _is_many(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these are for the kernel for prompts."""
    return query.shape[2] >= FEWEST_QUERIES and prefill_attention.suits(query, key, value)


def _one_prefix(carried: Carried, key: torch.Tensor, value: torch.Tensor) -> KeysAndValues | None:
    """The keys and values that all rows share before their own, without columns if there are none; None where rows
    differ in that, or where their own keys lie on several tiers."""
    if not carried:
        return key[:1, :, :0], value[:1, :, :0]
    if carried.parts is not None or len(carried.shared) > 1 or len(carried.shared[0].rows) < len(key):
        return None
    return carried.shared[0].keys, carried.shared[0].values


def _attend_stretches(
    stretches: Sequence[Stretch],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> torch.Tensor:
    """One after the other, each with its cache; what belongs to none (spare tokens at the end) or is not asked for is
    zero."""
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    output[0, stretches[-1].tokens.stop :] = 0
    for stretch in stretches:
        keys, values = stretch.cache.update(stretch.own(key), stretch.own(value))
        if stretch.read is not None:
            output[0, stretch.tokens] = 0
        if stretch.read == 0:
            continue
        asking, mask = stretch.own(query), stretch.mask
        if stretch.read == 1:
            asking, mask = asking[:, :, -1:], None if mask is None else mask[:, :, -1:]
        own = _attend_rows(module, asking, keys, values, mask, stretch.starts, dropout, scaling, **kwargs)
        output[0, stretch.tokens].view(stretch.rows, -1, *output.shape[2:])[:, -own.shape[1] :] = own
    asked = sum(stretch.rows * stretch.read for stretch in stretches if stretch.read is not None)
    if stretches[0].read is not None and 2 * asked < query.shape[2]:
        compute_only(_read_tokens(stretches, query.shape[2], query.device))
    return output


def _read_tokens(stretches: Sequence[Stretch], count: int, device: torch.device) -> ReadTokens:
    """The positions that the stretches are asked for among all `count`; the last one if there are none."""
    positions = torch.arange(count, device=device)
    asked = [
        positions[stretch.tokens].view(stretch.rows, -1)[:, -stretch.read :].flatten()
        for stretch in stretches
        if stretch.read
    ]
    return ReadTokens(torch.cat(asked) if asked else positions[-1:], count)


def attend_own(
    query: torch.Tensor, part: OwnKeys | PackedKeys, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows' attention to their own keys, where and as those are; result and log-sum-exp come back to the query."""
    keys = part.keys[0] if isinstance(part, PackedKeys) else part.keys
    groups = query.shape[1] // keys.shape[1]
    own = query[part.rows].to(keys.device)
    own_mask = None if mask is None else as_keys_lie(mask, part.rows, part.before, keys.shape[2]).to(keys.device)
    rows, heads, tokens, size = own.shape
    if isinstance(part, PackedKeys) and part.is_single and tokens > 1:
        raise EngineError(f"Packed keys are asked for {tokens} queries a row; they answer one.")
    if isinstance(part, PackedKeys) or tokens == 1 or (own_mask is not None and groups > 1 and _are_few(own)):
        # The heads of a group are as many queries to the same keys: those need not be repeated.
        folded = own.reshape(rows, -1, groups * tokens, size)
        if own_mask is not None and tokens > 1:
            own_mask = own_mask.repeat(1, 1, groups, 1)
        if isinstance(part, PackedKeys):
            output, weight = part.attend(folded, part.keys, part.values, own_mask, scale)
        else:
            output, weight = attend(folded, part.keys, part.values, own_mask, scale, causal=False)
        output, weight = output.reshape(rows, heads, tokens, -1), weight.reshape(rows, heads, tokens)
    else:
        assert isinstance(part, OwnKeys)
        output, weight = attend(own, repeat_kv(part.keys, groups), repeat_kv(part.values, groups), own_mask, scale)
    return output.to(query.device), weight.to(query.device)


def _are_few(query: torch.Tensor) -> bool:
    """Whether there are several queries a row, but so few that nothing may be made of all their keys."""
    return 1 < query.shape[2] < FEWEST_QUERIES


def is_slow_alone(query: torch.Tensor) -> bool:
    """Whether torch's own function is slow for it: one query in half precision on a CPU (docs/benchmarks.md)."""
    return query.shape[2] == 1 and query.device.type == "cpu" and query.dtype != torch.float32


def _attend_in_turn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's attention and its log-sum-exp; some rows after the other where all their keys had to be copied."""
    rows = max(1, EVENED_BYTES // (key[0].nbytes + value[0].nbytes)) if missing_keys(query, key) else len(key)
    made = []
    for first in range(0, len(query), rows):
        part = slice(first, first + rows)
        own = mask if mask is None or len(mask) == 1 else mask[part]
        even = even_keys(query[part], key[part], value[part], own, causal)
        made.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[part], even[0], even[1], 0.0, causal, attn_mask=even[2], scale=scale
            )
        )
    if len(made) == 1:
        return made[0][0], made[0][1]
    return torch.cat([output for output, _ in made]), torch.cat([weight for _, weight in made])


def merge(
    first: torch.Tensor, first_weight: torch.Tensor, second: torch.Tensor, second_weight: torch.Tensor
) -> torch.Tensor:
    """Two attention results `[rows, heads, tokens, head_dim]` by their log-sum-exps `[rows, heads, tokens]`."""
    share = torch.sigmoid(first_weight - second_weight)[..., None]
    return first * share + second * (1 - share)


def attend_prefix(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows' queries against one prefix at once: result `[rows, heads, tokens, head_dim]` and log-sum-exp."""
    rows, heads, tokens, size = query.shape
    kv_heads = keys.shape[1]
    folded = query.reshape(rows, kv_heads, -1, size).transpose(0, 1).reshape(1, kv_heads, -1, size)
    output, weight = attend(folded, keys, values, None, scale, causal=False)
    output = output.reshape(kv_heads, rows, -1, size).transpose(0, 1).reshape(rows, heads, tokens, -1)
    return output, weight.reshape(kv_heads, rows, -1).transpose(0, 1).reshape(rows, heads, tokens)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp (float32 `[rows, heads, tokens]`).

    `mask` is Transformers': bool (true: may see) or additive. Without one, several queries see causally (`causal`).
    """
    causal = causal and mask is None and query.shape[2] > 1
    if mask is None and (causal or len(key) == 1) and _is_many(query, key, value):
        none = key[:, :, :0], value[:, :, :0]
        sources = (none, (key, value)) if causal else ((key, value), none)
        starts = torch.zeros(len(query), dtype=torch.long)
        return prefill_attention.prefill_attention(query, *sources, starts, scale)
    if not causal and decode_attention.suits(query, key, value, mask):
        return decode_attention.decode_attention(query, key, value, mask, scale)
    if mask is not None and mask.dtype == torch.bool:
        # Finite, so that a row that may see nothing (padding) stays free of NaN.
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(
            ~mask, torch.finfo(query.dtype).min
        )
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        if is_slow_alone(query):
            # From two queries on the kernel multiplies matrices: twice the work, less than half the time.
            twice = attend(query.expand(-1, -1, 2, -1), key, value, mask, scale, causal=False)
            return twice[0][:, :, :1], twice[1][:, :, :1]
        return _attend_in_turn(query, key, value, mask, scale, causal)
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1).to(value.dtype), value), scores.logsumexp(-1)
