"""An unmodified Transformers causal LM, built without weights, and the modules at which its forward can be stopped.

A *stop* is a module whose weights are supplied by the engine: every decoder layer, and every module outside the layers
that holds more than a few parameters (token embedding, position table, output head). Small modules between the stops
(norms, projections of a few kilobytes) keep their weights for good. A forward meets the stops in one fixed order,
which is what lets many micro-batches walk through the model side by side.

Of a large layer every linear module is a stop of its own, and every expert, so that no more than two of them are in
memory at a time where two layers would be: room for more of the KV cache. Small ones of one module, such as its
attention, are one stop.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.falcon.modeling_falcon import FalconLinear

from flexbatch.engine.attention import merges_prefixes, register
from flexbatch.engine.experts import Expert, Experts, routers, take_apart
from flexbatch.errors import ModelError

# Kinds of layers whose cache holds the keys and values of every token.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# Modules outside the layers with fewer parameters than this stay on the device for good and are no stops.
SMALL_MODULE_PARAMETERS = 65_536
# Layers with fewer parameters than this are one stop: what each stop costs is then more than the memory brings.
LARGE_LAYER_PARAMETERS = 1 << 25


@dataclass(frozen=True, slots=True)
class Stop:
    """A module at which micro-batches wait until its weights are there. `layer` is the number of the decoder layer that
    it is, else None; `inside` that of the layer of which it is a part. A layer with parts has no weights itself."""

    name: str
    module: nn.Module
    layer: int | None = None
    inside: int | None = None


@dataclass(frozen=True)
class SteppedModel:
    """A meta-device model and its stops, in the order in which they are registered (layers in forward order)."""

    model: PreTrainedModel
    stops: tuple[Stop, ...]
    num_layers: int
    takes_position_ids: bool
    cache_argument: str
    merges_prefixes: bool

    @property
    def lays_side_by_side(self) -> bool:
        """Whether several calls' tokens may go through the model as one row: attention is ours, positions are given."""
        return self.merges_prefixes and self.takes_position_ids

    def layer(self, number: int) -> nn.Module:
        """A decoder layer's module."""
        return next(stop.module for stop in self.stops if stop.layer == number)

    def parts(self, number: int) -> tuple[Stop, ...]:
        """The stops that have a decoder layer's weights: its parts, or the layer itself where it is not divided."""
        parts = tuple(stop for stop in self.stops if stop.inside == number)
        return parts or tuple(stop for stop in self.stops if stop.layer == number)

    def paths_in_layers(self) -> dict[str, tuple[int, str]]:
        """The layer of each stop that is a part of one, and the part's name inside it."""
        layers = {stop.layer: stop.name for stop in self.stops if stop.layer is not None}
        return {
            stop.name: (stop.inside, stop.name.removeprefix(layers[stop.inside]))
            for stop in self.stops
            if stop.inside is not None
        }

    def stop_of_parameter(self) -> dict[str, str | None]:
        """Parameter name to the stop that owns it (None: owned by a small module). Tied names appear once each."""
        divided = {stop.inside for stop in self.stops if stop.inside is not None}
        owning = {stop.name for stop in self.stops if stop.layer not in divided}
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        return {name: next((path for path in _paths_to(name) if path in owning), None) for name in names}


def build(config: PreTrainedConfig, dtype: torch.dtype) -> SteppedModel:
    """The model of a Transformers config on the meta device, its non-parameter buffers real (rotary tables and such).

    Where the model's attention can be replaced, it is the one that merges shared prefixes.

    Raises `ModelError` for an architecture that is not a decoder-only causal LM of the installed Transformers.
    """
    check_architecture(config)
    model_class: type = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[assignment]
    merges = merges_prefixes(config, model_class)
    options: dict[str, Any] = {"attn_implementation": register()} if merges else {}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)  # type: ignore[no-untyped-call]
    layers = decoder_layers(model)
    _check_layers(config, layers)
    take_apart(model)
    _become_plain(model)
    model.tie_weights()
    model.eval()
    takes_position_ids = "position_ids" in inspect.signature(model.forward).parameters
    # Where a pass makes many calls, each would wait in the middle of a layer with all that it has computed there.
    stops = tuple(_stops(model, layers, divides=merges and takes_position_ids))
    return SteppedModel(model, stops, len(layers), takes_position_ids, cache_argument(model), merges)


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its KV cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24


