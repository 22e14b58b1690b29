"""A prompt's attention is what the definition says, in half precision as near as torch's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.engine.attention import attend


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), tokens=st.integers(1, 600), groups=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_prompts_see_their_own_and_earlier_tokens(rows: int, tokens: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, 2 * groups, tokens, 16, generator=generator).bfloat16()
    key, value = (torch.randn(rows, 2 * groups, tokens, 16, generator=generator).bfloat16() for _ in range(2))
    output, weight = attend(query, key, value, None, 0.25)
    scores = (query.float() @ key.float().mT * 0.25).masked_fill(
        torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf
    )
    assert output.dtype == query.dtype
    torch.testing.assert_close(output.float(), scores.softmax(-1) @ value.float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight, scores.logsumexp(-1), rtol=1e-2, atol=1e-2)
