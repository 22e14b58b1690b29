"""Rows that guess what comes next gain several tokens in a pass; the tokens stay those of Transformers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from flexbatch.engine import attention, guessing
from flexbatch.engine.growing import GrowingRow
from flexbatch.engine.guessing import MOST_GUESSES, Guesses, affordable, worthwhile
from flexbatch.engine.kv_memory import MemorySlots
from flexbatch.engine.lookup import Draft, Remembered, draft
from flexbatch.engine.reading import Gain
from flexbatch.plan.policy import Policy, Shares
from flexbatch.plan.rows_in_flight import GuessRoom
from flexbatch.records import Completion, PassResult, Request, Sampling
from tests.engine.families import FAMILIES, VOCABULARY, prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

NEW_TOKENS = 14
LONGEST = 60
SLOTS = 4
POLICY = Policy(Shares(0, 0), slots=SLOTS, prefill_tokens=40)
GREEDY = Sampling(max_new_tokens=NEW_TOKENS)
Drafts = Callable[[Sequence[int], Sequence[int]], Draft]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Callable[[Drafts], None]:
    """Guesses are fed whatever they cost, and are those of the given function."""

    def guess(found: Drafts) -> None:
        monkeypatch.setattr(guessing, "affordable", lambda *_: 1e9)
        monkeypatch.setattr(guessing, "draft", found)

    return guess


def knowing(answers: Sequence[Sequence[int]], right: float = 0.7, seed: int = 1) -> Drafts:
    """Guesses what follows in `answers` (prompt and completion each), some of it wrong, at times nothing."""
    chance = random.Random(seed)

    def found(tokens: Sequence[int], _elsewhere: Sequence[int] = ()) -> Draft:
        said = next((each for each in answers if tuple(each[: len(tokens)]) == tuple(tokens)), ())
        coming = list(said[len(tokens) :][: chance.randint(0, 9)])
        spoilt = [token if chance.random() < right else (token + 1) % 1000 for token in coming]
        return Draft(tuple(spoilt), 1 if spoilt else 0)

    return found


def requests_of(rows: Sequence[tuple[int, ...]], sampling: Sampling = GREEDY, shared: int = 0) -> list[Request]:
    return [Request(index, row, sampling, shared_tokens=shared) for index, row in enumerate(rows)]


def ragged(count: int, seed: int = 3) -> list[tuple[int, ...]]:
    return [row[: max(1, len(row) - 7 * (index % 6))] for index, row in enumerate(prompts(count, LONGEST, seed=seed))]


def counts(passes: Sequence[PassResult]) -> tuple[int, int]:
    return sum(each.guessed_tokens for each in passes), sum(each.right_tokens for each in passes)


def tokens_of(done: dict[int, Completion]) -> list[tuple[int, ...]]:
    return [done[index].token_ids for index in sorted(done)]


@pytest.mark.parametrize("family", FAMILIES)
def test_guessing_rows_say_what_transformers_says(
    family: str, tmp_path: Path, always: Callable[[Drafts], None]
) -> None:
    rows = ragged(14)
    want = [reference(family, row, NEW_TOKENS) for row in rows]
    always(knowing([row + tuple(said) for row, said in zip(rows, want, strict=True)]))
    running = engine(saved(family), POLICY, LONGEST + NEW_TOKENS, tmp_path, guess_room=100)
    may_guess = running._side_by_side
    done, passes = answer(running, requests_of(rows))
    for index, row in enumerate(rows):
        assert_same_tokens(family, row, done[index].token_ids, want[index])
    guessed, right = counts(passes)
    assert (guessed > right > 0) if may_guess else guessed == 0
    assert sum(each.decode_tokens for each in passes) == sum(map(len, want))


@pytest.mark.parametrize("kv", [Shares(1, 0), Shares(0.4, 0.3)], ids=["memory", "tiers"])
@pytest.mark.parametrize("family", ["opt", "llama", "gptj"])
def test_rows_that_share_a_prefix_guess_too(
    family: str, kv: Shares, tmp_path: Path, always: Callable[[Drafts], None]
) -> None:
    (prefix,) = prompts(1, 40, seed=9)
    rows = [prefix + row[:20] for row in ragged(10)]
    want = [reference(family, row, NEW_TOKENS) for row in rows]
    always(knowing([row + tuple(said) for row, said in zip(rows, want, strict=True)]))
    policy = replace(POLICY, kv=kv, host_attention=True)
    running = engine(saved(family), policy, 60 + NEW_TOKENS, tmp_path, guess_room=100, logits_of_guesses=8)
    guesses = running._caller.stepped.lays_side_by_side  # before transformers 5.2x GPT-J has an attention of its own
    done, passes = answer(running, requests_of(rows, shared=len(prefix)))
    for index, row in enumerate(rows):
        assert_same_tokens(family, row, done[index].token_ids, want[index])
    assert (counts(passes)[1] > 0) is guesses


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_right_guesses_save_passes_and_wrong_ones_cost_none(
    right: float, tmp_path: Path, always: Callable[[Drafts], None]
) -> None:
    rows = ragged(12)
    span = LONGEST + NEW_TOKENS
    plain, slow = answer(engine(saved("opt"), POLICY, span, tmp_path), requests_of(rows))
    always(knowing([row + plain[index].token_ids for index, row in enumerate(rows)], right))
    done, passes = answer(engine(saved("opt"), POLICY, span, tmp_path, guess_room=100), requests_of(rows))
    assert tokens_of(done) == tokens_of(plain)
    assert len(passes) < 0.7 * len(slow) if right == 1.0 else len(passes) <= len(slow)


def test_sampled_rows_and_their_log_probabilities_stay(tmp_path: Path, always: Callable[[Drafts], None]) -> None:
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.3, top_p=0.9, seed=5, logprobs=True)
    rows, span = ragged(9), LONGEST + NEW_TOKENS
    plain, _ = answer(engine(saved("llama"), POLICY, span, tmp_path), requests_of(rows, sampling))
    always(knowing([row + plain[index].token_ids for index, row in enumerate(rows)]))
    done, passes = answer(engine(saved("llama"), POLICY, span, tmp_path, guess_room=100), requests_of(rows, sampling))
    assert tokens_of(done) == tokens_of(plain)
    assert counts(passes)[1] > 0
    for index, completion in done.items():
        assert completion.logprobs == pytest.approx(plain[index].logprobs, abs=1e-4)
    told = {index: [] for index in done}  # type: dict[int, list[int]]
    for each in passes:
        for index, tokens in each.new_tokens.items():
            told[index] += tokens
    assert [tuple(told[index]) for index in sorted(told)] == tokens_of(done)  # what the journal keeps


def test_nothing_is_said_after_an_end_that_came_among_right_guesses(
    tmp_path: Path, always: Callable[[Drafts], None]
) -> None:
    rows, span = ragged(10), LONGEST + NEW_TOKENS
    plain, _ = answer(engine(saved("opt"), POLICY, span, tmp_path, end_tokens=()), requests_of(rows))
    always(knowing([row + plain[index].token_ids for index, row in enumerate(rows)], right=1.0))
    end = plain[0].token_ids[5]
    stops = replace(GREEDY, stop=(f" {plain[1].token_ids[7]} ",))
    for ends, sampling in (((end,), GREEDY), ((), stops)):
        old, _ = answer(engine(saved("opt"), POLICY, span, tmp_path, end_tokens=ends), requests_of(rows, sampling))
        running = engine(saved("opt"), POLICY, span, tmp_path, end_tokens=ends, guess_room=100)
        new, passes = answer(running, requests_of(rows, sampling))
        assert new == old
        assert counts(passes)[1] > 0
        assert any(each.finish_reason == "stop" for each in new.values())


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    times=st.sampled_from([1, 2, 4]),
    tiers=st.sampled_from([Shares(1, 0), Shares(0.5, 0.5), Shares(0.4, 0.3), Shares(0, 0)]),
)
def test_any_mixture_of_gains_leaves_the_tokens(
    seed: int, times: int, tiers: Shares, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows of all lengths, many shifts of the arena, other layouts of it, prompts that enter in parts meanwhile."""
    folder, chance = tmp_path_factory.mktemp("guesses"), random.Random(seed)
    rows = [row[: chance.randint(1, LONGEST)] for row in prompts(14, LONGEST, seed=chance.randint(0, 99))]
    lengths = [chance.choice([1, 5, 40, 90]) for _ in rows]
    requests = [
        Request(index, row, Sampling(max_new_tokens=lengths[index], min_new_tokens=chance.randint(0, 2)))
        for index, row in enumerate(rows)
    ]
    policy = replace(POLICY, kv=tiers, prefill_tokens=chance.choice([33, 70, 200]))
    span = LONGEST + 90
    plain, _ = answer(engine(saved("llama"), policy, span, folder), requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guessing, "affordable", lambda *_: 1e9)
        answers = [row + plain[index].token_ids for index, row in enumerate(rows)]
        patch.setattr(guessing, "draft", knowing(answers, chance.random(), seed))
        running = engine(saved("llama"), policy, span, folder, guess_room=60, most_slots=times * SLOTS)
        done, passes = answer(running, requests)
    assert tokens_of(done) == tokens_of(plain)
    event(f"layouts up to {times} times the slots, {min(9, counts(passes)[1] // 50) * 50} or more right guesses")
    assert counts(passes)[0] > 0


