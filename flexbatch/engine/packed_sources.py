"""Weights in 8 or 4 bits: packed once into a cache file, streamed or resident in that form, expanded once per pass.

The matrices of the decoder layers are packed; norms, biases, embeddings and the head stay as they are. Where they are
used they are either dequantised into one scratch buffer per kind of matrix (all layers share it, because one stop is
in use at a time), or multiplied as they are by 8-bit integers (`offload.compute=int8`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexbatch.engine.checkpoint_map import ParameterSource, Place, parameter
from flexbatch.engine.model import SteppedModel
from flexbatch.memory.int8_linear import Int8Layout, int8_linear
from flexbatch.memory.packed_file import PackedTensor, open_packed
from flexbatch.memory.packing import Layout
from flexbatch.memory.quantization import QuantizedLayout, QuantizedTensor, dequantize, quantizable
from flexbatch.memory.safetensors_header import TensorEntry
from flexbatch.memory.safetensors_index import SafetensorsIndex

GROUP_SIZE = 32


@dataclass
class Scratch:
    """Buffers for expanded weights, one for each kind of matrix."""

    buffers: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def get(self, kind: str, shape: tuple[int, ...], place: Place) -> torch.Tensor:
        key = (kind, shape, place.dtype)
        if key not in self.buffers:
            self.buffers[key] = torch.empty(shape, dtype=place.dtype, device=place.device)
        return self.buffers[key]


@dataclass
class QuantizedSource(ParameterSource):
    """A weight in groups of 4 or 8 bits. `kind` is its name inside the layer."""

    packed: PackedTensor | None = None
    kind: str = ""
    scratch: Scratch = field(default_factory=Scratch)

    stays_packed = True

    def target_dtype(self, dtype: torch.dtype) -> torch.dtype | None:  # noqa: ARG002 - the interface's
        return None

    def bind(self, place: Place, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> None:  # noqa: ARG002
        assert self.packed is not None
        layout = self.packed.layout
        assert isinstance(layout, QuantizedLayout)
        values, scale, minimum = (tensors[self.packed.parts[part].name] for part in ("q", "scale", "minimum"))
        out = self.scratch.get(self.kind, layout.shape, place)
        place.module._parameters[place.name] = parameter(
            dequantize(QuantizedTensor(values, scale, minimum, layout), out)
        )


@dataclass
class Int8Source(QuantizedSource):
    """A linear layer's weight in 8-bit integers that are multiplied as they are."""

    def bind(self, place: Place, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> None:  # noqa: ARG002
        assert self.packed is not None
        place.module._parameters[place.name] = parameter(tensors[self.packed.parts["q"].name].mT)
        place.module.int8_scale = tensors[self.packed.parts["scale"].name]


def pack_sources(
    stepped: SteppedModel,
    sources: Mapping[str, ParameterSource],
    cache_folder: Path,
    *,
    weight_bits: int,
    integers: bool,
) -> dict[str, ParameterSource]:
    """`sources` with the decoder layers' matrices packed; makes the packed file if it is not there yet."""
    layouts: dict[str, Layout] = {}
    names: dict[str, str] = {}
    for name, kind, module in _matrices(stepped):
        source = sources[name]
        if source.converter is not None:
            continue
        entry = source.entries[0]
        layout = _layout(entry, module, weight_bits, integers)
        if layout is not None:
            layouts[entry.name], names[name] = layout, kind
    index = SafetensorsIndex({s.entries[0].name: s.entries[0] for s in sources.values() if not s.converter}, {})
    packed = open_packed(index, layouts, cache_folder)
    scratch = Scratch()
    made = dict(sources)
    for name, kind in names.items():
        form = packed[sources[name].entries[0].name]
        cls = Int8Source if isinstance(form.layout, Int8Layout) else QuantizedSource
        made[name] = cls(name, list(form.parts.values()), packed=form, kind=kind, scratch=scratch)
        if cls is Int8Source:
            multiply_integers(stepped.model.get_submodule(name.rpartition(".")[0]))
    return made


def multiply_integers(module: nn.Module) -> None:
    """Makes a linear layer multiply in 8-bit integers by the weight and `int8_scale` that are bound to it."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, scale, bias = module.weight, module.int8_scale, module.bias
        return int8_linear(x, weight, scale, bias)  # type: ignore[arg-type]

    module.forward = forward


def _matrices(stepped: SteppedModel) -> list[tuple[str, str, nn.Module]]:
    """Name, name inside the layer, and module of every matrix of the decoder layers."""
    found = []
    for stop in stepped.stops:
        if stop.layer is None:
            continue
        for path, module in stop.module.named_modules():
            for leaf, value in module.named_parameters(recurse=False):
                if value.dim() >= 2:
                    kind = f"{path}.{leaf}" if path else leaf
                    found.append((f"{stop.name}.{kind}", kind, module))
    return found


def _layout(entry: TensorEntry, module: nn.Module, weight_bits: int, integers: bool) -> Layout | None:
    shape = tuple(entry.shape)
    if integers and type(module) is nn.Linear and shape[-1] > 1:
        return Int8Layout(shape)
    if weight_bits < 16 and quantizable(shape, GROUP_SIZE):
        return QuantizedLayout(shape, weight_bits, GROUP_SIZE)
    return None
