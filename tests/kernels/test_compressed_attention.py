"""Attention to a compressed cache as it is kept: that to its numbers, whatever is masked and however it lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels.compressed_attention import compressed_attention
from flexbatch.kernels.compressed_states import Compressed, compress
from flexbatch.kernels.floats import LOWEST
from tests.kernels.test_decode_attention import expected, states
from tests.kernels.test_packed_attention import assert_rows_stand_alone

PLACES = 200


def part_of(whole: Compressed, columns: slice) -> Compressed:
    return tuple(part[:, :, columns] for part in whole)


def with_small_ones(numbers: torch.Tensor, seed: int) -> torch.Tensor:
    """One in twenty smaller by up to 30 powers of two."""
    generator = torch.Generator().manual_seed(seed)
    lowered = torch.randint(0, 30, numbers.shape, generator=generator)
    lowered *= torch.rand(numbers.shape, generator=generator) < 0.05
    return torch.ldexp(numbers.float(), -lowered).bfloat16()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    heads=st.integers(1, 3),
    queries=st.integers(1, 5),
    columns=st.integers(1, 70),
    sizes=st.tuples(st.sampled_from([64, 128, 192]), st.sampled_from([64, 128, 256])),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    spare=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    own_masks=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_attention_to_the_numbers_that_were_compressed(
    rows: int,
    heads: int,
    queries: int,
    columns: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    spare: tuple[int, int],
    own_masks: bool,
    seed: int,
) -> None:
    seen = slice(spare[0], spare[0] + columns)
    arena = with_small_ones(states(rows, heads, sum(spare) + columns, sum(sizes), seed=seed), seed)
    keys, values = arena[..., : sizes[0]], arena[..., sizes[0] :]
    query, scale = (3 * states(rows, heads, queries, sizes[0], seed=seed + 1)).to(dtype), sizes[0] ** -0.5
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 1, queries if own_masks else 1, columns, generator=generator) > 0.4
    given_mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min) if seed % 2 else mask
    parts = (part_of(compress(each, PLACES), seen) for each in (keys, values))
    output, weight = compressed_attention(query, *parts, given_mask, scale)
    wanted, wanted_weight = expected(query, keys[:, :, seen], values[:, :, seen], mask, scale)
    error = 2**-8 if dtype == torch.bfloat16 else 2e-6
    assert output.dtype == dtype
    some = mask.any(-1).expand(rows, heads, queries)
    torch.testing.assert_close(output[some].double(), wanted[some], rtol=error, atol=max(error / 16, 4e-6))
    torch.testing.assert_close(weight[some].double(), wanted_weight[some], rtol=2e-6, atol=6e-6)
    assert (output[~some] == 0).all()
    assert (weight[~some] == LOWEST).all()


def test_small_numbers_beside_large_ones_are_not_lost() -> None:
    """All that a query sees are exceptions: the one large number of each head is multiplied by nothing."""
    numbers = torch.full((1, 2, 5, 64), 2.0**-20).bfloat16() * torch.arange(1, 6)[:, None]
    numbers[..., 7] = 3.0
    query = torch.full((1, 2, 1, 64), 2.0**20)
    query[..., 7] = 0
    made = compress(numbers, 126)
    output, _ = compressed_attention(query, made, made, None, 2.0**-6)
    wanted, _ = expected(query, numbers, numbers, torch.ones(1, 1, 1, 5, dtype=torch.bool), 2.0**-6)
    torch.testing.assert_close(output.double(), wanted, rtol=2e-6, atol=0)


def test_what_lies_before_a_row_may_be_anything() -> None:
    keys, values = compress(states(2, 3, 40, 64), 8), compress(states(2, 3, 40, 64, seed=1), 8)
    mask, query = torch.ones(2, 1, 1, 40, dtype=torch.bool), states(2, 3, 1, 64, seed=2)
    mask[0, ..., :7] = False
    clean = compressed_attention(query, keys, values, mask, 0.125)
    for part in (*keys, *values):
        part[0, :, :7] = 0xFF
    for got, wanted in zip(compressed_attention(query, keys, values, mask, 0.125), clean, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("queries", [1, 3])
def test_a_row_does_not_depend_on_its_company_or_on_the_threads(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = (compress(with_small_ones(states(6, 8, 90, 64, seed=s), s), PLACES) for s in (0, 1))
    assert_rows_stand_alone(compressed_attention, states(6, 8, queries, 64, seed=2), keys, values, monkeypatch)


def test_large_scores_neither_overflow_nor_vanish_and_no_number_stays_none() -> None:
    numbers, values = states(1, 1, 9, 64), states(1, 1, 9, 64, seed=1)
    keys = compress(numbers, 8)
    output, weight = compressed_attention(1e4 * numbers[:, :, 4:5], keys, compress(values, 8), None, 1.0)
    torch.testing.assert_close(output[0, 0, 0], values[0, 0, 4], rtol=2**-8, atol=0)
    assert weight.isfinite().all()
    numbers[0, 0, 3, 5] = torch.nan
    output, weight = compressed_attention(states(1, 1, 1, 64), compress(numbers, 80), compress(values, 8), None, 1.0)
    assert output.isnan().all()
    assert weight.isnan().all()
