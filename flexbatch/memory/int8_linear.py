"""Linear layers in 8-bit integers on the CPU (W8A8): past the bf16 roofline where the processor has AMX, VNNI or the
like.

Weights have one scale per output channel (int8_layout.py), activations one per row, both symmetric; the product is
exact in int32.
"""

from __future__ import annotations

import torch

from flexbatch.kernels import integer_products, widened_products
from flexbatch.kernels.int8_rows import round_rows, scale_sums
from flexbatch.memory.blocked_weight import ZERO_POINT, integer_product
from flexbatch.memory.int8_layout import quantize_rows, row_runs, suits_kernels

SUMS = 1 << 22
"""Sums that are made and scaled at a time: 16 MB, which lie in a cache and in memory that was used before."""


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    rectified: bool = False,
) -> torch.Tensor:
    """`x` [..., in] (float) times `weight` [out, in] int8 with `weight_scale` [out] float32, plus `bias` [out]. With
    `rectified`, what ReLU makes of it.

    `weight` is what a layout's `weight` returns, or a plain tensor of any strides; the result is the same. Returns
    [..., out] in x's dtype. Rows of `x` are quantised one by one, so a row's result does not depend on others. `in` is
    at least 2: on one column torch 2.13's integer product is wrong.
    """
    rows = x.reshape(-1, x.shape[-1])
    offset = torch.zeros_like(weight_scale) if bias is None else bias.float()
    if _is_ours(weight) and suits_kernels(rows):
        together = integer_products.linear(rows.contiguous(), weight, weight_scale, offset, rectified)
        return together.view(*x.shape[:-1], len(weight_scale))
    step = max(1, SUMS // len(weight_scale))
    made = [_product(rows[at : at + step], weight, weight_scale, offset) for at in range(0, max(1, len(rows)), step)]
    whole = (made[0] if len(made) == 1 else torch.cat(made)).view(*x.shape[:-1], len(weight_scale))
    return whole.relu_() if rectified else whole


def _product(
    rows: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    values, scale = _rounded(rows, ZERO_POINT if weight.is_mkldnn else 0)
    return _scaled(int8_sums(values, weight, len(weight_scale)), scale, weight_scale, offset, rows)


def _rounded(rows: torch.Tensor, zero_point: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` with `zero_point` added to each number, in eight bits."""
    if suits_kernels(rows):
        return round_rows(rows.contiguous(), zero_point)
    values, scale = quantize_rows(rows)
    return (values.view(torch.uint8) + zero_point).view(torch.int8) if zero_point else values, scale


def int8_sums(values: torch.Tensor, weight: torch.Tensor, columns: int) -> torch.Tensor:
    """`values` int8 [rows, in] times `weight` as for `int8_linear`, of `columns` outputs: the exact sums, int32 or
    rounded to float32, [rows, columns]. With a weight in the blocked format `ZERO_POINT` has been added to the values,
    in eight bits."""
    if _is_ours(weight):
        return integer_products.integer_sums(values, weight, columns)
    if weight.is_mkldnn:
        return integer_product(values.view(torch.uint8), weight)
    if weight.is_contiguous() and widened_products.suit(torch.int8):
        return widened_products.integer_sums(values, weight)
    return torch._int_mm(values, weight.t())


def _is_ours(weight: torch.Tensor) -> bool:
    return not weight.is_mkldnn and weight.dim() == 1


def _scaled(
    sums: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor, offset: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """sums * row_scale * column_scale + offset in float32, rounded once to the type of `like`."""
    if suits_kernels(like):
        return scale_sums(sums, row_scale, column_scale, offset)
    out = torch.empty(sums.shape, dtype=like.dtype, device=like.device)
    for part in row_runs(*sums.shape):
        numbers = sums[part].float().mul_(row_scale[part].unsqueeze(-1))
        out[part].copy_(torch.addcmul(offset, numbers, column_scale, out=numbers))
    return out
