"""Where rows are shorter than was planned, the cache's memory holds more of them; the tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flexbatch.engine.engine import Engine
from flexbatch.plan.policy import Policy, Shares
from flexbatch.plan.workload import column_slack
from flexbatch.records import PassResult, Request, Sampling
from tests.engine.families import FAMILIES, prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

NEW_TOKENS = 5
LONGEST = 200
SPAN = LONGEST + NEW_TOKENS
SLOTS = 3
POLICY = Policy(Shares(0, 0), slots=SLOTS, prefill_tokens=150)


def in_windows(rows: Sequence[tuple[int, ...]]) -> list[Request]:
    """Two windows, each with its longest prompt first, as a job's order has them."""
    half = len(rows) // 2
    ordered = [*sorted(rows[:half], key=len, reverse=True), *sorted(rows[half:], key=len, reverse=True)]
    return [Request(index, prompt, Sampling(max_new_tokens=NEW_TOKENS)) for index, prompt in enumerate(ordered)]


def rows_of_all_lengths(count: int) -> list[tuple[int, ...]]:
    return [prompt[: max(1, LONGEST * (index % 10 + 1) // 10)] for index, prompt in enumerate(full(count))]


def full(count: int) -> list[tuple[int, ...]]:
    """Prompts of `LONGEST` tokens."""
    tokens = [token for prompt in prompts(40 + count * 4, LONGEST, seed=5) for token in prompt]
    return [tuple(tokens[index * LONGEST : (index + 1) * LONGEST]) for index in range(count)]


def in_flight(passes: Sequence[PassResult]) -> list[int]:
    return [result.rows_in_flight for result in passes]


@pytest.mark.parametrize("family", FAMILIES)
def test_more_short_rows_than_slots_give_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    requests = in_windows(rows_of_all_lengths(30))
    running = engine(saved(family), POLICY, SPAN, tmp_path, most_slots=4 * SLOTS)
    done, passes = answer(running, requests)
    for request in requests:
        want = reference(family, request.prompt_ids, NEW_TOKENS)
        assert_same_tokens(family, request.prompt_ids, done[request.index].token_ids, want)
    assert max(in_flight(passes)) > SLOTS


def test_the_first_rows_of_a_window_wait_until_there_is_room_for_their_length(tmp_path: Path) -> None:
    """After short rows come long ones again: no more of them than were planned, and every one is answered."""
    rows = rows_of_all_lengths(40)
    running = engine(saved("opt"), POLICY, SPAN, tmp_path, most_slots=4 * SLOTS)
    seen = watched(running)
    done, passes = answer(running, in_windows(rows))
    assert len(done) == len(rows)
    spans = [span for span, _ in seen]
    narrow = spans.index(min(spans[: len(spans) // 2]))
    assert spans[0] == SPAN == max(spans[narrow:])
    memory = SLOTS * (SPAN + column_slack(SPAN))
    assert all(rows_there * (span + column_slack(span)) <= memory for span, rows_there in seen)
    plain, plain_passes = answer(engine(saved("opt"), POLICY, SPAN, tmp_path), in_windows(rows))
    assert [done[index].token_ids for index in plain] == [plain[index].token_ids for index in plain]
    assert len(passes) < 0.8 * len(plain_passes)


def watched(running: Engine) -> list[tuple[int, int]]:
    """Span of the layout and rows in flight at every pass, as it happens."""
    spans: list[tuple[int, int]] = []
    real = running._one_pass

    def one_pass(this: object) -> None:
        real(this)  # type: ignore[arg-type]
        spans.append((running._arena.span, len(running._slots.live)))

    running._one_pass = one_pass  # type: ignore[method-assign,assignment]
    return spans


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_caches_are_cut_alike(bits: int, tmp_path: Path) -> None:
    requests = in_windows(rows_of_all_lengths(24))
    policy = replace(POLICY, kv_bits=bits)
    more, passes = answer(engine(saved("opt"), policy, SPAN, tmp_path, most_slots=4 * SLOTS), requests)
    plain, _ = answer(engine(saved("opt"), policy, SPAN, tmp_path), requests)
    assert max(in_flight(passes)) > SLOTS
    assert [more[index].token_ids for index in plain] == [plain[index].token_ids for index in plain]


def test_rows_on_several_tiers_stay_where_they_are(tmp_path: Path) -> None:
    policy = replace(POLICY, kv=Shares(0.4, 0.3))
    done, passes = answer(
        engine(saved("opt"), policy, SPAN, tmp_path, most_slots=4 * SLOTS), in_windows(rows_of_all_lengths(12))
    )
    assert len(done) == 12
    assert max(in_flight(passes)) <= SLOTS + 1  # a row that enters in parts is in flight before it has its slot's end
