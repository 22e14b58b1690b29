"""Linear layers in 8-bit integers on the CPU (W8A8): past the bf16 roofline where the processor has VNNI or the like.

Weights have one scale per output channel, activations one per row, both symmetric; the product is exact in int32.
Dettmers et al., arXiv 2208.07339, section 2.1 (vector-wise quantisation), without its separate path for outliers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flexbatch.kernels.int8_rows import round_rows, scale_sums

LARGEST = 127
CHUNK = 1 << 19


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

    `weight` may have any strides; those of a turned over [in, out] (see `Int8Layout`) are the fastest.
    Returns [..., out] in x's dtype. Rows of `x` are quantised one by one, so a row's result does not depend on others.
    `in` is at least 2: on one column torch 2.13's integer product is wrong.
    """
    values, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    product = torch._int_mm(values, weight.t())
    offset = torch.zeros_like(weight_scale) if bias is None else bias.float()
    return _scaled(product, scale, weight_scale, offset, x).view(*x.shape[:-1], weight.shape[0])


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
