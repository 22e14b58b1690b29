"""Long prompts enter a streamed model in parts over several passes: the tokens stay, the passes become even."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.plan.admission import Admission, joining_count, least_part, most_tokens, parts
from flexbatch.plan.policy import Policy, Shares
from flexbatch.records import Request, Sampling
from tests.engine.families import FAMILIES, prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

NEW_TOKENS = 5
LONGEST = 200


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_parts_give_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    rows = prompts(7, LONGEST, seed=3)
    policy = Policy(Shares(0, 0), Shares(0.4, 0.3), slots=4, prefill_tokens=70)
    running = engine(saved(family), policy, LONGEST + NEW_TOKENS, tmp_path)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    done, passes = answer(running, (Request(index, prompt, sampling) for index, prompt in enumerate(rows)))
    for index, prompt in enumerate(rows):
        assert_same_tokens(family, prompt, done[index].token_ids, reference(family, prompt, NEW_TOKENS))
    assert sum(result.prefill_tokens for result in passes) == sum(map(len, rows))
    assert max(result.prefill_tokens for result in passes) <= 2 * 70 * 1.5


def test_no_part_enters_where_all_weights_are_resident(tmp_path: Path) -> None:
    rows = prompts(5, LONGEST, seed=3)
    running = engine(saved("opt"), Policy(slots=2, prefill_tokens=70), LONGEST + NEW_TOKENS, tmp_path)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    _, passes = answer(running, (Request(index, prompt, sampling) for index, prompt in enumerate(rows)))
    lengths = {len(prompt) for prompt in rows}
    sums = {a + b for a in lengths for b in lengths}
    assert {result.prefill_tokens for result in passes} <= {0} | lengths | sums


def test_whole_prompts_enter_whole_and_so_does_one_that_is_longer_because_it_was_interrupted(tmp_path: Path) -> None:
    rows = [prompt * (70 // len(prompt) + 1) for prompt in prompts(6, LONGEST, seed=3)]
    rows = [prompt[:70] for prompt in rows]
    answers = [reference("opt", prompt, NEW_TOKENS) for prompt in rows]
    policy = Policy(Shares(0, 0), Shares(0, 0), slots=3, prefill_tokens=70, whole_prompts=True)
    running = engine(saved("opt"), policy, 70 + NEW_TOKENS, tmp_path)
    resumed = {2: tuple(answers[2][:3])}
    done, passes = answer(
        running,
        (
            Request(index, prompt, Sampling(max_new_tokens=NEW_TOKENS), resumed=resumed.get(index, ()))
            for index, prompt in enumerate(rows)
        ),
    )
    for index, prompt in enumerate(rows):
        assert_same_tokens("opt", prompt, done[index].token_ids, answers[index])
    assert {result.prefill_tokens for result in passes} == {0, 70, 73}


@given(st.integers(1, 5000), st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([0, 16, 32, 64]))
def test_parts_add_up_and_the_last_is_longer_than_there_are_parts(
    length: int, room: int, budget: int, shortest: int
) -> None:
    sizes = parts(length, min(room, budget), budget, shortest)
    if sizes:
        assert sum(sizes) == length
        assert 2 <= len(sizes) <= sizes[-1]  # the decode batch writes over as many columns as there are parts
        assert shortest <= sizes[0] <= min(room, budget)


@given(st.integers(100, 5000), st.integers(100, 1000), st.integers(100, 1000))
def test_all_parts_but_the_first_and_the_last_are_nearly_as_large_as_the_budget(
    length: int, room: int, budget: int
) -> None:
    least = least_part(length, 32)
    size = max(budget, least)
    for part in parts(length, min(room, budget), budget, 32)[1:-1]:
        assert abs(part - size) <= least / 2 + 1


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=40),
    st.integers(1, 1500),
    st.sampled_from([0, 32]),
    st.integers(1, 8),
)
def test_every_prompt_enters_once_and_no_pass_takes_more_than_is_planned(
    lengths: list[int], budget: int, shortest: int, free: int
) -> None:
    admission, waiting, entered, splits = Admission(budget, shortest), list(lengths), 0, list[int]()
    most = most_tokens(max(lengths), budget, shortest) if shortest else max(budget, *lengths)
    while waiting or admission.is_entering:
        admitted = admission.admit(waiting, [True] * len(waiting), free, idle=not admission.is_entering)
        assert admitted.part == (splits.pop(0) if splits else 0)
        whole = sum(waiting[: admitted.whole])
        del waiting[: admitted.whole]
        if admitted.sizes:
            assert sum(admitted.sizes) == waiting.pop(0)
            splits = list(admitted.sizes[1:])
        tokens = admitted.part + whole + (admitted.sizes[0] if admitted.sizes else 0)
        assert 0 < tokens <= most
        entered += tokens
    assert entered == sum(lengths)


@given(st.integers(200, 2000), st.integers(64, 800), st.integers(10, 60))
def test_passes_take_the_budget_exactly_on_the_average(length: int, budget: int, rows: int) -> None:
    admission, waiting, tokens = Admission(budget, 32), [length] * rows, list[int]()
    while waiting:
        admitted = admission.admit(waiting, [True] * len(waiting), 8, idle=False)
        tokens.append(admitted.part + admitted.whole * length + (admitted.sizes[0] if admitted.sizes else 0))
        del waiting[: admitted.whole + bool(admitted.sizes)]
    mean = sum(tokens) / len(tokens)
    assert abs(mean - budget) <= (2 * length + budget) / len(tokens)


@given(st.lists(st.integers(1, 600), max_size=40), st.integers(0, 50), st.integers(0, 3000))
def test_what_joins_whole_fits_and_one_more_would_not(lengths: list[int], free: int, room: int) -> None:
    count = joining_count(lengths, free, room)
    assert sum(lengths[:count]) <= room or not count
    assert count <= free
    if count < min(len(lengths), free):
        assert sum(lengths[: count + 1]) > room
