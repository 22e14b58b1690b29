"""Which tensors of a checkpoint make which parameter of the model.

Transformers itself knows how published names map to its modules (prefixes added or dropped, renamed parts, the experts
of a mixture merged into one tensor); its rules are used here, on names alone, so that every family that it can load is
one that flexbatch can stream. A parameter is either one stored tensor as it is, or made from several by a converter.
Experts that are apart here (`experts.py`) are stored tensors as they are, or slices of a stored stack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from flexbatch.engine.experts import Stack, stacks
from flexbatch.errors import ModelError
from flexbatch.memory.safetensors_index import TensorEntry
from flexbatch.memory.tensor_names import is_leftover, some


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter belongs: the module that holds it, its name there, its type and its device."""

    module: nn.Module
    name: str
    dtype: torch.dtype
    device: torch.device


def parameter(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return parameter(torch.empty(0, dtype=dtype, device=device))


@dataclass
class ParameterSource:
    """The stored tensors of one parameter, in the order in which they are combined.

    Without a `converter` there is one tensor and it is the parameter. `patterns[i]` is the converter's source pattern
    that `entries[i]` matched.
    """

    name: str
    entries: list[TensorEntry] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    converter: WeightConverter | None = None

    stays_packed = False

    def target_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """What the stored tensors are converted to on their way, for a parameter of `dtype` (None: as stored)."""
        return dtype if self.converter is None else None

    def bind(self, place: Place, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> None:
        """Makes the stored tensors the parameter at `place`."""
        place.module._parameters[place.name] = parameter(self.assemble(tensors, model).to(place.dtype))

    def bound(self) -> None:
        """Called once all weights of a stop are bound, and before one of them is used."""

    def unbind(self, place: Place) -> None:
        """Leaves nothing of what `bind` made at `place`, but what some models ask a weight for before they use it: its
        type and its device."""
        place.module._parameters[place.name] = _nothing(place.dtype, place.device)

    def assemble(self, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> torch.Tensor:
        """The parameter's value from its stored tensors by name."""
        if self.converter is None:
            return tensors[self.entries[0].name]
        converter = deepcopy(self.converter)
        for entry, pattern in zip(self.entries, self.patterns, strict=True):
            converter.add_tensor(self.name, entry.name, pattern, tensors[entry.name])  # type: ignore[arg-type]
        made: dict[str, Any] = converter.convert(self.name, model=model, config=model.config)
        value: torch.Tensor = made[self.name][0] if isinstance(made[self.name], list) else made[self.name]
        return value

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def map_checkpoint(
    model: PreTrainedModel, entries: Mapping[str, TensorEntry], where: str
) -> dict[str, ParameterSource]:
    """Sources by parameter (and persistent buffer) name; tied names share one source.

    `where` names the checkpoint in errors. Raises `ModelError` naming missing and mis-shaped tensors.
    """
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model) or []
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    stacked = stacks(model)
    known = {**wanted, **stacked}
    sources: dict[str, ParameterSource] = {}
    unexpected: list[str] = []
    for key in sorted(entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if (
            name in stacked
            and (made := _of_experts(stacked[name], entries[key], pattern, converter_of)).keys() <= known.keys()
        ):
            sources.update(made)
            continue
        if name not in wanted:
            unexpected.append(key)
            continue
        source = sources.setdefault(name, ParameterSource(name))
        source.entries.append(entries[key])
        source.patterns.append(pattern or key)
        source.converter = converter_of[pattern] if pattern is not None else None
    _expand_one_to_many(sources, wanted)
    _share_tied(model, sources)
    _check(model, sources, wanted, unexpected, where)
    return sources


def _of_experts(
    stack: Stack, entry: TensorEntry, pattern: str | None, converter_of: Mapping[str, WeightConverter]
) -> dict[str, ParameterSource]:
    """Sources of the experts' parameters that are in a stored tensor: all in a stack, or one that matched `pattern`."""
    if pattern is None and len(entry.shape) != 3:
        return {entry.name: ParameterSource(entry.name)}
    if pattern is None:
        return {part.name: ParameterSource(part.name, [part], [entry.name]) for part in stack.slices(entry)}
    name = stack.of_part(entry.name, pattern, converter_of[pattern])
    return {name: ParameterSource(name, [entry], [entry.name])}


def _expand_one_to_many(sources: dict[str, ParameterSource], wanted: Mapping[str, torch.Tensor]) -> None:
    """A converter with several targets (a fused tensor that the model keeps apart) feeds each of them."""
    for source in list(sources.values()):
        if source.converter is None or len(source.converter.target_patterns) < 2:
            continue
        first, *others = source.converter.target_patterns
        for other in others:
            name = source.name.replace(first.strip("^$\\"), other.strip("^$\\"))
            if name in wanted and name not in sources:
                sources[name] = ParameterSource(name, source.entries, source.patterns, source.converter)


def _share_tied(model: PreTrainedModel, sources: dict[str, ParameterSource]) -> None:
    by_parameter: dict[int, str] = {}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name in sources:
            by_parameter.setdefault(id(parameters[name]), name)
    for name in names:
        owner = by_parameter.get(id(parameters[name]))
        if owner is not None:
            sources[name] = sources[owner]


def _check(
    model: PreTrainedModel,
    sources: Mapping[str, ParameterSource],
    wanted: Mapping[str, torch.Tensor],
    unexpected: list[str],
    where: str,
) -> None:
    missing = [name for name in wanted if name not in sources and not _ignored(model, name, "missing")]
    if missing:
        raise ModelError(
            f"{where}: {len(missing)} tensors of {type(model).__name__} are missing: {some(missing)}.",
            remedy="The checkpoint does not belong to its config.json, or a shard is incomplete; fetch it again.",
        )
    strange = [name for name in unexpected if not _ignored(model, name, "unexpected")]
    if strange:
        raise ModelError(
            f"{where}: {len(strange)} tensors have no place in {type(model).__name__}: {some(strange)}.",
            remedy="The checkpoint does not belong to its config.json; check model.path.",
        )
    for name, source in sources.items():
        if source.converter is None and tuple(source.entries[0].shape) != tuple(wanted[name].shape):
            entry = source.entries[0]
            raise ModelError(
                f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}; "
                f"config.json asks for {list(wanted[name].shape)}.",
                remedy="The checkpoint and its config.json do not belong together; fetch both again.",
            )


def _ignored(model: PreTrainedModel, name: str, kind: str) -> bool:
    rules = getattr(model, f"_keys_to_ignore_on_load_{kind}", None) or ()
    return any(re.search(rule, name) for rule in rules) or (kind == "unexpected" and is_leftover(name))
