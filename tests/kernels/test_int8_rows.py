"""Rounding to int8 and back on the CPU: number for number what the definition says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels.int8_rows import round_rows, scale_sums
from flexbatch.memory.int8_layout import quantize_rows
from flexbatch.memory.int8_linear import int8_linear


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(rows=st.integers(1, 9), numbers=st.integers(1, 200), seed=st.integers(0, 999), power=st.integers(-30, 30))
def test_rounding_is_that_of_torch(rows: int, numbers: int, seed: int, power: int) -> None:
    given_rows = (drawn(rows, numbers, seed=seed) * 2.0**power).bfloat16()
    given_rows[seed % rows, seed % numbers] = 0.0
    values, scale = round_rows(given_rows)
    # float32 holds the same numbers and goes torch's way.
    wanted_values, wanted_scale = quantize_rows(given_rows.float())
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(values, wanted_values)


def test_a_row_of_zeros_stays_zeros() -> None:
    values, scale = round_rows(torch.zeros(2, 40, dtype=torch.bfloat16))
    assert (values == 0).all()
    assert (scale > 0).all()


@settings(max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 999))
def test_sums_are_scaled_and_rounded_once(rows: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sums = torch.randint(-(2**23), 2**23, (rows, columns), generator=draw, dtype=torch.int32)
    row_scale, column_scale = drawn(rows, seed=seed).abs(), drawn(columns, seed=seed + 1).abs()
    offset = drawn(columns, seed=seed + 2)
    exact = sums.double() * row_scale[:, None].double() * column_scale.double() + offset.double()
    got = scale_sums(sums, row_scale, column_scale, offset)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=2**-18 * float(exact.abs().max()))


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(70, 2048, seed=1).bfloat16(), drawn(2048, 2048, seed=2).bfloat16()
    values, scale = quantize_rows(weight)
    together = int8_linear(x, values, scale)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(int8_linear(x, values, scale), together)
    assert torch.equal(torch.cat([int8_linear(x[:9], values, scale), int8_linear(x[9:], values, scale)]), together)
