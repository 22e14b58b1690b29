"""How keys and values are kept: as the model made them, compressed without loss, or packed to 8 or 4 bits, each token
by itself.

A packed token's keys and values of one head are cut into groups along the head dimension, each with a scale and a
minimum. So a token's numbers depend on nothing but the token: they move with it when the arena is shifted or a slot is
moved, nothing is ever quantised twice, and what attention sees of a token is the same whether it was part of a prompt,
of a shared prefix, or generated, in one run or in several. (KIVI, arXiv 2402.02750, groups keys along tokens instead,
for each channel, which bears 4 bits; but then a token's numbers depend on where the row's groups begin and on which
tokens are still unpacked, so a resumed row would not get the tokens of an uninterrupted one.) Grouped so, keys need 8
bits: `kv_bits=4` packs values to 4 bits and keys to 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from flexbatch.errors import IncompressibleCache
from flexbatch.kernels.compressed_attention import compressed_attention
from flexbatch.kernels.compressed_states import compress, expand
from flexbatch.kernels.packed_attention import packed_attention
from flexbatch.memory.quantization import (
    CHUNK,
    CHUNK_ON_ACCELERATOR,
    QuantizedLayout,
    QuantizedTensor,
    dequantize,
    quantize,
)
from flexbatch.plan.model_spec import (
    COMPRESSED,
    compressed_exceptions,
    compressed_head_bytes,
    is_compressible,
    key_bits,
    kv_group_size,
)

Parts = tuple[torch.Tensor, ...]
"""What is stored of keys or values: tensors `[rows, heads, tokens, ...]`, token by token."""

Attend = Callable[
    [torch.Tensor, Parts, Parts, torch.Tensor | None, float],
    tuple[torch.Tensor, torch.Tensor],
]
"""Attention of queries to the parts of keys and of values, with a mask and a scale, as `packed_attention` has it."""


class KVForm(Protocol):
    """A way to keep states `[rows, heads, tokens, head_dim]`."""

    @property
    def is_packed(self) -> bool:
        """Whether it is something else than the states themselves."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether what comes back is what was kept."""
        ...

    def stored(self, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, int, torch.dtype], ...]:
        """Heads, size of the last dimension and dtype of each part."""
        ...

    def pack(self, states: torch.Tensor) -> Parts: ...

    def pack_into(self, states: torch.Tensor, parts: Parts) -> None:
        """Writes what `pack` gives to `parts`, where a token's numbers lie together."""
        ...

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """Writes the states to `out`, contiguous and of their shape, on any device."""
        ...


class PlainForm:
    """As the model made them."""

    is_packed = False
    is_exact = True

    def stored(self, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, int, torch.dtype], ...]:
        return ((heads, head_dim, dtype),)

    def pack(self, states: torch.Tensor) -> Parts:
        return (states,)

    def pack_into(self, states: torch.Tensor, parts: Parts) -> None:
        parts[0].copy_(states)

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        out.copy_(parts[0])


class CompressedForm:
    """bfloat16 on the CPU in fewer bytes, without loss (`kernels/compressed_states.py`)."""

    is_packed = True
    is_exact = True

    def stored(self, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, int, torch.dtype], ...]:  # noqa: ARG002 - it is bfloat16
        listed = 1 + 3 * compressed_exceptions(heads * head_dim)
        return (heads, compressed_head_bytes(head_dim), torch.uint8), (1, listed, torch.uint8)

    def pack(self, states: torch.Tensor) -> Parts:
        return compress(states, self._exceptions(states))

    def pack_into(self, states: torch.Tensor, parts: Parts) -> None:
        compress(states, self._exceptions(states), parts)

    def _exceptions(self, states: torch.Tensor) -> int:
        _, heads, _, size = states.shape
        if states.dtype != torch.bfloat16 or not is_compressible(heads, (size, size)):
            raise IncompressibleCache(
                f"A cache of {heads} heads of {size} numbers in {states.dtype} cannot be kept compressed.",
                remedy="Set offload.compressed_cache=never.",
            )
        return compressed_exceptions(heads * size)

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        expand(parts, out)


class PackedForm:
    """In `bits` (8 or 4) with float16 scales and minima; what comes back is float32 arithmetic, rounded once."""

    is_packed = True
    is_exact = False

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def stored(self, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, int, torch.dtype], ...]:  # noqa: ARG002 - whatever it was
        layout = QuantizedLayout((head_dim,), self.bits, kv_group_size(head_dim))
        return tuple((heads, shape[-1], kind) for _, kind, shape in layout.parts)

    def pack(self, states: torch.Tensor) -> Parts:
        made = quantize(states, self.bits, kv_group_size(states.shape[-1]))
        return made.values, made.scale, made.minimum

    def pack_into(self, states: torch.Tensor, parts: Parts) -> None:
        for part, made in zip(parts, self.pack(states), strict=True):
            part.copy_(made)

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """Some rows at a time, so that what is moved and gathered of the parts stays small."""
        chunk = CHUNK if out.device.type == "cpu" else CHUNK_ON_ACCELERATOR
        step = max(1, chunk // max(1, out[:1].numel()))
        for first in range(0, out.shape[0], step):
            target = out[first : first + step]
            values, scale, minimum = (part[first : first + step].to(out.device).contiguous() for part in parts)
            layout = QuantizedLayout(tuple(target.shape), self.bits, kv_group_size(target.shape[-1]))
            dequantize(QuantizedTensor(values, scale, minimum, layout), target)


def kv_forms(bits: int) -> tuple[KVForm, KVForm]:
    """How keys and values are kept in 16 bits (plain), 8 or 4, or `COMPRESSED`."""
    if bits == COMPRESSED:
        return CompressedForm(), CompressedForm()
    return (PlainForm(), PlainForm()) if bits == 16 else (PackedForm(key_bits(bits)), PackedForm(bits))


def attention_to(bits: int) -> Attend:
    """The one that reads what is kept so, packed or compressed."""
    return compressed_attention if bits == COMPRESSED else packed_attention
