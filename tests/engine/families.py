"""Small random models of every supported family, saved as Transformers saves them, and prompts for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Large enough that embedding and head are streamed like layers (`SMALL_MODULE_PARAMETERS`).
VOCABULARY = 1100
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64}
_LLAMA = {
    **_SMALL,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_OPT = {
    **_SMALL,
    "num_hidden_layers": 4,
    "ffn_dim": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 64,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}

# Adding a family is adding a line: a name, a model type, and a small config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", {**_OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt-iml": ("opt", {**_OPT, "do_layer_norm_before": True, "activation_function": "relu", "ffn_dim": 256}),
    "bloom": ("bloom", {**_SMALL, "n_layer": 4, "n_head": 4}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 8, "n_ctx": 256}),
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "gpt-neox": ("gpt_neox", {**_LLAMA, "rotary_pct": 0.25}),
    "falcon": (
        "falcon",
        {**_SMALL, "num_hidden_layers": 4, "num_attention_heads": 4, "new_decoder_architecture": False},
    ),
    "falcon-alibi": ("falcon", {**_SMALL, "num_hidden_layers": 4, "num_attention_heads": 4, "alibi": True}),
    "mpt": ("mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 4, "n_heads": 4, "max_seq_len": 256}),
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 7}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 16}),
    "qwen3-moe": (
        "qwen3_moe",
        {**_LLAMA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 64,
        },
    ),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 16}),
    "gemma2": ("gemma2", {**_LLAMA, "head_dim": 16, "sliding_window": 7}),
    "phi": ("phi", {**_LLAMA, "num_key_value_heads": 4}),
}


# For what depends on the size of heads and not on the family: a packed or compressed cache of these is read as it is
# kept.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-wide": ("llama", {**_LLAMA, "head_dim": 64}),
    "opt-wide": ("opt", {**_OPT, "num_attention_heads": 1}),
}

_FOLDERS: list[TemporaryDirectory[str]] = []
"""Those of saved models, removed when the process ends."""


@cache
def saved(family: str) -> Path:
    """A folder with the family's small random model in float32, made once for a test session."""
    kind, values = (FAMILIES | SHAPES)[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)  # spread the logits, so that greedy choices are clear
    _FOLDERS.append(TemporaryDirectory(prefix=f"flexbatch-{family}-"))
    model.save_pretrained(_FOLDERS[-1].name)
    return Path(_FOLDERS[-1].name)


@cache
def loaded(family: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32).eval()


def prompts(rows: int, longest: int = 20, seed: int = 0) -> list[tuple[int, ...]]:
    """Ragged random prompts of 3 to `longest` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (rows,), generator=generator).tolist()
    return [tuple(torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()) for length in lengths]


def logits(family: str, tokens: tuple[int, ...]) -> torch.Tensor:
    """The model's logits, float32 `[vocabulary]`, for what follows `tokens`."""
    with torch.inference_mode():
        return loaded(family)(torch.tensor([tokens])).logits[0, -1]


def reference(family: str, prompt: tuple[int, ...], max_new_tokens: int, **options: Any) -> list[int]:
    """What `model.generate` of Transformers makes of one prompt, greedily."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = loaded(family).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=1,
            **options,
        )
    return out[0, len(prompt) :].tolist()