def test_what_one_row_said_is_a_guess_for_the_next() -> None:
    said = Remembered()
    said.add((7, 8, 9))
    said.add((5, 6))
    assert draft((1, 7, 8), said.tokens) == Draft((9,), 2)
    assert draft((2, 8, 9), said.tokens) == Draft()  # what another row said after it does not follow
    for number in range(3000):
        said.add((number, number))
    assert len(said.tokens) == 4096


def grown(tokens: int) -> Gain:
    return Gain(GrowingRow(Request(0, (1, 2, 3)), list(range(tokens)), []), tokens, None)


def row_that_repeats() -> GrowingRow:
    return GrowingRow(Request(0, (1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1), Sampling(max_new_tokens=64)), [2], [])


def test_a_pass_that_waits_for_weights_is_filled_with_guesses_and_one_that_does_not_has_none() -> None:
    waiting, busy = Guesses(GuessRoom(100), 4), Guesses(GuessRoom(100), 4)
    for _ in range(3):
        waiting.learn([grown(1)], seconds=2.0, waited=1.0, tokens=50)
        busy.learn([grown(1)], seconds=2.0, waited=0.0, tokens=50)
    assert sum(guessed(waiting, [row_that_repeats() for _ in range(4)])) > 4
    assert sum(guessed(busy, [row_that_repeats() for _ in range(4)])) == 0


