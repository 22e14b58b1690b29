"""What a pass costs, seen on the engine itself: small models are run with their matrix products and without.

Without them a pass is what surrounds the products: calls into the layers, copies into the KV arena, norms, residuals,
activation functions, and the memory that each of them has to find for its result. Timed one by one these take a quarter
of what they take in a pass, and in a pass half where no product has taken the caches from them: so something else does,
in its place. What the products add to it is their time in a pass, with their biases, and with threads that have to be
woken for each of them: up to a quarter more than in a loop of nothing else.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from flexbatch.engine.checkpoint_map import map_checkpoint
from flexbatch.engine.engine import Engine
from flexbatch.engine.growing import Vocabulary
from flexbatch.engine.kv_arena import KVArena
from flexbatch.engine.linear_layers import use_fastest_linears
from flexbatch.engine.micro_batch import install_stops
from flexbatch.engine.model import SteppedModel, build, decoder_layers
from flexbatch.engine.storage import Storage
from flexbatch.engine.weights import StreamOptions, Weights
from flexbatch.memory.direct_io import BufferedReader
from flexbatch.memory.safetensors_header import TensorEntry, read_header
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
NARROW, SHALLOW, DEEP = 64, 2, 8
LAYERS = {512: 4, 1024: 2, 2048: 1}
"""Layers of the model of each width that is run with and without its products: 25 to 100 MB of weights."""

PASSING_BYTES = 32 << 20
"""As many as a large matrix of a model of a billion parameters has."""

WARMING, TIMED = 4, 11
ROOM = 1 << 40
DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Seconds of a call into one layer and of a pass outside its layers; numbers that a layer's norms, residuals,
    copies and activation function take in per second, as `layer_activations` counts them; FLOP/s of the products of
    `TOKENS` rows by hidden size."""

    layer_seconds: float
    pass_seconds: float
    activation_numbers: float
    products: Mapping[int, float]


def rehearse(device: torch.device, folder: Path) -> Rehearsal:
    """Some hundred passes of small models on `device`. `folder` takes their weights for a moment, up to 100 MB."""
    shallow, deep = (_pass_seconds(device, folder, NARROW, layers, products=False) for layers in (SHALLOW, DEEP))
    layer = max(1e-6, (deep - shallow) / (DEEP - SHALLOW))
    outside = max(1e-6, shallow - SHALLOW * layer)
    without = {width: _pass_seconds(device, folder, width, LAYERS[width], products=False) for width in LAYERS}
    whole = {width: _pass_seconds(device, folder, width, LAYERS[width], products=True) for width in LAYERS}
    rates = {width: _product_flop(width) * LAYERS[width] / max(1e-6, whole[width] - without[width]) for width in LAYERS}
    widest = max(LAYERS)
    more = _pass_seconds(device, folder, widest, DEEP, products=False) - without[widest]
    surrounding = max(1e-6, more / (DEEP - LAYERS[widest]) - layer)
    return Rehearsal(layer, outside, TOKENS * layer_activations(widest, 4 * widest) / surrounding, rates)


def half_type(device: torch.device) -> torch.dtype:
    """The 16-bit type that the machine is measured in."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def random_values(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal numbers in rows that repeat, which arithmetic does not see: made in a moment."""
    few = torch.randn(min(64, shape[0]), *shape[1:], dtype=dtype, device=device) * DEVIATION
    return few.repeat(-(-shape[0] // len(few)), *(1 for _ in shape[1:]))[: shape[0]].contiguous()


def save_random(model: nn.Module, file: Path) -> dict[str, TensorEntry]:
    """Writes random weights for the model; where they lie in the file, by name."""
    cpu = torch.device("cpu")
    save_file({name: random_values(each.shape, each.dtype, cpu) for name, each in model.named_parameters()}, file)
    entries, _ = read_header(file)
    return entries


def _product_flop(width: int) -> float:
    """Of one layer and `TOKENS` rows: four square matrices, and two that are four times as large."""
    return 2.0 * TOKENS * 12 * width * width


class Passing:
    """Reads as many bytes as the weight of a product, on all threads, which leaves the caches as the product would.
    `seconds` says how long all of that took."""

    def __init__(self, nbytes: int) -> None:
        self._memory, self.seconds = torch.zeros(nbytes // 4), 0.0

    def __call__(self) -> None:
        started = time.perf_counter()
        self._memory.sum()
        self.seconds += time.perf_counter() - started


class WithoutProduct(nn.Module):
    """Stands in for a linear layer: gives as much memory, and computes nothing; memory passes by."""

    def __init__(self, out_features: int, passing: Passing) -> None:
        super().__init__()
        self._out_features, self._passing = out_features, passing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._passing()
        return x.new_zeros((*x.shape[:-1], self._out_features))


class NoText:
    """A decoder for tokens that nobody reads."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:  # noqa: ARG002 - a `Decoder`
        return ""


def _pass_seconds(device: torch.device, folder: Path, width: int, layers: int, *, products: bool) -> float:
    """The median pass of such a model, with its products or without."""
    stepped, passing = _model(device, width, layers), Passing(0 if products else PASSING_BYTES)
    if not products:
        leave_out_products(stepped, passing)
    with tempfile.TemporaryDirectory(dir=folder, prefix="flexbatch-rehearse-") as made:
        engine, seconds = _open(device, Path(made), stepped), []
        try:
            for result in islice(engine.run(_requests()), WARMING + TIMED):
                seconds.append(result.seconds - passing.seconds)
                passing.seconds = 0.0
        finally:
            engine.close()
    return statistics.median(seconds[WARMING:])


def _requests() -> Iterator[Request]:
    for index in count():
        yield Request(index, tuple(range(PROMPT)), Sampling(max_new_tokens=2))


def _model(device: torch.device, width: int, layers: int) -> SteppedModel:
    config = AutoConfig.for_model(
        "opt",
        num_hidden_layers=layers,
        vocab_size=64,
        hidden_size=width,
        ffn_dim=4 * width,
        num_attention_heads=max(1, width // HEAD),
        word_embed_proj_dim=width,
    )
    stepped = build(config, half_type(device))
    use_fastest_linears(stepped, half_type(device), device)
    return stepped


def _open(device: torch.device, folder: Path, stepped: SteppedModel) -> Engine:
    """An engine for the model, its weights random and resident."""
    entries = save_random(stepped.model, folder / "model.safetensors")
    storage = Storage(device, {tier: TierBudget(tier, ROOM) for tier in Tier}, folder)
    sources = map_checkpoint(stepped.model, entries, str(folder))
    weights = Weights(stepped, sources, ALL_DEVICE, storage, StreamOptions(BufferedReader()))
    install_stops(stepped, None, lambda: None)
    slots, span = 2 * JOINING, PROMPT + 2
    arena = KVArena(place_slots(stepped.num_layers, slots, ALL_DEVICE), slots, span, column_slack(span), storage)
    vocabulary = Vocabulary(NoText(), frozenset())
    return Engine(stepped, weights, arena, storage, vocabulary, prefill_tokens=JOINING * PROMPT, share_prefixes=False)


def leave_out_products(stepped: SteppedModel, passing: Passing) -> None:
    """Replaces every linear layer within the model's decoder layers."""
    for layer in decoder_layers(stepped.model):
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, WithoutProduct(child.out_features, passing))
