"""The untrained `opt-tiny` and the numbers of its training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import OPTConfig, OPTForCausalLM

POSITIONS = 640
"""Prompts of 512 tokens and 64 new ones fit, with room to spare."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The training run. `tokens_per_step` counts padded tokens; rates are the peaks of the schedule."""

    seed: int = 0
    steps: int = 3000
    tokens_per_step: int = 2048
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    matrix_rate: float = 0.015
    rate: float = 3e-3
    warmup: int = 100
    first_steps: int = 350
    short_steps: int = 1400
    decay_steps: int = 900
    text_weight: float = 0.1
    text_share: float = 0.15


def build_model(plan: Plan, vocabulary: int) -> OPTForCausalLM:
    """A fresh OPT with random weights, except that its learned positions start as sinusoids (Vaswani et al., 2017,
    section 3.5) and a few heads start out looking at a neighbour (see `look_back`): both only save training time."""
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=plan.hidden_size,
        word_embed_proj_dim=plan.hidden_size,
        ffn_dim=4 * plan.hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        max_position_embeddings=POSITIONS,
        init_std=0.04,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    model = OPTForCausalLM(config)
    # For sequences this short the plain product of queries and keys trains faster on a CPU than the fused kernel.
    model.set_attn_implementation("eager")
    table = model.model.decoder.embed_positions.weight
    place = torch.arange(table.shape[0]).unsqueeze(1)
    with torch.no_grad():
        table[:, 0::2] = 0.1 * torch.sin(place * frequencies(plan))
        table[:, 1::2] = 0.1 * torch.cos(place * frequencies(plan))
        for layer, head, distance in ((0, 0, 1), (0, 1, 2), (0, 2, 1), (1, 0, 1)):
            look_back(model, plan, layer, head, distance)
    return model


def frequencies(plan: Plan) -> torch.Tensor:
    """Radians per position, float32 of shape (hidden_size / 2,), from sharp to slow."""
    return 2.5 * torch.exp(torch.arange(plan.hidden_size // 2) * (-math.log(2000.0) / (plan.hidden_size // 2)))


def look_back(model: OPTForCausalLM, plan: Plan, layer: int, head: int, distance: int) -> None:
    """Sets a head's queries and keys so that it attends `distance` positions back.

    Key and query are the position's own sinusoids, the query's turned back by `distance`; their product is
    `sum(cos(frequency * (query - distance - key)))`, which peaks there. Structured starts of attention are known to
    shorten training (Trockman and Kolter, 2023, arXiv 2305.09828).
    """
    attention = model.model.decoder.layers[layer].self_attn
    size = plan.hidden_size // plan.heads
    rows = slice(head * size, (head + 1) * size)
    angle = frequencies(plan)[: size // 2] * distance
    key = torch.zeros(size, plan.hidden_size)
    key[:, :size] = torch.eye(size)
    query = torch.zeros(size, plan.hidden_size)
    for pair in range(size // 2):
        sine, cosine = 2 * pair, 2 * pair + 1
        turn = torch.tensor([[angle[pair].cos(), -angle[pair].sin()], [angle[pair].sin(), angle[pair].cos()]])
        query[sine : cosine + 1, sine : cosine + 1] = turn
    attention.k_proj.weight[rows] = 2.0 * key
    attention.q_proj.weight[rows] = 2.0 * query
    torch.nn.init.normal_(attention.v_proj.weight[rows], std=0.1)
    torch.nn.init.normal_(attention.out_proj.weight[:, rows], std=0.1)
