"""Calls that lie side by side in one row of tokens are the calls that they were."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface

from flexbatch.engine.attention import NAME, merging_attention, register
from flexbatch.engine.calls import Piece
from flexbatch.engine.micro_batch import MicroBatch, walk
from flexbatch.engine.schedule import in_turn, pack_alike
from flexbatch.errors import EngineError
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Request, Sampling
from tests.engine.families import loaded, prompts, saved
from tests.engine.running import answer, engine

LONGEST = 20


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3"])
def test_logits_are_those_of_each_prompt_alone(family: str, tmp_path: Path) -> None:
    rows = [*prompts(5, LONGEST), prompts(1, LONGEST)[0]]  # the last as long as the first: two rows in one piece
    running = engine(saved(family), Policy(slots=8), LONGEST + 4, tmp_path)
    read: dict[int, torch.Tensor] = {}

    def keep(first: int, logits: torch.Tensor, part: slice, _positions: slice) -> None:
        read.update({first + part.start + index: row[-1] for index, row in enumerate(logits)})

    with torch.inference_mode():
        pieces: list[Piece[Any]] = [
            running._caller.prefill([row], [index], 1, partial(keep, index)) for index, row in enumerate(rows[:4])
        ]
        pieces.append(running._caller.prefill([rows[0], rows[5]], [], 1, partial(keep, 10)))
        walk([MicroBatch(partial(running._caller.together, pieces))], running._weights.ready)
        for index, row in [*enumerate(rows[:4]), (10, rows[0]), (11, rows[5])]:
            alone = loaded(family)(torch.tensor([row])).logits[0, -1]
            torch.testing.assert_close(read[index], alone, rtol=0, atol=1e-4)
    running.close()


def test_keys_that_a_model_makes_anew_are_refused_instead_of_mixed_up() -> None:
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    with pytest.raises(EngineError, match="Linear makes its keys anew"):
        merging_attention(torch.nn.Linear(1, 1), query, key, value, torch.zeros(1, 1, 1, 1))


def test_keys_on_the_host_that_a_model_makes_anew_are_refused_when_rows_decode(tmp_path: Path) -> None:
    """Padded, each call goes alone; without a mask one key would be taken for all of them."""

    def anew(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        return merging_attention(module, query, key.clone(), rest[0], None, **kwargs)

    policy, rows = Policy(kv=Shares(0, 1), slots=2), prompts(2, LONGEST)
    running = engine(saved("llama"), policy, LONGEST + 4, tmp_path, padded_width=LONGEST)
    AttentionInterface.register(NAME, anew)
    try:
        with pytest.raises(EngineError, match="LlamaForCausalLM makes its keys anew"):
            answer(running, (Request(index, prompt, Sampling(max_new_tokens=4)) for index, prompt in enumerate(rows)))
    finally:
        register()


def test_no_padding_goes_through_the_model(tmp_path: Path) -> None:
    """Prompts of different lengths: at most seven spare tokens in a call."""
    rows = prompts(9, LONGEST)
    running = engine(saved("llama"), Policy(Shares(0, 0), slots=9, prefill_tokens=400), LONGEST + 1, tmp_path)
    seen: list[int] = []
    embed = running._caller.stepped.model.get_input_embeddings()
    forward = embed.forward
    embed.forward = lambda ids: (seen.append(ids.numel()), forward(ids))[1]  # type: ignore[method-assign]
    answer(running, (Request(index, prompt, Sampling(max_new_tokens=1)) for index, prompt in enumerate(rows)))
    assert 0 <= sum(seen) - sum(map(len, rows)) < 8 * len(seen)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 600))
def test_rows_of_one_length_share_a_group_and_no_group_is_too_large(lengths: list[int], limit: int) -> None:
    groups = pack_alike(lengths, limit)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len({lengths[index] for index in group}) == 1
        assert len(group) == 1 or sum(lengths[index] for index in group) <= limit


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 600))
def test_calls_follow_each_other_in_order_and_none_is_too_large(sizes: list[int], limit: int) -> None:
    groups = in_turn(sizes, limit)
    assert [size for group in groups for size in sizes[group]] == sizes
    assert all(len(sizes[group]) == 1 or sum(sizes[group]) <= limit for group in groups)
