"""What a Transformers config says by itself of a model's attention: heads, their sizes, windows.

Every family has names of its own for the same fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexbatch.errors import ModelError


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the config says about attention: `head_sizes` of keys and values, `windows` with one entry per layer, 0
    where all positions are seen. Where latent vectors are cached, `expanded_size` numbers are made of each position's
    before attention (keys and values of all heads), with `expansion_parameters`."""

    num_hidden_layers: int
    query_size: int
    kv_size: int
    head_sizes: tuple[int, int]
    windows: tuple[int, ...]
    expanded_size: int = 0
    expansion_parameters: int = 0


# Names under which the families keep a field, first match wins.
FIELD_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab_size": ("vocab_size",),
}


def positive_field(config: Mapping[str, Any], field: str) -> int:
    """A field that every model has, as a positive integer; `ModelError` names it otherwise."""
    names = FIELD_NAMES.get(field, (field,))
    value = next((config[name] for name in names if config.get(name) is not None), None)
    kind = config.get("model_type", "unknown")
    if value is None:
        raise ModelError(
            f"the config of this {kind!r} model has no {field} (looked for {', '.join(names)}).",
            remedy="Add the field to the model's config.json or to model.config.",
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"the config of this {kind!r} model has {field}={value!r}; it must be a positive whole number.",
            remedy="Correct the field in the model's config.json or in model.config.",
        )
    return value


def attention_shape(config: Mapping[str, Any]) -> AttentionShape:
    """Heads, cached numbers per token and windows from a config as a mapping (`PreTrainedConfig.to_dict()`)."""
    config = config.get("text_config") or config
    layers = positive_field(config, "num_hidden_layers")
    heads = positive_field(config, "num_attention_heads")
    hidden = positive_field(config, "hidden_size")
    positive_field(config, "vocab_size")
    head_size = config.get("head_dim") or hidden // heads
    if not config.get("head_dim") and hidden % heads:
        raise ModelError(
            f"the config has hidden_size={hidden} and num_attention_heads={heads}; the first must be a multiple of the "
            "second.",
            remedy="Correct one of the two fields, or give head_dim.",
        )
    windows = tuple(_window(config, index) for index in range(layers))
    if rank := config.get("kv_lora_rank"):  # multi-head latent attention: one latent head is cached, and turned keys
        nope, rope = config.get("qk_nope_head_dim", head_size), config.get("qk_rope_head_dim", 0)
        made = heads * (nope + config.get("v_head_dim", head_size))
        return AttentionShape(
            layers, heads * (nope + rope), rank + rope, (rank, rope), windows, made + heads * rope, rank * made
        )
    kv_size = 2 * _kv_heads(config, heads) * head_size
    return AttentionShape(layers, heads * head_size, kv_size, (head_size, head_size), windows)


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("model_type") == "falcon":
        # The new decoder repeats its keys and values for all query heads before they reach the cache.
        return 1 if config.get("multi_query") and not config.get("new_decoder_architecture") else heads
    attention = config.get("attn_config")
    if isinstance(attention, Mapping) and attention.get("kv_n_heads"):
        return int(attention["kv_n_heads"])
    if config.get("model_type") == "gpt_bigcode":
        return 1 if config.get("multi_query") else heads
    return int(config.get("num_key_value_heads") or config.get("multi_query_group_num") or heads)


def _window(config: Mapping[str, Any], index: int) -> int:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return 0
    kinds: Sequence[str] | None = config.get("layer_types")
    if kinds:
        return int(window) if "sliding" in kinds[index] else 0
    return int(window)
