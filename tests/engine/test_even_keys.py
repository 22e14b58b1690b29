"""Columns that only make the number of keys even change nothing that attention says."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flexbatch.engine import even_keys as module
from flexbatch.engine.attention import attend
from flexbatch.engine.even_keys import EVEN_KEYS, even_keys


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiplies_tiles", lambda: True)


@pytest.mark.parametrize("keys", [1, 17, 31, 32, 33, 113, 273])
@pytest.mark.parametrize("sight", ["causal", "all", "bool mask", "added mask"])
def test_attention_is_that_to_the_keys_that_are_there(keys: int, sight: str) -> None:
    queries = keys if sight == "causal" else min(keys, 12)
    query, key, value = states(2, 3, queries, 16), states(2, 3, keys, 16, seed=1), states(2, 3, keys, 16, seed=2)
    seen = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(3)) > 0.3
    seen[..., 0] = True
    lowest = torch.finfo(torch.bfloat16).min
    mask = {"bool mask": seen, "added mask": torch.zeros(seen.shape).masked_fill(~seen, lowest).bfloat16()}.get(sight)
    causal = sight == "causal" and queries > 1
    more_keys, more_values, more_mask = even_keys(query, key, value, mask, causal)
    assert more_keys.shape[2] % EVEN_KEYS == more_values.shape[2] % EVEN_KEYS == 0
    made = scaled_dot_product_attention(query, more_keys, more_values, attn_mask=more_mask, is_causal=causal)
    scores = query.double() @ key.double().transpose(2, 3) / 4
    if sight == "causal":
        scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -torch.inf)
    elif sight != "all":
        scores = scores.masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(made.double(), scores.softmax(-1) @ value.double(), rtol=2**-6, atol=2**-7)
    output, weight = attend(query, key, value, mask, 0.25, causal=causal)
    torch.testing.assert_close(output.double(), made.double(), rtol=2**-6, atol=2**-7)
    torch.testing.assert_close(weight.double(), scores.logsumexp(-1), rtol=2**-7, atol=2**-7)


def test_nothing_is_copied_where_keys_are_even() -> None:
    key, value = states(1, 2, 64, 16), states(1, 2, 64, 16)
    assert even_keys(states(1, 2, 8, 16), key, value, None, True) == (key, value, None)
