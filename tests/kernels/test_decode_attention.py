"""Attention to a cache in bfloat16: that of its definition, whatever is masked and however the cache lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.engine.attention import attend
from flexbatch.kernels.decode_attention import LOWEST, decode_attention, suits
from flexbatch.kernels.threads import on_all_threads


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, from the definition."""
    scores = (query.double() @ key.double().transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ value.double(), scores.logsumexp(-1)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 4),
    heads=st.integers(1, 3),
    queries=st.integers(1, 2),
    columns=st.integers(1, 70),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    spare=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seed=st.integers(0, 999),
)
def test_it_is_attention_from_its_definition(
    rows: int, heads: int, queries: int, columns: int, sizes: tuple[int, int], spare: tuple[int, int], seed: int
) -> None:
    arena = states(rows, heads, sum(spare) + columns, sum(sizes), seed=seed)
    seen = slice(spare[0], spare[0] + columns)
    key, value = arena[:, :, seen, : sizes[0]], arena[:, :, seen, sizes[0] :]
    query, scale = 3 * states(rows, heads, queries, sizes[0], seed=seed + 1), sizes[0] ** -0.5
    mask = torch.rand(rows, 1, 1, columns, generator=torch.Generator().manual_seed(seed)) > 0.4
    given_mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.bfloat16).min).bfloat16()
    given_mask = given_mask if seed % 2 else mask
    assert suits(query, key, value, given_mask)
    output, weight = decode_attention(query, key, value, given_mask, scale)
    wanted, wanted_weight = expected(query, key, value, mask, scale)
    torch.testing.assert_close(output.double(), wanted, rtol=2**-8, atol=2**-12)
    some = mask.any(-1).expand(rows, heads, queries)
    torch.testing.assert_close(weight[some].double(), wanted_weight[some], rtol=1e-6, atol=3e-6)
    assert (output[~some] == 0).all()
    assert (weight[~some] == LOWEST).all()


def test_what_lies_before_a_row_may_be_anything() -> None:
    key, value, mask = states(2, 3, 40, 16), states(2, 3, 40, 16, seed=1), torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[0, ..., :7] = False
    query = states(2, 3, 1, 16, seed=2)
    clean = decode_attention(query, key, value, mask, 0.25)
    key[0, :, :7] = value[0, :, :7] = torch.nan
    for got, wanted in zip(decode_attention(query, key, value, mask, 0.25), clean, strict=True):
        assert torch.equal(got, wanted)


def test_a_row_does_not_depend_on_its_company_or_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    key, value, query = states(6, 8, 90, 64), states(6, 8, 90, 64, seed=1), states(6, 8, 1, 64, seed=2)
    together, _ = decode_attention(query, key, value, None, 0.125)
    for row in range(6):
        mine = slice(row, row + 1)
        assert torch.equal(decode_attention(query[mine], key[mine], value[mine], None, 0.125)[0], together[mine])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(decode_attention(query, key, value, None, 0.125)[0], together)


def test_what_a_mask_adds_is_added() -> None:
    key, value, query = states(2, 3, 40, 16), states(2, 3, 40, 16, seed=1), states(2, 3, 1, 16, seed=2)
    added = states(2, 1, 1, 40, seed=3)
    output, _ = decode_attention(query, key, value, added, 0.25)
    scores = query.double() @ key.double().transpose(2, 3) * 0.25 + added.double()
    torch.testing.assert_close(output.double(), scores.softmax(-1) @ value.double(), rtol=2**-8, atol=2**-12)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    key, value = states(1, 1, 9, 32), states(1, 1, 9, 32, seed=1)
    query = 1e4 * key[:, :, 4:5]
    output, weight = decode_attention(query, key, value, None, 1.0)
    assert torch.equal(output[0, 0, 0], value[0, 0, 4])
    assert weight.isfinite().all()


@pytest.mark.parametrize("change", ["float32", "many queries", "a mask for each head"])
def test_what_it_is_not_made_for_goes_another_way(change: str) -> None:
    query, key, mask = states(2, 4, 1, 16), states(2, 4, 30, 16), torch.ones(2, 1, 1, 30, dtype=torch.bool)
    value = states(2, 4, 30, 16, seed=1)
    if change == "float32":
        query, key, value = query.float(), key.float(), value.float()
    elif change == "many queries":
        query = query.expand(-1, -1, 3, -1)
    else:
        mask = mask.expand(-1, 4, -1, -1)
    assert not suits(query, key, value, mask)
    output, _ = attend(query, key, value, mask, 0.25, causal=False)
    wanted, _ = expected(query, key, value, torch.ones(2, 1, 1, 30, dtype=torch.bool), 0.25)
    torch.testing.assert_close(output.double(), wanted, rtol=2**-5, atol=2**-6)


def test_an_error_in_a_thread_comes_to_the_caller() -> None:
    def work(first: int, step: int) -> None:
        if first == step - 1:
            raise ArithmeticError("in a thread")

    with pytest.raises(ArithmeticError, match="in a thread"):
        on_all_threads(work, threads=3)
