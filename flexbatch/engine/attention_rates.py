"""How fast a machine attends: prompts to themselves, and decoding rows to a cache as it lies in the arena."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle

import torch
from torch.nn import functional

from flexbatch.engine.attention import attend
from flexbatch.engine.kv_form import Attend, CompressedForm, KVForm, PackedForm
from flexbatch.engine.rehearsal import half_type
from flexbatch.engine.timing import Work, seconds_of
from flexbatch.kernels import packed_attention
from flexbatch.kernels.compressed_attention import compressed_attention

HEADS, SIZE = 16, 64
PROMPT = 512
ROWS, COLUMNS = 8, slice(80, 592)
"""That decode, and of the arena what they see."""
LAYERS = 16
"""Whose caches are read in turn: together more than a processor's own cache keeps."""


@torch.inference_mode()
def prefill_attention_rate(device: torch.device) -> float:
    """FLOP/s over all pairs of a prompt's positions, those that are masked included."""
    shape = (1, HEADS, PROMPT, SIZE)
    query, key, value = (torch.randn(shape, dtype=half_type(device), device=device) for _ in range(3))
    mask = torch.ones(1, 1, PROMPT, PROMPT, dtype=torch.bool, device=device).tril()
    work = (
        partial(attend, query, key, value, None, SIZE**-0.5)
        if device.type == "cpu"
        else partial(functional.scaled_dot_product_attention, query, key, value, attn_mask=mask)
    )
    return 4.0 * HEADS * PROMPT * PROMPT * SIZE / seconds_of(work, device)


def decode_attention_work(device: torch.device) -> Work:
    """One query a row to keys and values that are read through the arena's strides, in bytes."""
    query, arena, mask = _decoding(device)
    layers = [arena, *(arena.clone() for _ in range(LAYERS - 1))]
    calls: list[Callable[[], object]]
    if device.type == "cpu":
        calls = [partial(attend, query, *_seen(layer), mask, SIZE**-0.5, causal=False) for layer in layers]
    else:
        attended = partial(functional.scaled_dot_product_attention, query, attn_mask=mask)
        calls = [partial(attended, *_seen(layer)) for layer in layers]
    return Work(torch.inference_mode()(_in_turn(calls)), float(arena[..., COLUMNS, :].nbytes), device)


@torch.inference_mode()
def packed_attention_rate(device: torch.device) -> float:
    """Numbers per second of the same to a cache of 8 bits; 0 where nothing reads it as it is kept."""
    if device.type != "cpu" or not packed_attention.is_available():
        return 0.0
    return _rate_of(packed_attention.packed_attention, PackedForm(8), device)


@torch.inference_mode()
def compressed_attention_rate(device: torch.device) -> float:
    """The same of a cache that is compressed without loss."""
    if device.type != "cpu":
        return 0.0
    return _rate_of(compressed_attention, CompressedForm(), device)


def _rate_of(attend: Attend, form: KVForm, device: torch.device) -> float:
    """Numbers per second of attention to a cache that is kept so."""
    query, arena, mask = _decoding(device)
    made = [form.pack(states) for states in arena]
    calls = []
    for _ in range(LAYERS):
        keys, values = (tuple(part.clone()[:, :, COLUMNS] for part in parts) for parts in made)
        calls.append(partial(attend, query, keys, values, mask, SIZE**-0.5))
    return arena[..., COLUMNS, :].numel() / seconds_of(_in_turn(calls), device)


def _decoding(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, a layer's arena of keys and values `[2, rows, heads, columns, head_dim]`, and what may be seen of it."""
    dtype = half_type(device)
    # Made in half precision, one normal number in 170 would be zero with torch 2.11.
    arena = torch.randn(2, ROWS, HEADS, COLUMNS.stop + COLUMNS.start, SIZE, device=device).to(dtype)
    query = torch.randn(ROWS, HEADS, 1, SIZE, dtype=dtype, device=device)
    return query, arena, torch.ones(ROWS, 1, 1, COLUMNS.stop - COLUMNS.start, dtype=torch.bool, device=device)


def _seen(arena: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of keys and of values."""
    return arena[0][..., COLUMNS, :], arena[1][..., COLUMNS, :]


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One call after the other, each time the next."""
    turn = cycle(calls)

    def run() -> object:
        return next(turn)()

    return run
