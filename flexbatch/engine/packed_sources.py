"""Weights in another form than the checkpoint's: packed once into a cache file, streamed or resident in that form.

The matrices of the decoder layers are packed; norms, biases, routers, embeddings and the head stay as they are. Packed
to 8 or 4 bits they are expanded to be used, or multiplied as they are by 8-bit integers (`offload.compute=int8`).
Unquantised ones can be laid out as they are multiplied fastest (`LaidOutLinear`), and compressed without loss, to be
expanded like packed ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from flexbatch.engine.checkpoint_map import ParameterSource
from flexbatch.engine.experts import routers
from flexbatch.engine.linear_layers import LaidOutLinear, is_linear
from flexbatch.engine.model import SteppedModel
from flexbatch.engine.packed_parameter import CompressedSource, Expanded, PackedSource, QuantizedSource, Scratch
from flexbatch.memory.blocked_weight import BlockedLayout
from flexbatch.memory.compressed_weight import Inner, PlainLayout, compressed_layouts
from flexbatch.memory.float_layout import TiledLayout, float_layout
from flexbatch.memory.int8_layout import int8_layout
from flexbatch.memory.int8_linear import int8_linear
from flexbatch.memory.packed_file import OnProgress, PackedTensor, holds_none, is_begun, open_packed
from flexbatch.memory.packing import Layout
from flexbatch.memory.quantization import QuantizedLayout, quantizable
from flexbatch.memory.safetensors_header import TensorEntry
from flexbatch.memory.safetensors_index import SafetensorsIndex

GROUP_SIZE = 32

Form = Callable[[TensorEntry, nn.Module], Layout | None]
"""How a stored matrix of a module is to be packed (None: not at all)."""


def pack_sources(
    stepped: SteppedModel,
    sources: Mapping[str, ParameterSource],
    form: Form,
    cache_folder: Path,
    on_progress: OnProgress | None = None,
) -> dict[str, ParameterSource]:
    """`sources` with the decoder layers' matrices packed; makes the packed file if it is not there yet."""
    made, chosen = dict(sources), _choose(stepped, sources, form)
    firsts, numbers = _places((each, math.prod(each.stored.shape)) for each in chosen)
    scratch = Scratch(numbers)
    for each, packed in _opened(sources, chosen, cache_folder, on_progress):
        entries = list(packed.parts.values())
        if isinstance(packed.layout, QuantizedLayout):
            made[each.name] = QuantizedSource(
                each.name, entries, packed=packed, first=firsts[each.name], scratch=scratch
            )
        else:
            made[each.name] = PackedSource(each.name, entries, packed=packed)
            multiply_integers(each.module)
    return made


def block_sources(
    stepped: SteppedModel,
    sources: Mapping[str, ParameterSource],
    most_bytes: int,
    cache_folder: Path,
    on_progress: OnProgress | None = None,
) -> dict[str, ParameterSource]:
    """`sources` with the weights of all `LaidOutLinear`s in a file of the format that they are
    multiplied in: one that is there already or
    begun, or a new one if it takes no more than `most_bytes`; else as they are.

    CapacityError or OutputError where the file cannot be made."""
    numbers = sum(module.weight.numel() for *_, module in _matrices(stepped) if isinstance(module, LaidOutLinear))
    if numbers * torch.bfloat16.itemsize > most_bytes and holds_none(cache_folder):
        return dict(sources)  # finding the format would lay a matrix of each shape out
    chosen = _choose(stepped, sources, _blocked)
    layouts = _layouts(chosen)
    size = sum(layout.nbytes for layout in layouts.values() if isinstance(layout, BlockedLayout | TiledLayout))
    made = dict(sources)
    if layouts and (size <= most_bytes or is_begun(_plain(sources), layouts, cache_folder)):
        for each, packed in _opened(sources, chosen, cache_folder, on_progress):
            made[each.name] = PackedSource(each.name, list(packed.parts.values()), packed=packed)
    return made


def compress_sources(
    stepped: SteppedModel,
    sources: Mapping[str, ParameterSource],
    cache_folder: Path,
    on_progress: OnProgress | None = None,
) -> dict[str, ParameterSource]:
    """`sources` with the decoder layers' matrices in bfloat16 in a compressed file, as far as that makes them smaller;
    makes the file if it is not there yet. CapacityError or OutputError where it cannot be made."""
    chosen = _choose(stepped, sources, _compressible)
    modules = {each.stored.name: each.module for each in chosen}
    stored = {name: entry for name, entry in _plain(sources).entries.items() if name in modules}
    inner = {name: _laid_out(tuple(entry.shape), modules[name]) for name, entry in stored.items()}
    progress = _Readings(on_progress)
    layouts = compressed_layouts(stored, inner, cache_folder, progress.first)
    smaller = [replace(each, layout=layouts[each.stored.name]) for each in chosen if each.stored.name in layouts]
    if not smaller:
        return dict(sources)
    firsts, numbers = _places((each, layouts[each.stored.name].room) for each in smaller)
    scratch = Expanded(numbers)
    made = dict(sources)
    for each, packed in _opened(sources, smaller, cache_folder, progress.second):
        entries = list(packed.parts.values())
        first = firsts[each.name]
        made[each.name] = CompressedSource(each.name, entries, packed=packed, first=first, scratch=scratch)
    return made


