"""Matrix products on a CPU with AVX2 that multiplies neither bfloat16 nor 8-bit integers by itself.

torch's products of bfloat16 reach a sixth of the rate of float32 on such a processor, those of int8 a hundredth
(docs/benchmarks.md). Ours widen the weight on its way: into registers for a few rows, into a cache for many. Either
adds up a row in one order whatever rows are beside it; the two orders of bfloat16 differ, so a row's last bit depends
on whether rows are few.
"""

from __future__ import annotations

from functools import cache

import torch

from flexbatch.kernels import panel_products, row_products
from flexbatch.kernels.row_tiles import BFLOATS, BYTES, Numbers
from flexbatch.kernels.vectors import multiplies_floats, multiplies_integers

FEW_ROWS = 48
"""Up to so many are few: beyond, widening the weight once for all of them is as fast (docs/benchmarks.md)."""


@cache
def suit(dtype: torch.dtype) -> bool:
    """Whether these are this CPU's way to multiply numbers of this type: torch has none that is fast."""
    if not multiplies_floats():
        return False
    if dtype == torch.int8:
        return not multiplies_integers()
    by_torch = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call]
    return dtype == torch.bfloat16 and not by_torch


def float_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`rows` bfloat16 `[rows, in]` times `weight` bfloat16 `[out, in]` plus `bias` bfloat16 `[out]`, all contiguous:
    summed in float32, rounded once to bfloat16 `[rows, out]`."""
    if _are_few(rows, BFLOATS):
        return row_products.float_product(rows, weight, bias)
    return panel_products.float_product(rows, weight, bias)


def integer_sums(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`values` int8 `[rows, in]` times `weight` int8 `[out, in]`, both contiguous: exact, int32 `[rows, out]`."""
    if _are_few(values, BYTES):
        return row_products.integer_sums(values, weight)
    return panel_products.integer_sums(values, weight)


def _are_few(rows: torch.Tensor, numbers: Numbers) -> bool:
    return len(rows) <= FEW_ROWS and rows.shape[1] > 0 and rows.shape[1] % numbers.step == 0
