"""The benchmark's prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.bench import command
from flexbatch.bench.peers import search_batch
from flexbatch.bench.trial import Outcome
from flexbatch.bench.workloads import computed_prompt_tokens, fewshot, mixed_lengths, random_prompts, sorted_batches
from flexbatch.data.prefix_groups import common_length
from flexbatch.errors import ConfigError


def test_random_prompts_share_nothing_and_are_the_same_each_time() -> None:
    prompts = random_prompts(8, 64, 50272)
    assert prompts == random_prompts(8, 64, 50272)
    assert set(prompts.lengths) == {64}
    ids = prompts.token_ids
    assert max(common_length(ids[a], ids[b]) for a in range(8) for b in range(a)) <= 2


def test_fewshot_prompts_share_exactly_what_was_asked() -> None:
    prompts = fewshot(8, 64, 50, 50272)
    assert set(prompts.lengths) == {64}
    assert len({ids[:50] for ids in prompts.token_ids}) == 1
    assert len({ids[50:] for ids in prompts.token_ids}) == 8
    assert computed_prompt_tokens(prompts, sharing=True) == 50 + 8 * 14
    assert computed_prompt_tokens(prompts, sharing=False) == 8 * 64


def test_a_prefix_as_long_as_the_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bench\.shared_tokens=64"):
        fewshot(8, 64, 64, 50272)


def test_without_real_data_mixed_lengths_are_made_up_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLEXBATCH_REALDATA", str(tmp_path))
    lengths, note = mixed_lengths(100, 512)
    assert "made-up" in note
    assert max(lengths) <= 512
    assert len(set(lengths)) > 10


@pytest.mark.realdata
def test_mixed_lengths_are_those_of_the_reviews(realdata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXBATCH_REALDATA", str(realdata))
    lengths, note = mixed_lengths(20, 512)
    assert "movie reviews" in note
    assert len(lengths) == 20
    assert max(lengths) == 512


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.integers(1, 16))
@settings(max_examples=50)
def test_batches_hold_every_row_once_and_waste_little(lengths: list[int], size: int) -> None:
    batches = sorted_batches(lengths, size)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    shortest = [min(lengths[row] for row in batch) for batch in batches]
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert all(low >= high for low, high in zip(shortest, longest[1:], strict=False))


def test_the_search_stops_where_a_larger_batch_is_slower() -> None:
    rates = {4: 1.0, 8: 3.0, 16: 2.0, 32: 9.0}
    search = search_batch(
        [32, 8, 4, 16], lambda size: Outcome("peer", batch=size, tokens=int(rates[size]), seconds=1.0)
    )
    assert [outcome.batch for outcome in search.tried] == [4, 8, 16]
    assert search.best is not None
    assert search.best.batch == 8


def test_the_search_stops_where_memory_runs_out() -> None:
    def attempt(size: int) -> Outcome:
        return Outcome("peer", batch=size, tokens=size, seconds=1.0, error="killed" if size > 8 else "")

    search = search_batch([4, 8, 16, 32], attempt)
    assert [outcome.batch for outcome in search.tried] == [4, 8, 16]
    assert search.best is not None
    assert search.best.batch == 8
    assert search_batch([16], attempt).error == "killed"


@pytest.mark.parametrize(
    ("choice", "own", "multiplies", "expected"),
    [
        ("auto", "bfloat16", True, "bfloat16"),
        ("auto", "bfloat16", False, "float32"),
        ("auto", "float32", False, "float32"),
        ("bfloat16", "bfloat16", False, "bfloat16"),
        ("auto", "float16", True, "float32"),
    ],
)
def test_peers_compute_in_the_type_that_is_fastest_for_them(
    choice: str, own: str, multiplies: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "multiplies_bfloat16", lambda: multiplies)
    assert command.peer_dtype(choice, own) == expected
