"""Blocks of numbers change rows and columns, wherever they lie in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from flexbatch.kernels.aligned_memory import LINE, aligned
from flexbatch.kernels.transposition import transpose


@njit
def transposed(source: Any, at: int, stride: int, out: Any, to: int, out_stride: int) -> None:
    transpose(source, at, stride, out, to, out_stride)


@pytest.mark.parametrize("dtype", [np.uint32, np.float32])
@pytest.mark.parametrize(("at", "stride", "to", "out_stride"), [(0, 16, 0, 16), (3, 20, 7, 64), (17, 64, 1, 16)])
def test_rows_become_columns_and_nothing_else_is_written(
    dtype: Any, at: int, stride: int, to: int, out_stride: int
) -> None:
    source = np.arange(at + 16 * stride, dtype=dtype)
    out = np.full(to + 16 * out_stride + 5, 7_000_000, dtype)
    wanted = out.copy()
    for row in range(16):
        for column in range(16):
            wanted[to + column * out_stride + row] = source[at + row * stride + column]
    transposed(source, at, stride, out, to, out_stride)
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("count", [1, 16, 1000])
def test_aligned_memory_begins_with_a_line_and_has_its_size(count: int) -> None:
    made = [aligned(count) for _ in range(8)]
    assert {array.ctypes.data % LINE for array in made} == {0}
    assert {array.shape for array in made} == {(count,)}
