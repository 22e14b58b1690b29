"""Attention to a packed cache as it is kept: that to its expanded numbers, whatever is masked and however it lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.engine.kv_form import Attend, Parts
from flexbatch.kernels.floats import LOWEST
from flexbatch.kernels.packed_attention import Packed, is_available, packed_attention
from flexbatch.kernels.packed_numbers import GROUP
from flexbatch.memory.quantization import QuantizedLayout, QuantizedTensor, dequantize, quantize
from tests.kernels.test_decode_attention import expected, states

pytestmark = pytest.mark.skipif(not is_available(), reason="this processor has no instruction for float16")


def packed(numbers: torch.Tensor, bits: int) -> Packed:
    made = quantize(numbers, bits, GROUP)
    return made.values, made.scale, made.minimum


def part_of(whole: Packed, columns: slice) -> Packed:
    return tuple(part[:, :, columns] for part in whole)


def expanded(parts: Packed, bits: int) -> torch.Tensor:
    """In float32, from the definition."""
    values, scale, minimum = (part.contiguous() for part in parts)
    layout = QuantizedLayout((*values.shape[:3], GROUP * scale.shape[3]), bits, GROUP)
    return dequantize(QuantizedTensor(values, scale, minimum, layout), torch.empty(layout.shape))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    heads=st.integers(1, 3),
    queries=st.integers(1, 5),
    columns=st.integers(1, 70),
    sizes=st.tuples(st.sampled_from([32, 64, 96, 128]), st.sampled_from([32, 64, 96, 128, 256])),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    spare=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seed=st.integers(0, 999),
)
def test_it_is_attention_to_the_expanded_numbers(
    rows: int,
    heads: int,
    queries: int,
    columns: int,
    sizes: tuple[int, int],
    bits: int,
    dtype: torch.dtype,
    spare: tuple[int, int],
    seed: int,
) -> None:
    bits = bits if sizes[1] % (2 * GROUP) == 0 else 8
    seen = slice(spare[0], spare[0] + columns)
    arena = states(rows, heads, sum(spare) + columns, sum(sizes), seed=seed).to(dtype)
    keys = part_of(packed(arena[..., : sizes[0]], 8), seen)
    values = part_of(packed(arena[..., sizes[0] :], bits), seen)
    query, scale = (3 * states(rows, heads, queries, sizes[0], seed=seed + 1)).to(dtype), sizes[0] ** -0.5
    mask = torch.rand(rows, 1, 1, columns, generator=torch.Generator().manual_seed(seed)) > 0.4
    given_mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min) if seed % 2 else mask
    output, weight = packed_attention(query, keys, values, given_mask, scale)
    wanted, wanted_weight = expected(query, expanded(keys, 8), expanded(values, bits), mask, scale)
    error = 2**-8 if dtype == torch.bfloat16 else 2e-6
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), wanted, rtol=error, atol=max(error / 16, 4e-6))
    some = mask.any(-1).expand(rows, heads, queries)
    torch.testing.assert_close(weight[some].double(), wanted_weight[some], rtol=2e-6, atol=6e-6)
    assert (output[~some] == 0).all()
    assert (weight[~some] == LOWEST).all()


def test_what_lies_before_a_row_may_be_anything() -> None:
    keys, values = packed(states(2, 3, 40, 64), 8), packed(states(2, 3, 40, 64, seed=1), 4)
    mask, query = torch.ones(2, 1, 1, 40, dtype=torch.bool), states(2, 3, 1, 64, seed=2)
    mask[0, ..., :7] = False
    clean = packed_attention(query, keys, values, mask, 0.125)
    for parameters in (*keys[1:], *values[1:]):
        parameters[0, :, :7] = torch.nan
    for got, wanted in zip(packed_attention(query, keys, values, mask, 0.125), clean, strict=True):
        assert torch.equal(got, wanted)


def assert_rows_stand_alone(
    attend: Attend, query: torch.Tensor, keys: Parts, values: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row by itself, and all of them on other threads, get what they get together."""
    together, _ = attend(query, keys, values, None, 0.125)
    for row in range(len(query)):
        mine = slice(row, row + 1)
        alone, _ = attend(
            query[mine], tuple(part[mine] for part in keys), tuple(part[mine] for part in values), None, 0.125
        )
        assert torch.equal(alone, together[mine])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(attend(query, keys, values, None, 0.125)[0], together)


def test_a_row_does_not_depend_on_its_company_or_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = packed(states(6, 8, 90, 64), 8), packed(states(6, 8, 90, 64, seed=1), 8)
    assert_rows_stand_alone(packed_attention, states(6, 8, 1, 64, seed=2), keys, values, monkeypatch)


def test_what_a_mask_adds_is_added() -> None:
    keys, values = packed(states(2, 3, 40, 64), 8), packed(states(2, 3, 40, 64, seed=1), 8)
    query, added = states(2, 3, 1, 64, seed=2).float(), states(2, 1, 1, 40, seed=3)
    output, _ = packed_attention(query, keys, values, added, 0.25)
    scores = query.double() @ expanded(keys, 8).double().transpose(2, 3) * 0.25 + added.double()
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ expanded(values, 8).double(), rtol=2e-6, atol=4e-6)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    numbers = states(1, 1, 9, 64)
    keys, values = packed(numbers, 8), packed(states(1, 1, 9, 64, seed=1), 8)
    output, weight = packed_attention(1e4 * numbers[:, :, 4:5], keys, values, None, 1.0)
    torch.testing.assert_close(output[0, 0, 0].float(), expanded(values, 8)[0, 0, 4], rtol=2**-8, atol=0)
    assert weight.isfinite().all()
