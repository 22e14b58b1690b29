"""A model's sizes follow from its config alone, exactly, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from flexbatch.engine.model import cache_argument
from flexbatch.engine.model_shapes import spec_from_config
from flexbatch.errors import ModelError
from flexbatch.plan.attention_shape import attention_shape
from flexbatch.plan.model_spec import Mixture, ModelSpec
from flexbatch.plan.policy import Policy
from flexbatch.plan.terms import decode_terms
from flexbatch.plan.workload import PassLoad, Workload
from tests.plan.examples import machine

SMALL = {"vocab_size": 640, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 160, "num_key_value_heads": 2, "max_position_embeddings": 256}

FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**SMALL, "ffn_dim": 256, "word_embed_proj_dim": 64},
    "opt-350m": {
        **SMALL,
        "model_type": "opt",
        "ffn_dim": 256,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "bloom": {"vocab_size": 640, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "codegen": {"vocab_size": 640, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_positions": 256},
    "gpt2": {"vocab_size": 640, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gptj": {"vocab_size": 640, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "n_positions": 256},
    "gpt_neox": {**SMALL, "intermediate_size": 256},
    "falcon": {**SMALL, "multi_query": True},
    "falcon-new": {**SMALL, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"vocab_size": 640, "d_model": 64, "n_layers": 3, "n_heads": 4},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 32},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 24},
    "gemma": {**LLAMA, "head_dim": 24},
    "gemma2": {**LLAMA, "head_dim": 24, "sliding_window": 32},
    "deepseek_v3": {
        **LLAMA,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
    "phi": {**LLAMA, "num_key_value_heads": 4},
}


def config_of(name: str) -> dict[str, Any]:
    return {"model_type": name.split("-", 1)[0], "dtype": "bfloat16", **FAMILIES[name]}


def small_model(config: dict[str, Any]) -> torch.nn.Module:
    fields = {key: value for key, value in config.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields), dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_exact_to_the_unit(family: str) -> None:
    spec = spec_from_config(config_of(family))
    with init_empty_weights():
        model = small_model(config_of(family))
    model.tie_weights()
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert spec.weight_bytes() == 2 * spec.parameters
    assert len(spec.layers) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_size_is_what_the_model_caches(family: str) -> None:
    spec, model = spec_from_config(config_of(family)), small_model(config_of(family)).eval()
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.arange(5)[None], **{cache_argument(model): cache}, use_cache=True)
    cached = [(layer.keys.numel() + layer.values.numel()) // 5 for layer in cache.layers]
    assert [layer.kv_size for layer in spec.layers] == cached


@pytest.mark.parametrize(
    ("size", "billions"), [("opt-1.3b", 1.3158), ("opt-6.7b", 6.6585), ("opt-175b", 174.6), ("bloom-176b", 176.25)]
)
def test_shipped_models_have_their_published_size(size: str, billions: float) -> None:
    file = Path(__file__).parents[2] / "conf" / "model" / f"{size}.yaml"
    spec = spec_from_config(yaml.safe_load(file.read_text())["config"])
    assert spec.parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_windows_alternate_where_the_model_alternates() -> None:
    assert [layer.window for layer in spec_from_config(config_of("gemma2")).layers] == [32, 0, 32]
    assert [layer.window for layer in spec_from_config(config_of("mistral")).layers] == [32, 32, 32]


def test_only_chosen_experts_count_as_arithmetic() -> None:
    layer = spec_from_config(config_of("mixtral")).layers[0]
    experts, router = 4 * 3 * 64 * 160, 4 * 64
    assert layer.matrix_parameters + router - layer.active_parameters == experts // 2


def test_experts_that_few_tokens_meet_multiply_at_the_rate_of_few_rows() -> None:
    def seconds(experts: int) -> float:
        fields = {**config_of("mixtral"), "num_local_experts": experts}
        spec, rows = spec_from_config(fields, compute_dtype="bfloat16"), Workload.uniform(64)
        load = PassLoad(decoding=64.0, joining=0.0)
        terms = decode_terms(spec, machine("cpu-2core"), rows, Policy(slots=64), load)
        return next(term.seconds for term in terms if term.what == "decode matrices")

    assert spec_from_config(config_of("mixtral")).layers[0].mixture == Mixture(4, 2, 4 * 3 * 64 * 160)
    assert seconds(4) < seconds(16) < seconds(64)


def test_a_tied_head_is_stored_once_and_multiplied() -> None:
    spec = spec_from_config(config_of("opt"))
    assert spec.head_parameters == 640 * 64
    assert spec.outside_parameters + spec.small_parameters == spec.parameters - spec.layer_parameters


def test_packed_bytes_hold_the_scales() -> None:
    spec: ModelSpec = spec_from_config(config_of("llama"))
    layer = spec.layers[0]
    norms = layer.parameters - layer.matrix_parameters
    assert spec.layer_bytes(layer, 4) == norms * 2 + layer.matrix_parameters // 2 + layer.matrix_parameters // 32 * 4
    assert spec.weight_bytes(4) < spec.weight_bytes(8) < spec.weight_bytes(16)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_or_impossible_field_is_named(field: str) -> None:
    config = config_of("llama")
    with pytest.raises(ModelError, match=field):
        spec_from_config({key: value for key, value in config.items() if key != field})
    with pytest.raises(ModelError, match=field):
        attention_shape({**config, field: 0})


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ModelError, match="num_attention_heads=5"):
        attention_shape({"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 5, "vocab_size": 9})