def test_guesses_end_where_there_is_no_room_no_time_or_nothing_left_to_say() -> None:
    guesses = Guesses(GuessRoom(8), 4)
    guesses.learn([grown(1)], seconds=2.0, waited=1.9, tokens=50)
    rows = [row_that_repeats() for _ in range(4)]
    assert guessed(guesses, rows) == [2] * 4
    for _ in range(20):
        rows[0].tokens += rows[0].guesses
        guesses.learn([Gain(rows[0], 2, None)], seconds=2.0, waited=1.9, tokens=50)
    assert guessed(guesses, [row_that_repeats()]) == [MOST_GUESSES]  # fewer rows may have more
    last = row_that_repeats()
    last.tokens = [2] * 62
    assert guessed(guesses, [last]) == [1]
    assert guessed(Guesses(GuessRoom(0), 4), rows) == [0] * 4


def test_empty_slots_among_the_rows_take_their_part_of_the_room() -> None:
    guesses, rows = Guesses(GuessRoom(16), 4), [row_that_repeats(), row_that_repeats()]
    guesses.learn([grown(1)], seconds=2.0, waited=1.9, tokens=50)
    assert guessed(guesses, rows) == [4, 4]
    guesses.draw_up(rows)
    assert guesses.feed([rows[0], None, None, None, None, None, rows[1]]) == 2  # 13 tokens in all beside seven


def test_guesses_that_were_not_fed_teach_by_their_first() -> None:
    """What turned out not to be said is not believed again by and by."""
    guesses, rows = Guesses(GuessRoom(400), 36), [row_that_repeats() for _ in range(36)]
    for _ in range(30):
        guesses.learn([], seconds=2.0, waited=1.9, tokens=50)
        guesses.draw_up(rows)
        guesses.feed(rows)
        for row in rows:
            row.tokens.append(999)
        guesses.learn([Gain(row, 1, None) for row in rows], seconds=2.0, waited=1.9, tokens=50)
        for row in rows:
            row.tokens[:] = [2]
    assert guessed(guesses, rows) == [0] * 36


