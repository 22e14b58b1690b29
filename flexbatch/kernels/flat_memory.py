"""A tensor's memory for a kernel that counts strides itself: only then Numba knows which numbers are side by side."""

from __future__ import annotations

from typing import Any

import torch


def flat(states: torch.Tensor) -> Any:
    """From the first to the last number of `states` in one dimension, where its strides still hold: uint8, or uint16
    for numbers of two bytes."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(states.shape, states.stride(), strict=True))
    return states.as_strided((span,), (1,)).view(torch.uint16 if states.itemsize == 2 else torch.uint8).numpy()


def bits(numbers: torch.Tensor) -> Any:
    """Contiguous bfloat16 `numbers` as uint16 of the same shape."""
    return numbers.view(torch.uint16).numpy()
