"""Logits are made slice by slice where they are many, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.engine.head import SlicedHead, slices
from flexbatch.plan.memory_need import LOGITS_BYTES, logits_at_once
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Request, Sampling
from tests.engine.families import FAMILIES, VOCABULARY, loaded, logits, prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

DISK = Shares(0, 0)
MOST = 3


@pytest.fixture
def widest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slices of three positions; gathers how many positions each call of the head had."""
    monkeypatch.setattr("flexbatch.engine.head.logits_at_once", lambda _vocabulary: MOST)
    seen: list[int] = []
    made = SlicedHead._logits

    def counted(self: SlicedHead, *arguments: torch.Tensor) -> torch.Tensor:
        result = made(self, *arguments)
        seen.append(result.shape[0] * result.shape[1])
        return result

    monkeypatch.setattr(SlicedHead, "_logits", counted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_same_in_slices(family: str, tmp_path: Path, widest: list[int]) -> None:
    rows = prompts(8)
    running = engine(saved(family), Policy(DISK, Shares(0.5, 0.2), DISK, slots=7, prefill_tokens=60), 28, tmp_path)
    done, _ = answer(running, (Request(index, prompt, Sampling(8)) for index, prompt in enumerate(rows)))
    for index, prompt in enumerate(rows):
        assert_same_tokens(family, prompt, done[index].token_ids, reference(family, prompt, 8))
    assert widest
    assert max(widest) <= MOST


@pytest.mark.parametrize("family", ["opt", "gemma2"])
def test_scores_are_the_same_in_slices(family: str, tmp_path: Path, widest: list[int]) -> None:
    rows = prompts(5)
    counts = [1, 2, 5, 7, 2]
    asked = [
        Request(index, prompt, score_tokens=min(count, len(prompt) - 1))
        for index, (prompt, count) in enumerate(zip(rows, counts, strict=True))
    ]
    done, _ = answer(engine(saved(family), Policy(slots=4, prefill_tokens=200), 28, tmp_path), asked)
    for request in asked:
        count, prompt = request.score_tokens, request.prompt_ids
        with torch.inference_mode():
            whole = loaded(family)(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        want = [float(whole[at - 1, prompt[at]]) for at in range(len(prompt) - count, len(prompt))]
        assert done[request.index].logprobs == pytest.approx(want, abs=1e-3)
        assert done[request.index].token_ids == prompt[-count:]
    assert max(widest) <= MOST
    greedy = int(logits(family, rows[0]).argmax())
    prompt = (*rows[0], greedy)
    done, _ = answer(engine(saved(family), Policy(slots=2), 28, tmp_path), [Request(0, prompt, score_tokens=1)])
    assert done[0].greedy_match


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_slices_cover_everything_once_and_stay_small(rows: int, positions: int, most: int) -> None:
    seen = torch.zeros(rows, positions)
    for row, position in slices(rows, positions, most):
        assert seen[row, position].numel() <= most
        seen[row, position] += 1
    assert bool((seen == 1).all())


def test_the_largest_vocabulary_stays_inside_its_room() -> None:
    assert logits_at_once(250_880) >= 64
    assert logits_at_once(250_880) * 250_880 * 12 <= LOGITS_BYTES
    assert logits_at_once(VOCABULARY) > 10_000