def test_an_accelerator_that_works_all_the_time_is_not_given_guesses() -> None:
    """The time that its work takes is waited for too."""
    guesses = Guesses(GuessRoom(400, token_seconds=0.02), 4)
    guesses.learn([grown(1)], seconds=2.0, waited=1.99, tokens=100)
    assert guessed(guesses, [row_that_repeats()]) == [0]


def guessed(guesses: Guesses, rows: list[GrowingRow]) -> list[int]:
    guesses.draw_up(rows)
    guesses.feed(rows)
    return [len(row.guesses) for row in rows]


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 16)), min_size=1, max_size=8), st.integers(0, 7))
def test_no_guess_is_fed_that_promises_nothing(rows: list[tuple[float, int]], most: int) -> None:
    shares, lengths = [share for share, _ in rows], [length for _, length in rows]
    width = worthwhile(shares, lengths, most)
    assert 0 <= width <= most
    gains = [sum(s**k for s, n in rows if n >= k) / len(rows) for k in range(1, most + 1)]
    assert all(gain >= guessing.LEAST_GAIN for gain in gains[:width])
    assert width == most or gains[width] < guessing.LEAST_GAIN


def test_the_time_for_guesses_is_what_was_waited() -> None:
    assert affordable(0, 1.0, 0.01) == pytest.approx(90)
    assert affordable(50, 0.0, 0.01) < 50  # fewer and fewer where nothing is waited for
    assert affordable(10, 1.0, 0.0) == 0.0


class Alternating:
    """Even and odd tokens in turn."""

    def start(self) -> AlternatingState:
        return AlternatingState()


class AlternatingState:
    closing_token = 2

    def __init__(self) -> None:
        self.said = 0

    def allowed(self) -> torch.Tensor:
        return torch.arange(VOCABULARY) % 2 == self.said % 2

    def leaves_room(self, _token: int) -> bool:
        return True

    def advance(self, token: int) -> None:
        assert token % 2 == self.said % 2
        self.said += 1


def test_constrained_rows_guess_what_their_constraint_allows(tmp_path: Path, always: Callable[[Drafts], None]) -> None:
    rows, span, constraints = ragged(8), LONGEST + NEW_TOKENS, {"even, odd": Alternating()}
    requests = [replace(each, constraint="even, odd") for each in requests_of(rows)]
    plain, _ = answer(engine(saved("opt"), POLICY, span, tmp_path, constraints=constraints), requests)
    always(knowing([row + plain[index].token_ids for index, row in enumerate(rows)]))
    running = engine(saved("opt"), POLICY, span, tmp_path, constraints=constraints, guess_room=100)
    done, passes = answer(running, requests)
    assert tokens_of(done) == tokens_of(plain)
    assert counts(passes)[1] > 0


def test_rows_taken_up_from_a_journal_guess_on(tmp_path: Path, always: Callable[[Drafts], None]) -> None:
    rows, span = ragged(8), LONGEST + NEW_TOKENS
    plain, _ = answer(engine(saved("opt"), POLICY, span, tmp_path), requests_of(rows))
    always(knowing([row + plain[index].token_ids for index, row in enumerate(rows)]))
    requests = [
        replace(each, resumed=plain[index].token_ids[: index % 5]) for index, each in enumerate(requests_of(rows))
    ]
    done, passes = answer(engine(saved("opt"), POLICY, span, tmp_path, guess_room=100), requests)
    assert tokens_of(done) == tokens_of(plain)
    assert counts(passes)[1] > 0


def test_heads_that_share_keys_are_not_given_copies_of_them_for_a_few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's keys and values, as often as there are heads to a group, are planned for nowhere."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, tokens, 16) for heads, tokens in ((8, 4), (2, 40), (2, 40)))
    seen = torch.rand(3, 1, 4, 40) < 0.7
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    def refused(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("keys are repeated")

    monkeypatch.setattr(attention, "repeat_kv", refused)
    monkeypatch.setattr(attention, "sdpa_attention_forward", refused)
    made, _ = attention.merging_attention(torch.nn.Module(), query, key, value, mask)
    assert torch.allclose(made, want.transpose(1, 2), atol=1e-5)


def test_tokens_come_from_the_device_to_slots_on_the_host() -> None:
    with FakeTensorMode():
        slots = MemorySlots.over((torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 10, 8)))
        made = torch.zeros(2, 4, 3, 8, device="cuda")
        slots.write_columns(torch.zeros(2, 3, dtype=torch.long), (made, made))
