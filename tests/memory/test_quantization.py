"""Quantised tensors come back within half a step, in every layout; the packed size is the one promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.errors import ConfigError
from flexbatch.memory.int8_layout import Int8Layout, quantize_rows
from flexbatch.memory.int8_linear import int8_linear
from flexbatch.memory.quantization import (
    QuantizedLayout,
    dequantize,
    quantizable,
    quantize,
    quantized_nbytes,
)


def half_steps(scale: torch.Tensor, layout: QuantizedLayout) -> torch.Tensor:
    """Half a scale for each entry of the tensor."""
    spread = scale.float().repeat_interleave(layout.group_size, dim=layout.dimension) / 2
    return spread.narrow(layout.dimension, 0, layout.shape[layout.dimension])


@settings(max_examples=120, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=2).flatmap(
        lambda leading: st.tuples(*(st.just(size) for size in leading), st.integers(1, 130), st.integers(1, 130))
    ),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([2, 32, 64]),
    dimension=st.sampled_from([-1, -2]),
    magnitude=st.sampled_from([1e-3, 1.0, 300.0]),
    offset=st.sampled_from([0.0, 5.0, -1000.0]),
    seed=st.integers(0, 1000),
)
def test_every_value_comes_back_within_half_a_step(
    shape: tuple[int, ...], bits: int, group_size: int, dimension: int, magnitude: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator) * magnitude + offset
    tensor[..., 0] = offset  # constant stretches and exact zeros occur in real weights
    packed = quantize(tensor, bits, group_size, dimension)
    assert packed.nbytes == quantized_nbytes(packed.layout)
    back = dequantize(packed, torch.empty(shape))
    bound = half_steps(packed.scale, packed.layout) * (1 + 1e-3) + (magnitude + abs(offset)) * 1e-6
    assert bool(((back - tensor).abs() <= bound).all())


@pytest.mark.parametrize("dimension", [-1, -2])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_on_the_grid_survive_exactly(bits: int, dimension: int) -> None:
    """Packing loses nothing: the only error is that of rounding to the grid."""
    grid = torch.randint(0, 2**bits, (3, 128, 96), generator=torch.Generator().manual_seed(bits)).float()
    grid[:, ::32], grid[:, 1::32], grid[..., ::32], grid[..., 1::32] = 0, 2**bits - 1, 0, 2**bits - 1
    grid[:, ::32, 1::32], grid[:, 1::32, ::32] = 2**bits - 1, 0
    tensor = grid * 0.125 - 4
    back = dequantize(quantize(tensor, bits, 32, dimension), torch.empty_like(tensor))
    assert back.equal(tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_tensors_come_back_in_any_type_into_any_memory(dtype: torch.dtype) -> None:
    """More rows than one chunk; the result is the float32 one rounded once, also where `out` is not contiguous."""
    tensor = torch.randn(1500, 1024, generator=torch.Generator().manual_seed(0))
    packed = quantize(tensor.bfloat16(), 4, 32)
    exact = dequantize(packed, torch.empty_like(tensor))
    assert dequantize(packed, torch.empty_like(tensor, dtype=dtype)).equal(exact.to(dtype))
    strided = torch.empty(1024, 1500, dtype=dtype).t()
    assert dequantize(packed, strided).equal(exact.to(dtype))


def test_four_bit_weights_are_as_good_as_rounding_with_float32_scales() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    groups = weight.view(512, -1, 32)
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low) / 15
    reference = (((groups - low) / step).round() * step + low).view_as(weight)
    ours = dequantize(quantize(weight, 4, 32), torch.empty_like(weight))
    assert (ours - weight).norm() <= (reference - weight).norm() * 1.002


def test_an_outlier_spoils_only_its_own_group_along_either_dimension() -> None:
    states = torch.randn(2, 3, 70, 64, generator=torch.Generator().manual_seed(0))
    keys, values = states.clone(), states.clone()
    keys[..., 5] *= 100
    values[..., 7, :] *= 100
    key_error = (dequantize(quantize(keys, 4, 32, dimension=-2), torch.empty_like(keys)) - keys).abs()
    value_error = (dequantize(quantize(values, 4, 32, dimension=-1), torch.empty_like(values)) - values).abs()
    assert key_error[..., :5].max() < 0.5
    assert value_error[..., :7, :].max() < 0.5


def test_numbers_too_large_for_the_scales_are_cut_and_never_become_infinite() -> None:
    tensor = torch.tensor([[1e30, -1e30, 0.0, 1.0]])
    assert dequantize(quantize(tensor, 4, 2), torch.empty_like(tensor)).isfinite().all()


def test_what_cannot_be_quantised_is_refused() -> None:
    for arguments in ((3, 32, -1), (4, 31, -1), (4, 32, -3)):
        with pytest.raises(ConfigError):
            quantize(torch.ones(4, 64), *arguments)
    with pytest.raises(ValueError, match="cannot be dequantised into"):
        dequantize(quantize(torch.ones(4, 64), 4, 32), torch.empty(64, 4))
    assert quantizable((64, 64), 32)
    assert not quantizable((64, 65), 32)
    assert not quantizable((64,), 32)


@given(rows=st.integers(1, 40), width=st.sampled_from([2, 8, 63, 300]), out=st.sampled_from([1, 5, 64]))
@settings(max_examples=30, deadline=None)
def test_int8_products_are_those_of_the_rounded_numbers(rows: int, width: int, out: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(out, width, generator=generator)
    bias = torch.randn(out, generator=generator)
    values, scale = quantize_rows(weight)
    assert ((values * scale.unsqueeze(-1) - weight).abs() <= scale.unsqueeze(-1) * 0.501).all()
    x_values, x_scale = quantize_rows(x)
    exact = (x_values.double() @ values.double().t()) * x_scale.unsqueeze(-1) * scale + bias
    assert torch.allclose(int8_linear(x, values, scale, bias), exact.float(), rtol=1e-5, atol=1e-5)
    alone = torch.cat([int8_linear(row.unsqueeze(0), values, scale, bias) for row in x])
    assert int8_linear(x, values, scale, bias).equal(alone)


def test_int8_linear_is_close_to_the_float_one_and_keeps_shape_and_type() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 70, 256, generator=generator).bfloat16(), torch.randn(128, 256, generator=generator)
    layout = Int8Layout((128, 256))
    values, scale = layout.pack(weight)
    assert [(dtype, shape) for _, dtype, shape in layout.parts] == [
        (part.dtype, part.shape) for part in (values, scale)
    ]
    result = int8_linear(x, values.mT, scale)
    expected = x.float() @ weight.t()
    assert result.shape == (3, 70, 128)
    assert result.dtype == torch.bfloat16
    assert (result - expected).norm() / expected.norm() < 0.02
