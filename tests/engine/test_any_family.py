"""Families that have no entry of their own: Transformers' numbers, or a refusal before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexbatch.engine import model as building
from flexbatch.engine.model import build
from flexbatch.errors import ModelError
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Request, Sampling
from tests.engine.families import VOCABULARY, prompts
from tests.engine.running import answer, engine

NEW_TOKENS, LONGEST = 4, 20
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


@pytest.mark.parametrize("large", [False, True], ids=["small layers", "large layers"])
@pytest.mark.parametrize(
    "kind",
    [
        "apertus",  # parameters without dimensions
        "cohere2",  # windows in some layers
        "glm4_moe",  # shared experts beside the chosen ones
        "gpt_oss",  # experts turned over, with biases, and attention sinks
        "granitemoe",
        "hunyuan_v1_moe",  # asks its router's weight for a type
        "llama4_text",  # asks its embedding's weight for a device; attention in chunks
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "stablelm",
        "starcoder2",
    ],
)
def test_log_probabilities_are_those_of_transformers(
    kind: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(building, "LARGE_LAYER_PARAMETERS", 1)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.06)
    made.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rows, sampling = prompts(4, LONGEST), Sampling(max_new_tokens=NEW_TOKENS, logprobs=True)
    running = engine(tmp_path, Policy(Shares(0.3, 0.2), slots=3, prefill_tokens=30), LONGEST + NEW_TOKENS, tmp_path)
    done, _ = answer(running, (Request(index, row, sampling) for index, row in enumerate(rows)))
    for index, row in enumerate(rows):
        new = torch.tensor(done[index].token_ids)
        with torch.inference_mode():
            logits = theirs(torch.tensor([[*row, *new.tolist()]])).logits[0, len(row) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, new[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done[index].logprobs), wanted, rtol=0, atol=1e-4)


def test_a_hybrid_class_of_attention_alone_is_run() -> None:
    fields = {**SIZES, "layer_types": ["attention"] * 2, "shared_intermediate_size": 128}
    assert build(AutoConfig.for_model("granitemoehybrid", **fields), torch.float32).num_layers == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "is an encoder here"),
        ("mamba", "keeps more than keys and values"),
        ("rwkv", "keeps more than keys and values"),
        ("qwen3_next", "linear_attention"),
        ("gemma3", "a tower"),
    ],
)
def test_what_is_not_attention_of_one_direction_is_refused(kind: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        build(AutoConfig.for_model(kind), torch.float32)
