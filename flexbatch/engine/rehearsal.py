"""What a pass costs besides its matrix products: the engine itself is run on a small model whose products are left out.

Calls into the layers, copies into the KV arena, norms, residuals, activation functions, and the memory that each of
them has to find for its result: timed one by one they take a quarter of what they take in a pass, and as a difference
between a pass and its products they are mostly noise.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from flexbatch.engine.checkpoint_map import map_checkpoint
from flexbatch.engine.engine import Engine, Vocabulary
from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.micro_batch import install_stops
from flexbatch.engine.model import SteppedModel, build, decoder_layers
from flexbatch.engine.storage import Storage
from flexbatch.engine.weights import StreamOptions, Weights
from flexbatch.memory.direct_io import BufferedReader
from flexbatch.memory.safetensors_header import read_header
from flexbatch.memory.tiers import TierBudget
from flexbatch.plan.model_spec import layer_activations
from flexbatch.plan.placement import place_slots
from flexbatch.plan.policy import ALL_DEVICE, Tier
from flexbatch.plan.workload import column_slack
from flexbatch.records import Request, Sampling

# In every pass as many rows join with a short prompt (little attention) as gain their second and last token.
JOINING, PROMPT = 16, 16
TOKENS = JOINING * PROMPT + JOINING
HEAD = 64
NARROW, WIDE = 64, 2048
SHALLOW, DEEP = 2, 8
WARMING, TIMED = 5, 21
ROOM = 1 << 40


@dataclass(frozen=True, slots=True)
class BesidesProducts:
    """Seconds of a call into one layer and of a pass outside its layers; numbers that a layer's norms, residuals,
    copies and activation function take in per second, as `layer_activations` counts them."""

    layer_seconds: float
    pass_seconds: float
    activation_numbers: float


def rehearse(device: torch.device, folder: Path) -> BesidesProducts:
    """Some hundred passes of a small model on `device`. `folder` takes a small file for a moment."""
    shallow, deep = (_pass_seconds(device, folder, NARROW, layers) for layers in (SHALLOW, DEEP))
    layer = max(1e-6, (deep - shallow) / (DEEP - SHALLOW))
    outside = max(1e-6, shallow - SHALLOW * layer)
    wide = max(1e-6, _pass_seconds(device, folder, WIDE, SHALLOW) - shallow)
    more = layer_activations(WIDE, 4 * WIDE) - layer_activations(NARROW, 4 * NARROW)
    return BesidesProducts(layer, outside, TOKENS * SHALLOW * more / wide)


class WithoutProduct(nn.Module):
    """Stands in for a linear layer: gives as much memory, and computes nothing."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self._out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros((*x.shape[:-1], self._out_features))


class _NoText:
    """A decoder for tokens that nobody reads."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:  # noqa: ARG002 - a `Decoder`
        return ""


def _pass_seconds(device: torch.device, folder: Path, width: int, layers: int) -> float:
    """The median pass of such a model."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="flexbatch-rehearse-") as made:
        engine = _open(device, Path(made), width, layers)
        try:
            passes = islice(engine.run(_requests()), WARMING, WARMING + TIMED)
            return statistics.median(result.seconds for result in passes)
        finally:
            engine.close()


def _requests() -> Iterator[Request]:
    for index in count():
        yield Request(index, tuple(range(PROMPT)), Sampling(max_new_tokens=2))


def _open(device: torch.device, folder: Path, width: int, layers: int) -> Engine:
    config = AutoConfig.for_model(
        "opt",
        num_hidden_layers=layers,
        vocab_size=64,
        hidden_size=width,
        ffn_dim=4 * width,
        num_attention_heads=max(1, width // HEAD),
        word_embed_proj_dim=width,
    )
    stepped = build(config, torch.float16 if device.type == "cuda" else torch.bfloat16)
    leave_out_products(stepped)
    parameters = {name: torch.zeros(each.shape, dtype=each.dtype) for name, each in stepped.model.named_parameters()}
    save_file(parameters, folder / "model.safetensors")
    entries, _ = read_header(folder / "model.safetensors")
    storage = Storage(device, {tier: TierBudget(tier, ROOM) for tier in Tier}, folder)
    sources = map_checkpoint(stepped.model, entries, str(folder))
    weights = Weights(stepped, sources, ALL_DEVICE, storage, StreamOptions(BufferedReader()))
    install_stops(stepped, None, lambda: None)
    slots, span = 2 * JOINING, PROMPT + 2
    arena = KVArena(place_slots(layers, slots, ALL_DEVICE), slots, span, column_slack(span), storage)
    vocabulary = Vocabulary(_NoText(), frozenset())
    return Engine(stepped, weights, arena, storage, vocabulary, prefill_tokens=JOINING * PROMPT, share_prefixes=False)


def leave_out_products(stepped: SteppedModel) -> None:
    """Replaces every linear layer within the model's decoder layers."""
    for layer in decoder_layers(stepped.model):
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, WithoutProduct(child.out_features))
