"""Linear layers in 8-bit integers on the CPU (W8A8): past the bf16 roofline where the processor has VNNI or the like.

Weights have one scale per output channel, activations one per row, both symmetric; the product is exact in int32.
Dettmers et al., arXiv 2208.07339, section 2.1 (vector-wise quantisation), without its separate path for outliers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flexbatch.kernels import widened_products
from flexbatch.kernels.int8_rows import round_rows, scale_sums
from flexbatch.memory.blocked_weight import (
    ZERO_POINT,
    BlockedForm,
    blocked_bytes,
    blocked_form,
    integer_product,
    lay_out,
    suits,
)

LARGEST = 127
CHUNK = 1 << 19
SUMS = 1 << 22
"""Sums that are made and scaled at a time: 16 MB, which lie in a cache and in memory that was used before."""


@dataclass(frozen=True, slots=True)
class Int8Layout:
    """How a weight [..., out, in] is kept: int8 [..., in, out], turned over, and float32 scale [..., out].

    `int8_linear` takes the stored values as `q.mT`: with 8 rows that is 1.3 to 2 times as fast as the other way round.
    """

    shape: tuple[int, ...]

    @property
    def together(self) -> int:
        """So many trailing dimensions are packed together; slices of those before them can be packed one by one."""
        return 2

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The `parts` of a weight of this shape, or of some slices of its leading dimension."""
        values, scale = quantize_rows(tensor)
        return values.mT.contiguous(), scale

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        """Name, dtype and shape of each stored tensor."""
        *leading, rows, columns = self.shape
        return (("q", torch.int8, (*leading, columns, rows)), ("scale", torch.float32, (*leading, rows)))

    def weight(self, values: torch.Tensor) -> torch.Tensor:
        """The weight for `int8_linear` over its stored values."""
        return values.mT


@dataclass(frozen=True, slots=True)
class BlockedInt8Layout:
    """How a weight [out, in] is kept where oneDNN's blocked format is at hand: int8 [bytes] in that format, and float32
    scale [out]. `form` is the format's key: where another one is wanted, other bytes are."""

    shape: tuple[int, ...]
    form: str

    @property
    def together(self) -> int:
        return 2

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values, scale = quantize_rows(tensor)
        return blocked_bytes(lay_out(values)).view(torch.int8), scale

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        return (("q", torch.int8, (self._form.nbytes,)), ("scale", torch.float32, (self.shape[0],)))

    def weight(self, values: torch.Tensor) -> torch.Tensor:
        """The weight for `int8_linear` over its stored values, which must outlive it."""
        return self._form.over(values)

    @property
    def _form(self) -> BlockedForm:
        return blocked_form(self.shape, torch.int8)


@dataclass(frozen=True, slots=True)
class RowInt8Layout:
    """How a weight [..., out, in] is kept for our own products: int8 as it is, and float32 scale [..., out]."""

    shape: tuple[int, ...]

    @property
    def together(self) -> int:
        return 2

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantize_rows(tensor)

    @property
    def parts(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        return (("q", torch.int8, self.shape), ("scale", torch.float32, self.shape[:-1]))

    def weight(self, values: torch.Tensor) -> torch.Tensor:
        """The weight for `int8_linear` over its stored values."""
        return values


IntegerLayout = Int8Layout | BlockedInt8Layout | RowInt8Layout


def int8_layout(shape: tuple[int, ...]) -> IntegerLayout:
    """The layout that this machine multiplies fastest."""
    if len(shape) == 2 and suits(torch.int8):
        return BlockedInt8Layout(shape, blocked_form(shape, torch.int8).key)
    return RowInt8Layout(shape) if widened_products.suit(torch.int8) else Int8Layout(shape)


def quantize_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values of the tensor's shape and float32 scales [...], one for each row of the last dimension."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    if _suits_kernels(rows):
        values, scale = round_rows(rows.contiguous())
        return values.view(tensor.shape), scale.view(tensor.shape[:-1])
    values = torch.empty(rows.shape, dtype=torch.int8, device=tensor.device)
    scale = torch.empty(rows.shape[0], device=tensor.device)
    for part in _parts(*rows.shape):
        numbers = rows[part].float()
        # Not `aminmax`, which torch does not vectorise along a row: twenty times slower.
        largest = torch.maximum(-numbers.amin(dim=-1), numbers.amax(dim=-1))
        torch.clamp_min(largest.div_(LARGEST), torch.finfo(torch.float32).tiny, out=scale[part])
        values[part].copy_(numbers.mul(scale[part].reciprocal().unsqueeze(-1)).round_())
    return values.view(tensor.shape), scale.view(tensor.shape[:-1])


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x` [..., in] (float) times `weight` [out, in] int8 with `weight_scale` [out] float32, plus `bias` [out].

    `weight` is what a layout's `weight` returns, or a plain tensor of any strides; the result is the same. Returns
    [..., out] in x's dtype. Rows of `x` are quantised one by one, so a row's result does not depend on others. `in` is
    at least 2: on one column torch 2.13's integer product is wrong.
    """
    rows = x.reshape(-1, x.shape[-1])
    offset = torch.zeros_like(weight_scale) if bias is None else bias.float()
    step = max(1, SUMS // len(weight_scale))
    made = [_product(rows[at : at + step], weight, weight_scale, offset) for at in range(0, max(1, len(rows)), step)]
    return (made[0] if len(made) == 1 else torch.cat(made)).view(*x.shape[:-1], len(weight_scale))


def _product(
    rows: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    values, scale = _rounded(rows, ZERO_POINT if weight.is_mkldnn else 0)
    return _scaled(int8_sums(values, weight), scale, weight_scale, offset, rows)


def _rounded(rows: torch.Tensor, zero_point: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` with `zero_point` added to each number, in eight bits."""
    if _suits_kernels(rows):
        return round_rows(rows.contiguous(), zero_point)
    values, scale = quantize_rows(rows)
    return (values.view(torch.uint8) + zero_point).view(torch.int8) if zero_point else values, scale


def int8_sums(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`values` int8 [rows, in] times `weight` as for `int8_linear`: the exact sums, int32 or rounded to float32,
    [rows, out]. With a weight in the blocked format `ZERO_POINT` has been added to the values, in eight bits."""
    if weight.is_mkldnn:
        return integer_product(values.view(torch.uint8), weight)
    if weight.is_contiguous() and widened_products.suit(torch.int8):
        return widened_products.integer_sums(values, weight)
    return torch._int_mm(values, weight.t())


def _scaled(
    sums: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor, offset: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """sums * row_scale * column_scale + offset in float32, rounded once to the type of `like`."""
    if _suits_kernels(like):
        return scale_sums(sums, row_scale, column_scale, offset)
    out = torch.empty(sums.shape, dtype=like.dtype, device=like.device)
    for part in _parts(*sums.shape):
        numbers = sums[part].float().mul_(row_scale[part].unsqueeze(-1))
        out[part].copy_(torch.addcmul(offset, numbers, column_scale, out=numbers))
    return out


def _suits_kernels(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def _parts(rows: int, row: int) -> Iterator[slice]:
    """Runs of rows that stay in the processor's cache as float32 while they are scaled and rounded."""
    step = max(1, CHUNK // max(1, row))
    for first in range(0, rows, step):
        yield slice(first, first + step)
