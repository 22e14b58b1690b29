"""Attention of prompts in bfloat16: that of its definition, whatever is shared or padded and however memory lies."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.kernels import small_products
from flexbatch.kernels.prefill_attention import _division, is_available, prefill_attention, suits

pytestmark = pytest.mark.skipif(not is_available(), reason="torch's attention is used on this processor")
LOWEST = torch.finfo(torch.float32).min


def states(rows: int, heads: int, tokens: int, size: int, seed: int, *, by_token: bool = False) -> torch.Tensor:
    """Random, as a cache has them (head by head) or as a model makes them (`by_token`)."""
    generator = torch.Generator().manual_seed(seed)
    if by_token:
        return torch.randn(rows, tokens, heads, size, generator=generator).bfloat16().transpose(1, 2)
    return torch.randn(rows, heads, tokens + 3, size, generator=generator).bfloat16()[:, :, 2 : tokens + 2]


def expected(
    query: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    starts: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, from the definition."""
    rows, heads, tokens, _ = query.shape
    keys, values = (
        torch.cat([first.expand(rows, -1, -1, -1), second], 2).double().repeat_interleave(heads // first.shape[1], 1)
        for first, second in zip(shared, own, strict=True)
    )
    before, columns = shared[0].shape[2], own[0].shape[2]
    seen = torch.ones(rows, tokens, before + columns, dtype=torch.bool)
    seen[:, :, before:] = torch.ones(tokens, columns, dtype=torch.bool).tril(columns - tokens)
    seen[:, :, before:] &= torch.arange(columns)[None, None] >= starts[:, None, None]
    scores = (query.double() @ keys.mT * scale).masked_fill(~seen[:, None], -torch.inf)
    return torch.nan_to_num(scores.softmax(-1)) @ values, scores.logsumexp(-1)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    tokens=st.integers(1, 150),
    before=st.one_of(st.just(0), st.integers(1, 220)),
    cached=st.integers(0, 120),
    sizes=st.tuples(st.sampled_from([8, 16, 40, 64, 128]), st.sampled_from([8, 16, 40, 64, 128])),
    by_token=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_attention_from_its_definition(
    rows: int,
    heads: tuple[int, int],
    tokens: int,
    before: int,
    cached: int,
    sizes: tuple[int, int],
    by_token: bool,
    seed: int,
) -> None:
    query = 2 * states(rows, heads[0] * heads[1], tokens, sizes[0], seed, by_token=by_token)
    shared = states(1, heads[0], before, sizes[0], seed + 1), states(1, heads[0], before, sizes[1], seed + 2)
    columns = tokens + cached
    own = (
        states(rows, heads[0], columns, sizes[0], seed + 3, by_token=by_token),
        states(rows, heads[0], columns, sizes[1], seed + 4, by_token=by_token),
    )
    starts = torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(seed))
    starts[-1] = 0
    assert suits(query, *own)
    scale = sizes[0] ** -0.5
    output, weight = prefill_attention(query, shared, own, starts, scale)
    wanted, wanted_weight = expected(query, shared, own, starts, scale)
    torch.testing.assert_close(output.double(), wanted, rtol=2**-7, atol=2**-7)
    some = wanted_weight.isfinite()
    torch.testing.assert_close(weight[some].double(), wanted_weight[some], rtol=1e-6, atol=3e-6)
    assert (output[~some] == 0).all()
    assert (weight[~some] == LOWEST).all()


def test_a_prefix_alone_is_seen_whole() -> None:
    query, shared = states(1, 4, 70, 64, 0), (states(1, 2, 131, 64, 1), states(1, 2, 131, 64, 2))
    none = shared[0][:, :, :0], shared[1][:, :, :0]
    output, weight = prefill_attention(query, shared, none, torch.zeros(1, dtype=torch.long), 0.125)
    scores = query.double() @ shared[0].double().repeat_interleave(2, 1).mT * 0.125
    wanted = scores.softmax(-1) @ shared[1].double().repeat_interleave(2, 1)
    torch.testing.assert_close(output.double(), wanted, rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(weight.double(), scores.logsumexp(-1), rtol=1e-6, atol=3e-6)


def test_what_may_not_be_seen_may_be_anything() -> None:
    query, keys, values = (states(2, 2, 100, 16, seed) for seed in range(3))
    shared = keys[:1, :, :0], values[:1, :, :0]
    starts = torch.tensor([37, 0])
    first = prefill_attention(query, shared, (keys, values), starts, 0.25)
    keys[0, :, :37], values[0, :, :37] = torch.nan, torch.inf
    second = prefill_attention(query, shared, (keys, values), starts, 0.25)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_scores_far_from_zero_stay_numbers() -> None:
    query, keys, values = (states(1, 2, 80, 32, seed) for seed in range(3))
    none = keys[:, :, :0], values[:, :, :0]
    output, weight = prefill_attention(1e4 * query, none, (1e4 * keys, values), torch.zeros(1, dtype=torch.long), 1.0)
    wanted, _ = expected(1e4 * query, none, (1e4 * keys, values), torch.zeros(1, dtype=torch.long), 1.0)
    torch.testing.assert_close(output.double(), wanted, rtol=2**-6, atol=2**-6)
    assert weight.isfinite().all()


def test_the_same_on_one_thread_and_on_several() -> None:
    query, keys, values = (states(3, 4, 90, 64, seed) for seed in range(3))
    shared = states(1, 4, 200, 64, 5), states(1, 4, 200, 64, 6)
    starts, before = torch.zeros(3, dtype=torch.long), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(prefill_attention(query, shared, (keys, values), starts, 0.125))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each[0], made[0][0]) and torch.equal(each[1], made[0][1]) for each in made[1:])


def test_odd_sizes_other_types_and_scattered_numbers_are_left_to_others() -> None:
    query = states(1, 2, 10, 64, 0)
    assert suits(query, query, query)
    assert not suits(query.float(), query.float(), query.float())
    assert not suits(query[..., :60], query[..., :60], query)
    assert not suits(query, query.mT.contiguous().mT, query)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("rows", "kv_heads", "group"), [(1, 32, 1), (1, 1, 71), (40, 2, 4), (5, 8, 8)])
def test_there_is_work_for_every_thread(rows: int, kv_heads: int, group: int, together: bool) -> None:
    row_pieces, head_pieces = _division(rows, kv_heads, group, 4, together=together)
    assert 1 <= row_pieces <= rows
    assert 1 <= head_pieces <= group
    assert kv_heads * row_pieces * head_pieces >= min(32, kv_heads * rows * group)


@pytest.mark.skipif(not small_products.HAS_TILES, reason="no tile registers on this machine")
def test_code_that_was_kept_for_tile_registers_is_not_run_where_the_system_withholds_them() -> None:
    query = states(1, 2, 40, 64, 0)
    prefill_attention(query, (query[:, :, :0],) * 2, (query, query), torch.zeros(1, dtype=torch.long), 1.0)
    withheld = """if True:
        from flexbatch.kernels import tile_registers
        tile_registers.are_ours = lambda: False
        import torch
        from flexbatch.kernels import prefill_attention
        query = torch.ones(1, 2, 40, 64, dtype=torch.bfloat16)
        none, starts = query[:, :, :0], torch.zeros(1, dtype=torch.long)
        output, _ = prefill_attention.prefill_attention(query, (none, none), (query, query), starts, 1.0)
        assert output.equal(query)
    """
    done = subprocess.run([sys.executable, "-c", withheld], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
