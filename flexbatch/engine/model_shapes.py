"""Counts a model's parameters on the meta device: exact for every architecture, and no weight is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from flexbatch.engine.experts import Expert, Experts, routers
from flexbatch.engine.model import SteppedModel, build, matrix_parameters
from flexbatch.errors import ModelError
from flexbatch.plan.attention_shape import AttentionShape, attention_shape, positive_field
from flexbatch.plan.model_spec import LayerSpec, Mixture, ModelSpec, OutsideSpec


def spec_from_config(
    config: PreTrainedConfig | dict[str, Any], name: str = "", stored_dtype: str = "", compute_dtype: str = ""
) -> ModelSpec:
    """The sizes of the model that `config` describes. Number formats are named as in torch (`bfloat16`); without
    `stored_dtype` the config's own `dtype` is taken, without `compute_dtype` the stored one.

    Raises `ModelError` that names the field for a config that lacks one or that no model can be built from.
    """
    if isinstance(config, dict):
        config = _config_object(config)
    attention = attention_shape(config.to_dict())
    dtype = _dtype(stored_dtype or getattr(config, "dtype", None))
    try:
        stepped = build(config, dtype)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"no {config.model_type!r} model can be built from this config: {error}",
            remedy="Correct the field that the message names in the model's config.json or in model.config.",
        ) from error
    layers = tuple(_layer(stepped, config, attention, number) for number in range(stepped.num_layers))
    outside = _outside(stepped)
    total = sum(parameter.numel() for parameter in stepped.model.parameters())
    streamed = sum(layer.parameters for layer in layers)
    streamed += sum(module.parameters for module in outside if not module.shared)
    plain = config.to_dict()
    plain = plain.get("text_config") or plain
    hidden = positive_field(plain, "hidden_size")
    return ModelSpec(
        name=name or config.model_type,
        family=config.model_type,
        hidden_size=hidden,
        intermediate_size=max(hidden, *(_widest_output(stop.module) for stop in stepped.stops if stop.layer == 0)),
        vocab_size=positive_field(plain, "vocab_size"),
        max_positions=int(plain.get("max_position_embeddings") or plain.get("n_positions") or 0),
        layers=layers,
        outside=outside,
        small_parameters=total - streamed,
        head_parameters=_head_parameters(stepped),
        side_by_side=stepped.lays_side_by_side,
        stored_dtype=_name(dtype),
        compute_dtype=compute_dtype or _name(dtype),
    )


def _config_object(config: dict[str, Any]) -> PreTrainedConfig:
    fields = dict(config)
    kind = fields.pop("model_type", None)
    if not kind:
        raise ModelError("the model's config has no model_type.", remedy="Add it, for example model_type: opt.")
    attention_shape({**fields, "model_type": kind})
    try:
        made: PreTrainedConfig = AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"the config of this {kind!r} model is not valid: {error}",
            remedy="Correct the field that the message names.",
        ) from error
    return made


def _dtype(value: Any) -> torch.dtype:
    """From a torch dtype or its name; float32, Transformers' own default, where nothing is said."""
    if isinstance(value, str):
        value = getattr(torch, value, None)
    return value if isinstance(value, torch.dtype) else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layer(stepped: SteppedModel, config: PreTrainedConfig, attention: AttentionShape, index: int) -> LayerSpec:
    layer = stepped.layer(index)
    mixture = _mixture(layer, config)
    matrices = matrix_parameters(layer)
    whole = {id(router.weight) for router in routers(layer)}
    parts = [list(part.module.parameters()) for part in stepped.parts(index)]
    return LayerSpec(
        parts=tuple(tuple((each.numel(), each.ndim >= 2 and id(each) not in whole) for each in part) for part in parts),
        active_parameters=matrices - (mixture.parameters - mixture.active_parameters if mixture else 0),
        query_size=attention.query_size,
        kv_size=attention.kv_size,
        mixture=mixture,
        window=attention.windows[index],
        head_sizes=attention.head_sizes,
        expanded_size=attention.expanded_size,
        expansion_parameters=attention.expansion_parameters,
    )


def _mixture(layer: nn.Module, config: PreTrainedConfig) -> Mixture | None:
    """The layer's experts, apart or stacked."""
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None) or 1
    for module in layer.modules():
        stacks = [value for value in module.parameters(recurse=False) if value.ndim == 3]
        if isinstance(module, Experts):
            numbers = sum(value.numel() for value in module.parameters())
            return Mixture(len(module), min(chosen, len(module)), numbers)
        if stacks and hasattr(module, "num_experts"):
            return Mixture(len(stacks[0]), min(chosen, len(stacks[0])), sum(value.numel() for value in stacks))
    return None


def _outside(stepped: SteppedModel) -> tuple[OutsideSpec, ...]:
    seen: set[int] = set()
    modules = []
    last = False
    for stop in stepped.stops:
        if stop.layer is not None or stop.inside is not None:
            last = True
            continue
        own = list(stop.module.parameters(recurse=False))
        shared = any(id(parameter) in seen for parameter in own)
        seen.update(id(parameter) for parameter in own)
        count = sum(parameter.numel() for parameter in own)
        modules.append(OutsideSpec(stop.name, count, shared, last))
    return tuple(modules)


def _head_parameters(stepped: SteppedModel) -> int:
    head: nn.Module | None = stepped.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return sum(parameter.numel() for parameter in head.parameters()) if head is not None else 0


def _widest_output(layer: nn.Module) -> int:
    """Features of the widest matrix product inside a layer: what its largest activation holds per token. An expert's
    first two products are side by side."""
    pairs = [2 * module.gate_proj.out_features for module in layer.modules() if isinstance(module, Expert)]
    return max([*pairs, *(parameter.shape[-2] for parameter in layer.parameters() if parameter.ndim >= 2)], default=0)
