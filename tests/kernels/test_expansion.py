"""Packed numbers expanded to bfloat16 are those of float32 arithmetic, rounded once, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from flexbatch.kernels.floats import narrowed, widened
from flexbatch.memory.quantization import dequantize, quantize


@settings(max_examples=80)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([32, 64, 96, 100, 128, 192, 256])),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([2, 8, 32, 64]),
    magnitude=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 999),
)
def test_bfloat16_is_float32_rounded_once(
    shape: tuple[int, int, int], bits: int, group_size: int, magnitude: float, seed: int
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * magnitude
    packed = quantize(tensor, bits, group_size)
    exact = dequantize(packed, torch.empty(shape))
    assert torch.equal(dequantize(packed, torch.empty(shape, dtype=torch.bfloat16)), exact.bfloat16())


@njit
def there_and_back(numbers, bits):  # type: ignore[no-untyped-def]
    for index in range(len(numbers)):
        bits[index] = narrowed(numbers[index])
        numbers[index] = widened(bits[index])


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_rounding_is_that_of_torch(magnitude: float) -> None:
    numbers = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * magnitude
    between = numbers.bfloat16().view(torch.int16).to(torch.int32) << 16 | 0x8000  # exactly between two
    numbers = torch.cat([numbers, between.view(torch.float32), torch.zeros(1), -torch.zeros(1)])
    mine, bits = numbers.clone(), torch.empty(len(numbers), dtype=torch.uint16)
    there_and_back(mine.numpy(), bits.numpy())
    assert torch.equal(mine, numbers.bfloat16().float())
    assert torch.equal(bits.view(torch.bfloat16), numbers.bfloat16())
