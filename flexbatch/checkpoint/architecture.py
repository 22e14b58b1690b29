"""What a Transformers config says about its checkpoint, before any weight is read: names, shapes, layers, ties."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexbatch.errors import ModelError

_ENCODER_DECODERS = (
    "bart",
    "blenderbot",
    "led",
    "m2m_100",
    "marian",
    "mbart",
    "mt5",
    "pegasus",
    "prophetnet",
    "t5",
    "umt5",
)


def config_from_mapping(fields: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """The Transformers config of `fields` (with `model_type`). `where` names its source in errors. Never remote code.

    ModelError: no `model_type`, an unknown or encoder-decoder architecture, values that the config class refuses.
    """
    check_model_type(fields, where)
    try:
        return AutoConfig.for_model(**dict(fields))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise _unusable(fields["model_type"], where, error) from error


def check_model_type(fields: Mapping[str, Any], where: str) -> None:
    """ModelError unless `fields` describe a decoder-only causal language model that Transformers itself knows."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError(
            f"{where} has no model_type, so its architecture is unknown.",
            remedy="Take the model's published config.json; its model_type is a name such as opt, bloom or llama.",
        )
    if fields.get("is_encoder_decoder") or kind in _ENCODER_DECODERS:
        raise ModelError(
            f"{where}: model type {kind!r} is an encoder-decoder model; flexbatch runs decoder-only models.",
            remedy="Choose a causal language model, such as OPT, BLOOM, Llama, Mistral, Qwen or Gemma.",
        )
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    near = difflib.get_close_matches(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3, cutoff=0.4)
    known = "is no causal language model" if kind in CONFIG_MAPPING else "is unknown to the installed Transformers"
    own_code = " It brings Python code of its own, which flexbatch never runs." if fields.get("auto_map") else ""
    raise ModelError(
        f"{where}: model type {kind!r} {known}.{own_code}",
        remedy=f"Nearest supported types: {', '.join(near) or 'opt, bloom, llama, gpt2'}. "
        "A newer Transformers may know it.",
    )


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config` on the meta device: true names and shapes, no memory."""
    with torch.device("meta"):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise _unusable(config.model_type, "the model's config", error) from error
    model.tie_weights()
    return model


def _unusable(kind: str, where: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split()).rstrip(".")
    return ModelError(
        f"{where}: the config of model type {kind!r} cannot be used: {reason}.",
        remedy="Correct the config, or take the model's published config.json.",
    )


@dataclass(frozen=True)
class Expected:
    """What a checkpoint of one architecture holds.

    `shapes` are the model's own tensors by name (each tied tensor once, under the name that it is stored by), `tied`
    maps every other name of a tied tensor to that one. `layer_of` gives the layer's number for tensors of a layer.
    """

    model: PreTrainedModel
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    layer_of: Mapping[str, int]

    @property
    def class_name(self) -> str:
        return type(self.model).__name__


def expected_tensors(config: PreTrainedConfig) -> Expected:
    """Names, shapes, ties and layers of the checkpoint of `config`, read off a meta-device model."""
    model = skeleton(config)
    stored: dict[int, str] = {}
    tied: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        owner = stored.setdefault(id(named[name]), name) if name in named else name
        if owner == name:
            shapes[name] = tuple(tensor.shape)
        else:
            tied[name] = owner
    prefixes = layer_prefixes(model)
    layer_of = {name: number for name in shapes if (number := _layer_number(name, prefixes)) is not None}
    return Expected(model, shapes, tied, layer_of)


def layer_prefixes(model: PreTrainedModel) -> dict[str, int]:
    """`model.decoder.layers.7.` to 7, for every decoder layer: found by the classes that must not be split."""
    names = set(model._no_split_modules or ())
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) and type(module[0]).__name__ in names:
            return {f"{path}.{number}.": number for number in range(len(module))}
    raise ModelError(
        f"{type(model).__name__} does not say which of its modules are decoder layers.",
        remedy="This architecture cannot be streamed layer by layer; choose another model.",
    )


def _layer_number(name: str, prefixes: Mapping[str, int]) -> int | None:
    match = re.match(r"(.*?\.\d+\.)", name)
    return prefixes.get(match.group(1)) if match else None
