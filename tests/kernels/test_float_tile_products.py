"""Linear layers in bfloat16 in tile registers (AMX): sums in float32, rounded once, whatever else is in the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import exponent_codes, float_tile_products, tile_products, tile_registers
from flexbatch.kernels.exponent_codes import CHUNK
from flexbatch.kernels.float_tile_products import RECORD_INPUTS, compressed_linear
from flexbatch.memory.float_layout import CompressedWeight, TiledLayout, float_layout, lay_out, linear

pytestmark = pytest.mark.skipif(not tile_registers.are_ours(), reason="no tile registers on this machine")
ROWS = st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 1100]))


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def compressed(weight: torch.Tensor, more: int = 0) -> tuple[torch.Tensor, int]:
    """A tiled weight's records, with room for some exceptions more than it has."""
    numbers = weight.view(-1, CHUNK)
    exceptions = exponent_codes.most_exceptions(numbers) + more
    records = torch.zeros(len(numbers), exponent_codes.record_bytes(exceptions), dtype=torch.uint8)
    exponent_codes.compress(numbers, exceptions, records)
    return records, exceptions


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, width=st.integers(1, 20), out=st.integers(1, 8), seed=st.integers(0, 99))
def test_sums_are_those_of_float32_rounded_once(rows: int, width: int, out: int, seed: int) -> None:
    x, weight = drawn(rows, 32 * width, seed=seed), drawn(32 * out, 32 * width, seed=seed + 1)
    bias = drawn(32 * out, seed=7)
    made = linear(x, lay_out(weight), bias)
    exact = x.double() @ weight.double().T + bias.double()
    # Half of a bfloat16's last bit, and what float32 loses in the sum of so many numbers.
    allowed = exact.abs() * 2**-8 + 32 * width * 2**-22 * (x.double().abs() @ weight.double().abs().T)
    assert ((made.double() - exact).abs() <= allowed).all()


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 1100), row=st.integers(0, 1 << 20), seed=st.integers(0, 99))
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(rows: int, row: int, seed: int) -> None:
    x, weight = drawn(rows, 2048, seed=seed), drawn(64, 2048, seed=seed + 1)
    row %= rows
    tiled = lay_out(weight)
    whole = linear(x, tiled, None)
    assert torch.equal(linear(x[row : row + 1], tiled, None)[0], whole[row])


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, width=st.integers(1, 3), out=st.integers(1, 40), more=st.integers(0, 70), rectified=st.booleans())
def test_a_compressed_weight_gives_the_bits_of_itself(
    rows: int, width: int, out: int, more: int, rectified: bool
) -> None:
    x, weight = drawn(rows, RECORD_INPUTS * width, seed=rows), drawn(32 * out, RECORD_INPUTS * width, seed=1)
    weight[::7] *= 1e-4  # exceptions
    tiled, bias = lay_out(weight), drawn(32 * out, seed=2)
    made = compressed_linear(x, *compressed(tiled, more), bias.float(), rectified)
    assert torch.equal(made, linear(x, tiled, bias, rectified))


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, width=st.integers(1, 140), out=st.integers(1, 12), at=st.sampled_from([0, 2, 30]))
def test_a_weight_as_it_is_stored_gives_them_too(rows: int, width: int, out: int, at: int) -> None:
    x, memory, bias = drawn(rows, 32 * width, seed=1), drawn(at + 1024 * width * out, seed=2), drawn(32 * out, seed=3)
    stored = memory[at:].view(32 * out, 32 * width)
    assert torch.equal(linear(x, stored, bias), linear(x, lay_out(stored), bias))


def test_large_layers_on_all_threads_give_them_too() -> None:
    x, weight = drawn(600, 4096, seed=1), drawn(2048, 4096, seed=2)
    tiled = lay_out(weight)
    records, exceptions = compressed(tiled)
    wanted = torch.cat([linear(x, lay_out(part.contiguous()), None) for part in weight.split(32)], dim=1)
    for _ in range(10):
        assert torch.equal(linear(x, tiled, None), wanted)
        assert torch.equal(linear(x, weight, None), wanted)
        assert torch.equal(CompressedWeight(records, exceptions, 2048).linear(x, None), wanted)


def test_relu_within_a_product_is_relu_after_it_and_nan_stays() -> None:
    x, tiled, bias = drawn(40, 96, seed=1), lay_out(drawn(64, 96, seed=2)), drawn(64, seed=3)
    assert torch.equal(linear(x, tiled, bias, rectified=True), linear(x, tiled, bias).relu())
    x[3, 0] = float("nan")
    assert linear(x, tiled, bias, rectified=True)[3].isnan().all()


def test_rows_keep_their_shape_and_may_lie_apart() -> None:
    x, weight, bias = drawn(3, 5, 128, seed=1), drawn(64, 128, seed=2), drawn(64, seed=3)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(linear(apart, lay_out(weight), bias), linear(x, lay_out(weight), bias))
    assert linear(x, lay_out(weight), bias).shape == (3, 5, 64)


def test_a_layout_carries_a_weight_through_plain_bytes() -> None:
    x, weight = drawn(9, 96, seed=1), drawn(64, 96, seed=2)
    layout = float_layout((64, 96))
    assert isinstance(layout, TiledLayout)
    (stored,) = layout.pack(weight.float())
    assert [("tiled", stored.dtype, tuple(stored.shape))] == list(layout.parts)
    assert torch.equal(linear(x, layout.weight(stored), None), linear(x, lay_out(weight), None))
    assert tile_products.tiled_bytes(64, 192) == layout.nbytes


def test_weights_with_something_missing_are_left_to_torch() -> None:
    assert not isinstance(float_layout((63, 96)), TiledLayout)
    assert not isinstance(float_layout((64, 97)), TiledLayout)
    assert float_tile_products.suits(64, 96)
    assert not CompressedWeight.suits(TiledLayout((64, RECORD_INPUTS + 32)))
