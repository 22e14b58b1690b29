"""A conversation's tokens are those of `model.generate` on its whole text, and its history is read once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from flexbatch.engine.conversation import NO_LOOKUP, Conversation
from flexbatch.engine.lookup import LONGEST_DRAFT, Acceptance, Draft, agreeing, draft, draft_length
from flexbatch.engine.opening import Checkpoint, EngineOptions, Limits, open_conversation
from flexbatch.errors import Interrupted
from flexbatch.memory.safetensors_index import SafetensorsIndex
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Sampling
from tests.engine.families import FAMILIES, prompts, reference, saved
from tests.engine.running import assert_same_tokens

DEVICE, HOST, DISK = Shares(1, 0), Shares(0, 1), Shares(0, 0)
PLACEMENTS = {
    "device": Policy(DEVICE, DEVICE, DEVICE),
    "host": Policy(HOST, HOST, HOST),
    "disk": Policy(DISK, DISK, DISK),
    "mixed": Policy(Shares(0.3, 0.3), Shares(0.35, 0.4), Shares(0.2, 0.5)),
    "streamed weights": Policy(DISK, DEVICE, DEVICE),
}
MIXED_KV = Shares(0.35, 0.4)
CONTEXT = 96
NEW = 8
ALWAYS = (1.0,) * (LONGEST_DRAFT + 1)
"""The pass times of a machine on which guesses cost nothing: all are fed."""


def opened(family: str, policy: Policy, disk_folder: Path) -> Conversation:
    folder = saved(family)
    checkpoint = Checkpoint(AutoConfig.from_pretrained(folder), SafetensorsIndex.open(folder).entries, str(folder))
    options = EngineOptions(CONTEXT, torch.float32, reader="buffered")
    return open_conversation(checkpoint, policy, Limits(disk_folder=disk_folder), options)


def turn(conversation: Conversation, said: Sequence[int], pass_seconds: Sequence[float], new: int = NEW) -> list[int]:
    conversation.tokens += said
    return [token for came in conversation.say(Sampling(new), pass_seconds) for token in came]


def repeating(turns: int = 3) -> list[tuple[int, ...]]:
    """What is asked turn after turn: much of it was said before, so that guesses are found."""
    (phrase,) = prompts(1, 9, seed=4)
    return [phrase + phrase[:number] for number in range(turns)]


@pytest.mark.parametrize("pass_seconds", [NO_LOOKUP, ALWAYS], ids=["alone", "lookup"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["opt", "llama", "bloom"])
def test_every_turn_is_transformers_greedy_answer(
    family: str, placement: str, pass_seconds: Sequence[float], tmp_path: Path
) -> None:
    conversation = opened(family, PLACEMENTS[placement], tmp_path)
    try:
        for said in repeating():
            before = (*conversation.tokens, *said)
            answer = turn(conversation, said, pass_seconds)
            assert_same_tokens(family, before, answer, reference(family, before, NEW, eos_token_id=None))
            assert tuple(conversation.tokens) == (*before, *answer)
    finally:
        conversation.close()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opt", "llama", "bloom"}))
def test_every_family_holds_a_conversation_on_streamed_weights(family: str, tmp_path: Path) -> None:
    conversation = opened(family, PLACEMENTS["mixed"], tmp_path)
    try:
        for said in repeating(2):
            before = (*conversation.tokens, *said)
            answer = turn(conversation, said, ALWAYS)
            assert_same_tokens(family, before, answer, reference(family, before, NEW, eos_token_id=None))
    finally:
        conversation.close()


@pytest.mark.parametrize("pass_seconds", [NO_LOOKUP, ALWAYS], ids=["alone", "lookup"])
def test_history_is_read_once(pass_seconds: Sequence[float], tmp_path: Path) -> None:
    conversation = opened("opt", PLACEMENTS["disk"], tmp_path)
    for said in repeating():
        turn(conversation, said, pass_seconds)
    counts = conversation.counts
    assert counts.fed_tokens + counts.right_tokens == len(conversation.tokens) - 1
    conversation.close()


def test_right_guesses_save_passes(tmp_path: Path) -> None:
    """A random model falls into loops, which is what lookups find."""
    conversation = opened("opt", PLACEMENTS["disk"], tmp_path)
    answer = turn(conversation, prompts(1, 5)[0], ALWAYS, new=60)
    assert len(answer) == 60
    assert conversation.counts.right_tokens > 0
    assert conversation.counts.passes == 60 - conversation.counts.right_tokens
    conversation.close()


def test_sampled_answers_are_those_without_lookup(tmp_path: Path) -> None:
    sampling = Sampling(20, temperature=0.7, top_p=0.9, seed=3)
    answers = []
    for pass_seconds in (NO_LOOKUP, ALWAYS):
        conversation = opened("llama", PLACEMENTS["device"], tmp_path)
        conversation.tokens += repeating(1)[0] * 3
        answers.append([token for came in conversation.say(sampling, pass_seconds) for token in came])
        conversation.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_kv_cache_gives_the_same_with_and_without_lookup(bits: int, tmp_path: Path) -> None:
    policy = Policy(DISK, MIXED_KV, DEVICE, kv_bits=bits)
    said = []
    for pass_seconds in (NO_LOOKUP, ALWAYS):
        conversation = opened("opt", policy, tmp_path)
        said.append([turn(conversation, asked, pass_seconds, new=12) for asked in repeating(2)])
        conversation.close()
    assert said[0] == said[1]


def test_a_long_text_is_read_in_one_pass_of_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexbatch.engine.conversation.MICRO_BATCH_TOKENS", 7)
    (said,) = prompts(1, 60, seed=8)
    said = (said * 20)[:61]
    for placement in ("device", "mixed"):
        conversation = opened("llama", PLACEMENTS[placement], tmp_path)
        answer = turn(conversation, said, ALWAYS)
        assert_same_tokens("llama", said, answer, reference("llama", said, NEW, eos_token_id=None))
        assert conversation.counts.passes <= NEW
        conversation.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_pass_that_is_given_up_changes_nothing(placement: str, tmp_path: Path) -> None:
    conversation = opened("opt", PLACEMENTS[placement], tmp_path)
    said = repeating(1)[0]
    conversation.tokens += said
    for stops in range(6):  # at the first stop of the pass, the second, and so on
        asked = iter([False] * stops)
        with pytest.raises(Interrupted):
            next(conversation.say(Sampling(NEW), NO_LOOKUP, partial(next, asked, True)))
        assert tuple(conversation.tokens) == said
    answer = turn(conversation, (), NO_LOOKUP)
    assert_same_tokens("opt", said, answer, reference("opt", said, NEW, eos_token_id=None))
    conversation.close()


def test_what_is_forgotten_does_not_matter_any_more(tmp_path: Path) -> None:
    conversation = opened("bloom", PLACEMENTS["mixed"], tmp_path)
    first, second, third = prompts(3, 12, seed=5)
    turn(conversation, first, ALWAYS)
    turn(conversation, second, ALWAYS)
    conversation.keep(len(first) + NEW)
    before = (*conversation.tokens, *third)
    answer = turn(conversation, third, ALWAYS)
    assert_same_tokens("bloom", before, answer, reference("bloom", before, NEW, eos_token_id=None))
    conversation.rewrite((*first, *second))
    assert conversation.cached == len(first)
    conversation.close()


def test_a_full_context_ends_the_answer(tmp_path: Path) -> None:
    conversation = opened("opt", PLACEMENTS["device"], tmp_path)
    answer = turn(conversation, prompts(1, 20)[0], ALWAYS, new=1000)
    assert len(conversation.tokens) == CONTEXT
    assert len(answer) == CONTEXT - len(prompts(1, 20)[0])
    assert conversation.room == 0
    conversation.close()


# Of four bytes each, so that a run of tokens also stands where no token begins.
few = st.sampled_from([0, 1, 256, 1 << 24])


@given(st.lists(few, max_size=60))
def test_a_guess_is_what_followed_the_longest_match(said: list[int]) -> None:
    found = draft(said)
    for size in range(4, 0, -1):
        end = said[len(said) - size :]
        places = [at for at in range(size, len(said)) if said[at - size : at] == end] if size <= len(said) else []
        if places:
            repeated = said[places[-1] :] * LONGEST_DRAFT
            assert found == Draft(tuple(repeated[:LONGEST_DRAFT]), size)
            return
    assert found == Draft()


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=17), st.floats(0, 1))
def test_the_number_of_guesses_brings_the_most_tokens_per_second(seconds: list[float], acceptance: float) -> None:
    chosen = draft_length(seconds, acceptance)
    rates = [sum(acceptance**k for k in range(count + 1)) / each for count, each in enumerate(seconds)]
    assert rates[chosen] >= max(rates) * (1 - 1e-6)


def test_guesses_are_fed_where_weight_traffic_binds_and_not_where_arithmetic_does() -> None:
    assert draft_length(ALWAYS, 0.5) == LONGEST_DRAFT
    assert draft_length([1.0 + count for count in range(17)], 0.9) == 0
    assert 0 < draft_length([1.0, 1.0, 1.0, 2.0, 3.0], 0.5) < 3


def test_wrong_guesses_lower_the_belief_and_right_ones_raise_it() -> None:
    acceptance, found = Acceptance(), Draft((7, 8, 9), 2)
    before = acceptance.share(2)
    acceptance.learn(found, (1,))
    assert acceptance.share(2) < before
    for _ in range(5):
        acceptance.learn(found, (7, 8, 9, 4))
    assert acceptance.share(2) > before
    assert acceptance.share(1) == before


def test_agreement_counts_from_the_start() -> None:
    assert agreeing((1, 2, 3), (1, 2, 4, 3)) == 2
    assert agreeing((), (1,)) == 0
