"""The untrained `opt-tiny` and the numbers of its training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTAttention

POSITIONS = 640
"""Prompts of 512 tokens and 64 new ones fit, with room to spare."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The training run. `tokens_per_step` counts padded tokens; rates are the peaks of the schedule."""

    seed: int = 0
    steps: int = 2000
    tokens_per_step: int = 2048
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    matrix_rate: float = 0.004
    rate: float = 1e-3
    warmup: int = 20
    first_steps: int = 50
    short_steps: int = 150
    decay_steps: int = 800
    text_weight: float = 0.1
    text_share: float = 0.15


BEFORE_CHOICES = 20
"""Tokens from the end of a multiple-choice prompt back to the last word of its question, over four options."""


def build_model(plan: Plan, words: Sequence[int]) -> OPTForCausalLM:
    """A fresh OPT: random weights but for `give_head_start`. `words[token]` numbers the token's text without space."""
    config = OPTConfig(
        vocab_size=len(words),
        hidden_size=plan.hidden_size,
        word_embed_proj_dim=plan.hidden_size,
        ffn_dim=4 * plan.hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        max_position_embeddings=POSITIONS,
        init_std=0.02,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    model = OPTForCausalLM(config)
    # For sequences this short the plain product of queries and keys trains faster on a CPU than the fused kernel.
    model.set_attn_implementation("eager")
    with torch.no_grad():
        give_head_start(model, plan, words)
    return model


PLACES, CONTENT, PREVIOUS, BEFORE_PREVIOUS, ASKED = (
    slice(0, 48),
    slice(48, 96),
    slice(96, 128),
    slice(32, 48),
    slice(16, 32),
)
"""Where the untrained model keeps a token's place, its content and the content of the tokens one, two and
`BEFORE_CHOICES` before it."""


def give_head_start(model: OPTForCausalLM, plan: Plan, words: Sequence[int]) -> None:
    """Starts the model with the two circuits that the tasks here need, so that minutes of training suffice.

    Random weights take most of a long training to find the induction circuit (Olsson et al., 2022, arXiv 2209.11895):
    a head that passes each token's content on to its successor, and a later head that looks for the place whose
    predecessor equals the current token, and copies what stands there. The second circuit is for multiple choice: the
    end of the prompt looks for the option that equals the last word of the question, and copies the letter before it.
    A word with and without a space before it starts with the same content. Alone, this start answers nothing right;
    everything is trained from there on. Structured starts of attention are known to save training (Trockman and
    Kolter, 2023, arXiv 2305.09828).
    """
    decoder = model.model.decoder
    tokens, table = decoder.embed_tokens.weight, decoder.embed_positions.weight
    tokens.normal_(std=0.02)
    tokens[:, CONTENT] = 0.15 * torch.randn(max(words) + 1, 48)[words]
    table.normal_(std=0.005)
    angle = torch.arange(table.shape[0]).unsqueeze(1) * frequencies()
    table[:, PLACES] = 0.2 * torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
    mixing = torch.linalg.qr(torch.randn(48, 48)).Q
    for head, distance in enumerate((1, 2, 3, BEFORE_CHOICES)):
        look_back(model, plan, head, distance)
    first, second = decoder.layers[0].self_attn, decoder.layers[1].self_attn
    coarse, fine = mixing[:32], mixing[32:]
    join(first, 0, values=(CONTENT, coarse), writes=(PREVIOUS, 0.4 * torch.eye(32)))
    join(first, 1, values=(CONTENT, fine), writes=(BEFORE_PREVIOUS, 0.4 * torch.eye(16)))
    join(first, 3, values=(CONTENT, fine), writes=(ASKED, 0.4 * torch.eye(16)))
    for head, copied in enumerate((slice(48, 80), slice(64, 96))):
        match(second, head, queries=(CONTENT, 2.0 * coarse), keys=(PREVIOUS, 2.0 * torch.eye(32)))
        join(second, head, values=(copied, torch.eye(32)), writes=(copied, 3.0 * torch.eye(32)))
    match(second, 2, queries=(ASKED, 3.0 * torch.eye(16)), keys=(CONTENT, 3.0 * fine))
    join(second, 2, values=(BEFORE_PREVIOUS, torch.eye(16)), writes=(CONTENT, 2.0 * fine.T))


Part = tuple[slice, torch.Tensor]
"""A range of the hidden dimensions and the matrix between it and a head: (head, range) reads, (range, head) writes."""


def match(attention: OPTAttention, head: int, queries: Part, keys: Part) -> None:
    """Sets a head's queries and keys to read these dimensions and nothing else."""
    for projection, (columns, matrix) in ((attention.q_proj, queries), (attention.k_proj, keys)):
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        projection.weight[rows] = 0
        projection.weight[rows.start : rows.start + len(matrix), columns] = matrix


def join(attention: OPTAttention, head: int, values: Part, writes: Part) -> None:
    """Sets a head's values to read these dimensions, and its output to write those."""
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    attention.v_proj.weight[rows] = 0
    attention.out_proj.weight[:, rows] = 0
    read, reading = values
    written, writing = writes
    attention.v_proj.weight[rows.start : rows.start + len(reading), read] = reading
    attention.out_proj.weight[written, rows.start : rows.start + writing.shape[1]] = writing


def frequencies() -> torch.Tensor:
    """Radians per position, float32 of shape (24,), from sharp to slow; as in Vaswani et al., 2017, section 3.5."""
    return 2.5 * torch.exp(torch.arange(24) * (-math.log(2000.0) / 24))


def look_back(model: OPTForCausalLM, plan: Plan, head: int, distance: int) -> None:
    """Sets a head of the first layer to attend `distance` positions back.

    Key and query are the position's own sinusoids, the query's turned back by `distance`; their product is
    `sum(cos(frequency * (query - distance - key)))`, which peaks there.
    """
    size = plan.hidden_size // plan.heads
    turns = torch.zeros(size, size)
    for pair, angle in enumerate((frequencies()[: size // 2] * distance).tolist()):
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        turns[2 * pair : 2 * pair + 2, 2 * pair : 2 * pair + 2] = turn
    places = slice(0, size)
    match(model.model.decoder.layers[0].self_attn, head, (places, 2.0 * turns), (places, 2.0 * torch.eye(size)))