class _Readings:
    """Tells of two readings of the same tensors as of one; the first may not be needed."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._tell: OnProgress = on_progress or (lambda _done, _total: None)
        self._read = 0

    def first(self, done: int, total: int) -> None:
        self._read = done
        self._tell(done, 2 * total)

    def second(self, done: int, total: int) -> None:
        self._tell(self._read + done, self._read + total)


@dataclass(frozen=True)
class _Chosen:
    """A parameter to pack: its name, its stop's, the stored tensor, its module, and how."""

    name: str
    stop: str
    stored: TensorEntry
    module: nn.Module
    layout: Layout


def _choose(stepped: SteppedModel, sources: Mapping[str, ParameterSource], form: Form) -> list[_Chosen]:
    chosen = []
    for name, stop, module in _matrices(stepped):
        source = sources[name]
        if source.converter is None and (layout := form(source.entries[0], module)) is not None:
            chosen.append(_Chosen(name, stop, source.entries[0], module, layout))
    return chosen


def _places(sizes: Iterable[tuple[_Chosen, int]]) -> tuple[dict[str, int], int]:
    """Where each parameter of so many numbers begins in a room for those of one stop, and how many that has."""
    firsts, filled = dict[str, int](), Counter[str]()
    for each, size in sizes:
        firsts[each.name] = filled[each.stop]
        filled[each.stop] += size
    return firsts, max(filled.values(), default=0)


def _opened(
    sources: Mapping[str, ParameterSource],
    chosen: Sequence[_Chosen],
    cache_folder: Path,
    on_progress: OnProgress | None,
) -> Iterator[tuple[_Chosen, PackedTensor]]:
    packed = open_packed(_plain(sources), _layouts(chosen), cache_folder, on_progress=on_progress)
    return ((each, packed[each.stored.name]) for each in chosen)


def _layouts(chosen: Sequence[_Chosen]) -> dict[str, Layout]:
    """By the names of the stored tensors."""
    return {each.stored.name: each.layout for each in chosen}


def _plain(sources: Mapping[str, ParameterSource]) -> SafetensorsIndex:
    """The stored tensors that are parameters as they are."""
    return SafetensorsIndex({s.entries[0].name: s.entries[0] for s in sources.values() if not s.converter}, {})


def multiply_integers(module: nn.Module) -> None:
    """Makes a linear layer multiply in 8-bit integers by the weight and `int8_scale` that are bound to it."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, scale, bias = module.weight, module.int8_scale, module.bias
        return int8_linear(x, weight, scale, bias, getattr(module, "rectifies", False))  # type: ignore[arg-type]

    module.forward = forward


def _matrices(stepped: SteppedModel) -> list[tuple[str, str, nn.Module]]:
    """Name, stop and module of every matrix of the decoder layers but routers'."""
    found = []
    for layer in range(stepped.num_layers):
        whole = routers(stepped.layer(layer))
        for stop in stepped.parts(layer):
            found += [
                (f"{path}.{leaf}", stop.name, module)
                for path, module in stop.module.named_modules(prefix=stop.name)
                for leaf, value in module.named_parameters(recurse=False)
                if value.dim() >= 2 and module not in whole
            ]
    return found


def smaller_form(weight_bits: int, integers: bool) -> Form:
    """Matrices in 8 or 4 bits; with `integers`, those of linear layers for 8-bit arithmetic."""
    return partial(_smaller, weight_bits=weight_bits, integers=integers)


def _smaller(entry: TensorEntry, module: nn.Module, *, weight_bits: int, integers: bool) -> Layout | None:
    shape = tuple(entry.shape)
    if integers and is_linear(module) and shape[-1] > 1:
        return int8_layout(shape)
    if weight_bits < 16 and quantizable(shape, GROUP_SIZE):
        return QuantizedLayout(shape, weight_bits, GROUP_SIZE)
    return None


def _blocked(entry: TensorEntry, module: nn.Module) -> Layout | None:
    return float_layout(tuple(entry.shape)) if isinstance(module, LaidOutLinear) else None


def _compressible(entry: TensorEntry, module: nn.Module) -> Layout | None:
    is_half = all(value.dtype == torch.bfloat16 for value in module.parameters(recurse=False))
    return PlainLayout(tuple(entry.shape)) if is_half and len(entry.shape) == 2 else None


def _laid_out(shape: tuple[int, ...], module: nn.Module) -> Inner:
    """How a module's bfloat16 matrix lies when it is multiplied."""
    return float_layout(shape) if isinstance(module, LaidOutLinear) else PlainLayout(shape)