def _check_layers(config: PreTrainedConfig, layers: nn.ModuleList) -> None:
    count = getattr(config.get_text_config(), "num_hidden_layers", len(layers))
    if len(layers) != count:
        raise ModelError(
            f"model type {config.model_type!r} has {count} layers for text, and a tower of {len(layers)} before them.",
            remedy="Choose the text model of this family by itself; flexbatch runs models of text alone.",
        )
    if not all(getattr(module, "is_causal", True) for layer in layers for module in layer.modules()):
        raise ModelError(
            f"model type {config.model_type!r} is an encoder here: its tokens see those after them.",
            remedy="Choose a causal LM, or set is_decoder in config.json if the model was trained as one.",
        )


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuse what the engine cannot run, before anything is read."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model type {kind!r} is an encoder-decoder model; flexbatch runs decoder-only causal language models.",
            remedy="Choose a causal LM, such as OPT, BLOOM, Llama, Mistral, Qwen or Gemma.",
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3)
        raise ModelError(
            f"model type {kind!r} is not a causal language model of the installed Transformers.",
            remedy=f"Nearest known types: {', '.join(near) or 'opt, llama, gpt2'}. A newer Transformers may know it.",
        )
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    unknown = sorted(kinds - ATTENTION)
    # A class of hybrids may have models of attention alone.
    if unknown or (not kinds and getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False)):
        raise ModelError(
            f"model type {kind!r} keeps more than keys and values of its tokens ({', '.join(unknown) or 'a state'}).",
            remedy="flexbatch runs models of attention alone, such as OPT, Llama, Mistral, Qwen2, Qwen3 or Gemma.",
        )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers, found by the class names that the model says must not be split."""
    names = set(model._no_split_modules or ())
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ in names:
            return module
    raise ModelError(
        f"{type(model).__name__} does not say which of its modules are decoder layers (_no_split_modules is "
        f"{sorted(names)}).",
        remedy="This architecture cannot be streamed layer by layer; use one with a list of decoder layers.",
    )


def _become_plain(model: PreTrainedModel) -> None:
    """Falcon's linear layers are torch's, but for a rounding before the bias is added."""
    for module in model.modules():
        if type(module) is FalconLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _stops(model: PreTrainedModel, layers: nn.ModuleList, *, divides: bool) -> Iterator[Stop]:
    layer_of = {id(layer): index for index, layer in enumerate(layers)}
    inside = {id(child) for layer in layers for child in layer.modules()}
    for name, module in model.named_modules():
        if id(module) in layer_of:
            index = layer_of[id(module)]
            yield Stop(name, module, index)
            if divides and _is_divisible(module):
                yield from (Stop(f"{name}.{path}", part, inside=index) for path, part in _parts(module))
        elif id(module) not in inside and _own_parameters(module) >= SMALL_MODULE_PARAMETERS:
            yield Stop(name, module)


def _is_divisible(layer: nn.Module) -> bool:
    """Whether the layer is large, and one call of each of its parts is all that happens to its matrices, but for small
    routers' (other lists of modules are experts too, of which a token meets some)."""
    known = [*(part for _, part in _single_parts(layer)), *routers(layer)]
    covered = {id(value) for module in known for value in module.parameters()}
    lists = any(isinstance(module, nn.ModuleList) and type(module) is not Experts for module in layer.modules())
    large = matrix_parameters(layer) >= LARGE_LAYER_PARAMETERS
    return large and covered.issuperset(map(id, _matrices(layer))) and not lists


def _single_parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layer's experts, and its linear modules outside them but routers, one by one."""
    kept, inside = routers(layer), ""
    for path, module in layer.named_modules():
        if inside and path.startswith(inside):
            continue
        if type(module) is Expert or (type(module) is nn.Linear and module not in kept):
            inside = path + "."
            yield path, module


def _parts(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The same, but all linear modules of another one together (its attention) where they take no more room than the
    largest part by itself, because each stop costs."""
    single = dict(_single_parts(layer))
    parents = {path: path.rpartition(".")[0] for path in single}
    most = max(map(matrix_parameters, single.values()), default=0)
    joined = {parent for parent in set(parents.values()) if parent and _goes_by_as_one(layer, parent, single, most)}
    for path in dict.fromkeys(parent if parent in joined else path for path, parent in parents.items()):
        yield path, layer.get_submodule(path)


def _goes_by_as_one(layer: nn.Module, path: str, parts: Mapping[str, nn.Module], most: int) -> bool:
    """Whether all matrices of a module within the layer are those of its own linear modules among the parts, of no more
    than so many parameters."""
    module = layer.get_submodule(path)
    linear = (part for name, part in parts.items() if name.rpartition(".")[0] == path and type(part) is nn.Linear)
    own = {id(part.weight) for part in linear}
    return own == {id(value) for value in _matrices(module)} and matrix_parameters(module) <= most


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    return [value for value in module.parameters() if value.ndim >= 2]


def matrix_parameters(module: nn.Module) -> int:
    """Numbers of all of the module's matrices."""
    return sum(value.numel() for value in _matrices(module))


def _paths_to(name: str) -> Iterator[str]:
    """The paths of the modules around a parameter, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
