"""How keys and values are kept: as the model made them, or packed to 8 or 4 bits, each token by itself.

A packed token's keys and values of one head are cut into groups along the head dimension, each with a scale and a
minimum. So a token's numbers depend on nothing but the token: they move with it when the arena is shifted or a slot is
moved, nothing is ever quantised twice, and what attention sees of a token is the same whether it was part of a prompt,
of a shared prefix, or generated, in one run or in several. (KIVI, arXiv 2402.02750, groups keys along tokens instead,
for each channel, which bears 4 bits; but then a token's numbers depend on where the row's groups begin and on which
tokens are still unpacked, so a resumed row would not get the tokens of an uninterrupted one.) Grouped so, keys need 8
bits: `kv_bits=4` packs values to 4 bits and keys to 8.
"""

from __future__ import annotations

from typing import Protocol

import torch

from flexbatch.memory.quantization import (
    CHUNK,
    CHUNK_ON_ACCELERATOR,
    QuantizedLayout,
    QuantizedTensor,
    dequantize,
    quantize,
)
from flexbatch.plan.model_spec import key_bits, kv_group_size

Parts = tuple[torch.Tensor, ...]
"""What is stored of keys or values: tensors `[rows, heads, tokens, ...]`, token by token."""


class KVForm(Protocol):
    """A way to keep states `[rows, heads, tokens, head_dim]`."""

    @property
    def is_packed(self) -> bool: ...

    def stored(self, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        """Size of the last dimension and dtype of each part."""
        ...

    def pack(self, states: torch.Tensor) -> Parts: ...

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        """Writes the states to `out`, contiguous and of their shape, on any device."""
        ...


class PlainForm:
    """As the model made them."""

    is_packed = False

    def stored(self, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:
        return ((head_dim, dtype),)

    def pack(self, states: torch.Tensor) -> Parts:
        return (states,)

    def unpack(self, parts: Parts, out: torch.Tensor) -> None:
        out.copy_(parts[0])


class PackedForm:
    """In `bits` (8 or 4) with float16 scales and minima; what comes back is float32 arithmetic, rounded once."""

    is_packed = True

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def stored(self, head_dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], ...]:  # noqa: ARG002 - whatever it was
        layout = QuantizedLayout((head_dim,), self.bits, kv_group_size(head_dim))
        return tuple((shape[-1], kind) for _, kind, shape in layout.parts)

    def pack(self, states: torch.Tensor) -> Parts:
        made = quantize(states, self.bits, kv_group_size(states.shape[-1]))
        return made.values, made.scale, made.minimum

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
    """How keys and values are kept for `kv_bits` 16 (plain), 8 or 4."""
    return (PlainForm(), PlainForm()) if bits == 16 else (PackedForm(key_bits(bits)), PackedForm(bits))
