"""Prompts that share prefixes get the tokens that they get alone, in every family; the shared part is computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flexbatch.engine.attention import attend, attend_prefix, merge, merging_attention
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Request, Sampling
from tests.engine.families import FAMILIES, prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

NEW_TOKENS = 6
OWN, SHARED = 9, 17
MERGING = {
    "opt",
    "opt-350m",
    "opt-iml",
    "gpt2",
    "gpt-neox",
    "llama",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "gemma",
    "phi",
}
if Version(transformers.__version__) >= Version("5.24"):
    MERGING |= {"codegen", "gptj"}  # their attention goes through Transformers' interface since then


def requests(seed: int = 3) -> list[Request]:
    """Two groups with prefixes of unlike length, and rows without one, mixed."""
    own = prompts(12, OWN, seed)
    long, short = prompts(1, 400, seed + 1)[0] * 3, prompts(1, 400, seed + 2)[0] * 3
    made = []
    for index, tokens in enumerate(own):
        prefix = (long[:SHARED], short[: SHARED - 6], ())[index % 3]
        made.append(Request(index, prefix + tokens, Sampling(max_new_tokens=NEW_TOKENS), shared_tokens=len(prefix)))
    return made


@pytest.mark.parametrize("tiers", [(1.0, 0.0), (0.4, 0.3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_do_not_change_tokens(family: str, tiers: tuple[float, float], tmp_path: Path) -> None:
    policy = Policy(kv=Shares(*tiers), weights=Shares(*tiers), slots=4, prefill_tokens=24, host_attention=tiers[0] < 1)
    running = engine(saved(family), policy, SHARED + OWN + NEW_TOKENS, tmp_path)
    assert running._caller.stepped.merges_prefixes is (family in MERGING)
    asked = requests()
    done, passes = answer(running, asked)
    for request in asked:
        want = reference(family, request.prompt_ids, NEW_TOKENS)
        assert_same_tokens(family, request.prompt_ids, done[request.index].token_ids, want)
    prompt_tokens = sum(len(request.prompt_ids) for request in asked)
    computed = sum(result.prefill_tokens for result in passes)
    assert computed < prompt_tokens - 2 * SHARED  # each prefix was computed about once, not once for each row


def test_without_sharing_every_prompt_token_is_computed(tmp_path: Path) -> None:
    running = engine(saved("opt"), Policy(slots=4, prefix_sharing=False), SHARED + OWN + NEW_TOKENS, tmp_path)
    asked = requests()
    _, passes = answer(running, asked)
    assert sum(result.prefill_tokens for result in passes) == sum(len(request.prompt_ids) for request in asked)


def test_scores_after_a_shared_prefix_are_those_without_one(tmp_path: Path) -> None:
    asked = [
        Request(r.index, r.prompt_ids, shared_tokens=min(r.shared_tokens, len(r.prompt_ids) - 3), score_tokens=2)
        for r in requests()
    ]
    for family in ("opt", "bloom", "llama"):
        scores = []
        for sharing in (True, False):
            policy = Policy(slots=4, prefix_sharing=sharing)
            done, _ = answer(engine(saved(family), policy, SHARED + OWN + NEW_TOKENS, tmp_path), asked)
            scores.append([done[index].logprobs for index in sorted(done)])
        torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_group_that_no_row_waits_of_between_passes_has_its_prefix_computed_once(slots: int, tmp_path: Path) -> None:
    """Rows that end at their prefill leave nobody behind; the next ones of the group come with the next pass."""
    group = (prompts(1, 400, 4)[0] * 3)[:SHARED]
    asked = [
        Request(index, group + tokens, shared_tokens=SHARED, score_tokens=1)
        for index, tokens in enumerate(prompts(7, OWN, 5))
    ]
    _, passes = answer(engine(saved("opt"), Policy(slots=slots), SHARED + OWN, tmp_path), asked)
    assert len(passes) > 2
    own = sum(len(request.prompt_ids) - SHARED - 1 for request in asked)  # the last token is scored, not read
    assert sum(result.prefill_tokens for result in passes) == SHARED + own


def test_merging_by_log_sum_exp_is_attention_over_both_parts() -> None:
    torch.manual_seed(0)
    rows, heads, kv_heads, tokens, before, size = 3, 4, 2, 5, 11, 16
    query = torch.randn(rows, heads, tokens, size)
    shared = [torch.randn(1, kv_heads, before, size) for _ in range(2)]
    own = [torch.randn(rows, kv_heads, tokens, size) for _ in range(2)]
    scale = size**-0.5
    keys, values = (
        torch.cat([part.expand(rows, -1, -1, -1), mine], 2).repeat_interleave(2, 1)
        for part, mine in zip(shared, own, strict=True)
    )
    seen = torch.ones(tokens, before + tokens, dtype=torch.bool).tril(before)
    want = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scale)
    first = attend(query, own[0].repeat_interleave(2, 1), own[1].repeat_interleave(2, 1), None, scale)
    second = attend_prefix(query, shared[0], shared[1], scale)
    torch.testing.assert_close(merge(*first, *second), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_attends_as_transformers_lets_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, heads, kv_heads, columns, size = 3, 8, 2, 40, 16
    query = torch.randn(rows, heads, 1, size).to(dtype)
    keys, values = (torch.randn(rows, kv_heads, columns, size).to(dtype) for _ in range(2))
    seen = torch.rand(rows, 1, 1, columns) > 0.3
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    got, _ = merging_attention(module, query, keys, values, seen, scaling=size**-0.5)
    want, _ = sdpa_attention_forward(module, query.float(), keys.float(), values.float(), seen, scaling=size**-0.5)
    torch.testing.assert_close(got.float(), want, rtol=0, atol=1e-5 if dtype is torch.float32 else 2e-2)
