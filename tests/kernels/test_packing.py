"""Packing numbers by the kernel gives the bits that torch's own functions give, and hides nothing that is no number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import packing
from flexbatch.kernels.packed_numbers import GROUP, converts_float16
from flexbatch.memory.quantization import QuantizedTensor, quantize

pytestmark = pytest.mark.skipif(not converts_float16(), reason="this processor has no instruction for float16")


def by_torch(numbers: torch.Tensor, bits: int) -> QuantizedTensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "suits", lambda *_: False)
        return quantize(numbers, bits, GROUP)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.sampled_from([64, 128, 192])),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    magnitude=st.sampled_from([1e-8, 1e-3, 1.0, 300.0, 1e5]),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
    seed=st.integers(0, 1000),
)
def test_it_gives_the_bits_that_torch_gives(
    shape: tuple[int, ...], bits: int, dtype: torch.dtype, magnitude: float, offset: float, seed: int
) -> None:
    numbers = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset) * magnitude
    numbers[0, 0, :32], numbers[0, -1, ::3] = 0, magnitude  # constant groups and zeros occur
    numbers = numbers.to(dtype)
    assert packing.suits(numbers, GROUP)
    made, wanted = quantize(numbers, bits, GROUP), by_torch(numbers, bits)
    assert made.values.equal(wanted.values)
    for mine, theirs in ((made.scale, wanted.scale), (made.minimum, wanted.minimum)):
        assert mine.view(torch.int16).equal(theirs.view(torch.int16))


@pytest.mark.parametrize("bits", [8, 4])
def test_keys_as_a_model_lays_them_out_are_packed_alike(bits: int) -> None:
    keys = torch.randn(2, 900, 6, 64, generator=torch.Generator().manual_seed(1)).bfloat16().transpose(1, 2)
    made, wanted = quantize(keys, bits, GROUP), by_torch(keys, bits)
    assert made.values.equal(wanted.values)
    assert made.scale.equal(wanted.scale)
    assert made.minimum.equal(wanted.minimum)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_group_with_what_is_no_number_has_no_scale(bits: int) -> None:
    numbers = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    numbers[1, 40] = torch.nan
    scale = quantize(numbers, bits, GROUP).scale
    assert scale[1, 1].isnan()
    assert scale.isnan().sum() == 1
