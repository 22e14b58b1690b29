"""How a parameter that is kept in a packed file comes to be used: as it lies there, or expanded once per pass.

Expanded weights lie in scratch buffers that all stops share, because one is in use at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from flexbatch.engine.checkpoint_map import ParameterSource, Place, parameter
from flexbatch.kernels.exponent_codes import Expansion, expand
from flexbatch.memory.blocked_weight import BlockedLayout
from flexbatch.memory.compressed_weight import CompressedLayout
from flexbatch.memory.float_layout import CompressedWeight, TiledLayout
from flexbatch.memory.int8_layout import IntegerLayout
from flexbatch.memory.packed_file import PackedTensor
from flexbatch.memory.quantization import QuantizedLayout, QuantizedTensor, dequantize


@dataclass
class Scratch:
    """Room for one stop's expanded weights, of so many `numbers`; there is one for all stops."""

    numbers: int = 0
    rooms: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def get(self, first: int, shape: tuple[int, ...], place: Place) -> torch.Tensor:
        """A matrix's place in it, `first` numbers from its beginning."""
        if place.dtype not in self.rooms:
            self.rooms[place.dtype] = torch.empty(self.numbers, dtype=place.dtype, device=place.device)
        return self.rooms[place.dtype][first : first + math.prod(shape)].view(shape)


@dataclass
class PackedSource(ParameterSource):
    """A weight that is used as it lies in a packed file: by 8-bit integers, or as bfloat16."""

    packed: PackedTensor | None = None

    stays_packed = True

    def target_dtype(self, dtype: torch.dtype) -> torch.dtype | None:  # noqa: ARG002 - the interface's
        return None

    def bind(self, place: Place, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> None:  # noqa: ARG002
        assert self.packed is not None
        layout, (first, *_) = self.packed.layout, self.packed.parts.values()
        assert isinstance(layout, IntegerLayout | BlockedLayout | TiledLayout)
        place.module._parameters[place.name] = parameter(layout.weight(tensors[first.name]))
        if "scale" in self.packed.parts:
            place.module.int8_scale = tensors[self.packed.parts["scale"].name]

    def unbind(self, place: Place) -> None:
        super().unbind(place)
        vars(place.module).pop("int8_scale", None)


@dataclass
class QuantizedSource(PackedSource):
    """A weight in groups of 4 or 8 bits that is expanded to be used, with `first` numbers of its stop's before it."""

    first: int = 0
    scratch: Scratch = field(default_factory=Scratch)

    def bind(self, place: Place, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> None:  # noqa: ARG002
        assert self.packed is not None
        layout = self.packed.layout
        assert isinstance(layout, QuantizedLayout)
        values, scale, minimum = (tensors[self.packed.parts[part].name] for part in ("q", "scale", "minimum"))
        out = self.scratch.get(self.first, layout.shape, place)
        place.module._parameters[place.name] = parameter(
            dequantize(QuantizedTensor(values, scale, minimum, layout), out)
        )


@dataclass
class Expanded(Scratch):
    """The same of compressed weights: those of a stop are expanded together. A buffer's weights are kept as they are
    multiplied."""

    waiting: list[Expansion] = field(default_factory=list)
    weights: dict[tuple[int, CompressedLayout], nn.Parameter] = field(default_factory=dict)

    def expand(self) -> None:
        if self.waiting:
            expand(self.waiting)
            self.waiting.clear()


@dataclass
class CompressedSource(PackedSource):
    """A weight that is expanded to be used, with nothing lost, or within the product, where that can be; `first`
    numbers of its stop's are before it."""

    first: int = 0
    scratch: Expanded = field(default_factory=Expanded)

    def bind(self, place: Place, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> None:  # noqa: ARG002
        assert self.packed is not None
        layout = self.packed.layout
        assert isinstance(layout, CompressedLayout)
        records = tensors[self.packed.parts["records"].name]
        if CompressedWeight.suits(layout.inner):
            vars(place.module)["compressed"] = CompressedWeight(records, layout.exceptions, layout.shape[0])
            place.module._parameters[place.name] = parameter(records)
            return
        out = self.scratch.get(self.first, (layout.room,), place)
        self.scratch.waiting.append(layout.expansion(records, out))
        key = (self.first, layout)
        if key not in self.scratch.weights:
            self.scratch.weights[key] = parameter(layout.weight(out))
        place.module._parameters[place.name] = self.scratch.weights[key]

    def bound(self) -> None:
        self.scratch.expand()

    def unbind(self, place: Place) -> None:
        super().unbind(place)
        vars(place.module).pop("compressed", None)
        self.scratch.waiting.clear()  # of a stop whose binding failed; its records are given back
