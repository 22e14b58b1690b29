"""What becomes of a product's sum: `told(sum, offset, column)` is the number that its result gets."""

from __future__ import annotations

from typing import Any

from numba import njit

from flexbatch.kernels.floats import narrowed


@njit(nogil=True, inline="always")
def rounded(total: Any, offset: Any, column: int) -> Any:
    """The bfloat16 nearest to float32 `total` plus the column's offset."""
    return narrowed(total + offset[column])


@njit(nogil=True, inline="always")
def exact(total: Any, _offset: Any, _column: int) -> Any:
    """The sum itself."""
    return total
