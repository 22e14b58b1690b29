"""Greedy tokens in float32 are those of Transformers' `model.generate`, whatever the schedule and the placement."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Request, Sampling
from tests.engine.families import FAMILIES, prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

NEW_TOKENS = 8
LONGEST = 20
DEVICE, HOST, DISK = Shares(1, 0), Shares(0, 1), Shares(0, 0)
MIXED = (Shares(0.3, 0.3), Shares(0.35, 0.4), Shares(0.2, 0.5))

# name: slots, prefill tokens per pass, weights, KV cache, hidden states
SETTINGS = {
    "device, one slot, one prompt a pass": (1, 1, DEVICE, DEVICE, DEVICE),
    "device, 5 slots": (5, 40, DEVICE, DEVICE, DEVICE),
    "host, 7 slots, all at once": (7, 10_000, HOST, HOST, HOST),
    "disk, 4 slots": (4, 30, DISK, DISK, DISK),
    "mixed, 6 slots": (6, 50, *MIXED),
    "weights on disk only, 3 slots, one prompt a pass": (3, 1, DISK, DEVICE, DEVICE),
}


@cache
def expected(family: str, rows: int) -> list[list[int]]:
    return [reference(family, prompt, NEW_TOKENS) for prompt in prompts(rows, LONGEST)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, setting: str, tmp_path: Path) -> None:
    slots, prefill_tokens, weights, kv, hidden = SETTINGS[setting]
    policy = Policy(weights, kv, hidden, slots=slots, prefill_tokens=prefill_tokens)
    rows = prompts(11, LONGEST)
    running = engine(saved(family), policy, LONGEST + NEW_TOKENS, tmp_path)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    done, _ = answer(running, (Request(index, prompt, sampling) for index, prompt in enumerate(rows)))
    assert sorted(done) == list(range(len(rows)))
    for index, want in enumerate(expected(family, len(rows))):
        assert_same_tokens(family, rows[index], done[index].token_ids, want)


@pytest.mark.parametrize("family", ["opt", "bloom", "mistral"])
def test_rows_that_stop_early_free_their_slots_and_keep_their_tokens(family: str, tmp_path: Path) -> None:
    rows = prompts(23, LONGEST, seed=1)
    free = [reference(family, prompt, NEW_TOKENS) for prompt in rows]
    end = free[0][2]  # a token that a row generates: as the end of sequence, it stops rows at different steps
    policy = Policy(kv=Shares(0.5, 0.2), slots=5, prefill_tokens=30)
    running = engine(saved(family), policy, LONGEST + NEW_TOKENS, tmp_path, end_tokens=[end])
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    done, passes = answer(running, (Request(index, prompt, sampling) for index, prompt in enumerate(rows)))
    for index, prompt in enumerate(rows):
        want = reference(family, prompt, NEW_TOKENS, eos_token_id=end)
        assert_same_tokens(family, prompt, done[index].token_ids, want)
        assert done[index].finish_reason == ("stop" if end in want else "length")
    decoded = sum(result.decode_tokens for result in passes)
    assert decoded == sum(len(completion.token_ids) for completion in done.values())


@pytest.mark.parametrize("family", ["opt", "gpt-neox", "falcon"])
def test_padding_to_the_full_length_changes_nothing(family: str, tmp_path: Path) -> None:
    rows = prompts(7, LONGEST)
    running = engine(saved(family), Policy(slots=3), LONGEST + NEW_TOKENS, tmp_path, padded_width=LONGEST)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    done, _ = answer(running, (Request(index, prompt, sampling) for index, prompt in enumerate(rows)))
    for index, prompt in enumerate(rows):
        assert_same_tokens(family, prompt, done[index].token_ids, reference(family, prompt, NEW_TOKENS))


def test_long_jobs_outlive_the_arena(tmp_path: Path) -> None:
    """Many more passes than the arena has columns: it is shifted again and again."""
    rows = prompts(60, LONGEST, seed=2)
    running = engine(saved("llama"), Policy(kv=Shares(0.5, 0.5), slots=2), LONGEST + NEW_TOKENS, tmp_path)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    done, passes = answer(running, (Request(index, prompt, sampling) for index, prompt in enumerate(rows)))
    assert len(passes) > 200
    for index, prompt in enumerate(rows):
        assert_same_tokens("llama", prompt, done[index].token_ids, reference("llama", prompt, NEW_TOKENS))
