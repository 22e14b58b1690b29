"""What a pass costs is measured on the engine itself, with products and without."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from flexbatch.engine import rehearsal
from flexbatch.engine.model import build, decoder_layers
from flexbatch.engine.rehearsal import Passing, WithoutProduct, leave_out_products, rehearse

CPU = torch.device("cpu")


def test_no_product_is_left_within_the_layers_and_the_rest_stays() -> None:
    config = AutoConfig.for_model("opt", num_hidden_layers=2, hidden_size=64, num_attention_heads=2, ffn_dim=256)
    stepped = build(config, torch.bfloat16)
    layers = decoder_layers(stepped.model)
    linears = sum(isinstance(module, nn.Linear) for module in layers.modules())
    norms = sum(isinstance(module, nn.LayerNorm) for module in layers.modules())
    leave_out_products(stepped, Passing(0))
    assert not any(isinstance(module, nn.Linear) for module in layers.modules())
    assert sum(isinstance(module, WithoutProduct) for module in layers.modules()) == linears == 12
    assert sum(isinstance(module, nn.LayerNorm) for module in layers.modules()) == norms
    assert isinstance(stepped.model.get_output_embeddings(), nn.Linear)


def test_a_rehearsal_gives_possible_figures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    made = rehearse(CPU, tmp_path)
    assert 1e-6 <= made.layer_seconds < 0.1
    assert 1e-6 <= made.pass_seconds < 0.1
    assert 1e7 < made.activation_numbers < 1e12
    assert all(1e8 < rate < 1e16 for rate in made.products.values())
    assert list(tmp_path.iterdir()) == []


def test_a_pass_of_the_rehearsal_joins_and_decodes_as_many_tokens_as_the_rate_is_taken_of(tmp_path: Path) -> None:
    engine = rehearsal._open(CPU, tmp_path, rehearsal._model(CPU, rehearsal.NARROW, rehearsal.SHALLOW))
    passes = engine.run(rehearsal._requests())
    for _ in range(rehearsal.WARMING):
        made = next(passes)
    engine.close()
    # A row's first token comes with its prompt, the second beside the next prompts.
    assert made.prefill_tokens == rehearsal.JOINING * rehearsal.PROMPT
    assert made.decode_tokens == 2 * rehearsal.JOINING
