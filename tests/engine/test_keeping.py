"""At the end of a job the memory of rows that are done holds weights: less is read, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexbatch.engine import model as building
from flexbatch.engine.engine import Engine
from flexbatch.engine.opening import Limits
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.records import Completion, Request, Sampling
from tests.engine.families import prompts, reference, saved
from tests.engine.running import answer, assert_same_tokens, engine

LONGEST, NEW_TOKENS = 20, 60
ROWS = 7
SLOTS = 5


def asked() -> list[Request]:
    """Rows that are done one after the other."""
    lengths = [NEW_TOKENS - 9 * (index % 7) for index in range(ROWS)]
    return [
        Request(index, prompt, Sampling(max_new_tokens=new))
        for index, (prompt, new) in enumerate(zip(prompts(ROWS, LONGEST), lengths, strict=True))
    ]


def opened(family: str, policy: Policy, folder: Path, limits: Limits | None = None) -> Engine:
    return engine(saved(family), policy, LONGEST + NEW_TOKENS, folder, limits=limits)


def on_device(running: Engine) -> set[str]:
    return {name for name, tier in running._weights.tiers.items() if tier is Tier.DEVICE}


@pytest.mark.parametrize("divided", [False, True], ids=["layers", "matrices"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "gemma2", "mixtral"])
def test_weights_move_in_and_the_tokens_are_those_of_transformers(
    family: str, divided: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if divided:
        monkeypatch.setattr(building, "LARGE_LAYER_PARAMETERS", 1)
    running = opened(family, Policy(Shares(0.2, 0), slots=SLOTS, prefill_tokens=40), tmp_path)
    before = on_device(running)
    done, _ = answer(running, asked())
    for request in asked():
        want = reference(family, request.prompt_ids, request.sampling.max_new_tokens)
        assert_same_tokens(family, request.prompt_ids, done[request.index].token_ids, want)
    assert before < on_device(running)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(Shares(0, 0), slots=SLOTS, weight_bits=8),
        Policy(Shares(0, 0), slots=SLOTS, weight_bits=4, kv_bits=8),
        Policy(Shares(0, 0), slots=SLOTS, compute="int8"),
        Policy(Shares(0.2, 0.3), Shares(0.6, 0.4), slots=SLOTS),
    ],
    ids=["8 bits", "4 bits, KV in 8", "int8", "KV and weights on the host"],
)
def test_every_form_of_weights_gives_the_same_tokens_kept_as_streamed(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = opened("opt", policy, tmp_path)
    before = on_device(running)
    kept, _ = answer(running, asked())
    assert before < on_device(running)
    monkeypatch.setattr(Engine, "_use_free_slots", lambda _: None)
    streamed, _ = answer(opened("opt", policy, tmp_path), asked())
    assert {index: each.token_ids for index, each in kept.items()} == {
        index: each.token_ids for index, each in streamed.items()
    }


def test_the_next_run_has_all_its_slots_and_streams_all_its_weights_again(tmp_path: Path) -> None:
    running = opened("opt", Policy(Shares(0.2, 0), slots=SLOTS, prefill_tokens=40), tmp_path)
    budget, before = running._storage.budgets[Tier.DEVICE], on_device(running)

    def run() -> tuple[list[tuple[int, ...]], int, int]:
        at_once, done = 0, list[Completion]()
        for result in running.run(iter(asked())):
            if not at_once:
                assert on_device(running) == before
            at_once = max(at_once, result.rows_in_flight)
            done += result.completions
        tokens = [each.token_ids for each in sorted(done, key=lambda each: each.index)]
        return tokens, at_once, budget.used

    assert run() == run()
    assert on_device(running) > before
    running.close()


def test_what_is_kept_takes_no_more_than_rows_have_left(tmp_path: Path) -> None:
    policy = Policy(Shares(0.2, 0), slots=SLOTS, prefill_tokens=40)
    running = opened("opt", policy, tmp_path)
    budget = running._storage.budgets[Tier.DEVICE]
    used = list[int]()
    for _ in running.run(iter(asked())):
        used.append(budget.used)
    running.close()
    assert max(used) == used[0]
    assert budget.peak == used[0]
    assert budget.by_purpose["weights"] > 0


def test_what_prompts_needed_holds_weights_while_all_rows_still_run(tmp_path: Path) -> None:
    """And holds none of them when the next run begins with prompts."""
    policy = Policy(Shares(0.2, 0), slots=SLOTS, prefill_tokens=SLOTS * LONGEST)
    running = engine(saved("opt"), policy, LONGEST + NEW_TOKENS, tmp_path, prompts_bytes=300_000)
    rows = prompts(SLOTS, LONGEST)
    before, budget = on_device(running), running._storage.budgets[Tier.DEVICE]
    for _ in range(2):
        done, while_all_run = list[Completion](), list[set[str]]()
        for result in running.run(Request(index, row, Sampling(max_new_tokens=30)) for index, row in enumerate(rows)):
            done += result.completions
            if result.prefill_tokens:
                assert on_device(running) == before
                used = budget.used
            elif result.rows_in_flight == SLOTS:
                while_all_run.append(on_device(running))
        assert while_all_run[-1] > before
        assert used < budget.peak <= used + 300_000
        for completion in done:
            want = reference("opt", rows[completion.index], 30)
            assert_same_tokens("opt", rows[completion.index], completion.token_ids, want)
    running.close()


def test_a_process_that_holds_more_than_was_planned_gives_none_of_it_to_weights(tmp_path: Path) -> None:
    """Memory above the limit is taken from libraries' pages, which are then read again for every call."""
    limits = Limits(device=1 << 41, disk_folder=tmp_path, one_memory=True)
    policy = Policy(Shares(0.2, 0), slots=SLOTS, prefill_tokens=40)
    for planned in (1, 1 << 40):
        running = engine(saved("opt"), policy, LONGEST + NEW_TOKENS, tmp_path, limits=limits, planned_bytes=planned)
        before = on_device(running)
        answer(running, asked())
        assert (on_device(running) == before) == (planned == 1)


def test_waits_and_bytes_are_counted_on_when_the_stream_begins_anew(tmp_path: Path) -> None:
    running = opened("opt", Policy(Shares(0.2, 0), slots=SLOTS, prefill_tokens=40), tmp_path)
    _, passes = answer(running, asked())
    assert min(result.waits["weights"] for result in passes) >= 0
    assert min(sum(result.bytes_moved.values()) for result in passes) >= 0


@pytest.mark.parametrize("resident", [1.0, 0.2])
def test_an_arena_that_is_shifted_leaves_alone_what_no_row_is_in(resident: float, tmp_path: Path) -> None:
    """Copying free slots would bring pages that were never touched, or those that were given back to weights."""
    running = opened("opt", Policy(Shares(resident, 0), slots=SLOTS, prefill_tokens=40), tmp_path)
    request = Request(0, prompts(1, LONGEST)[0], Sampling(max_new_tokens=NEW_TOKENS))
    ends = []
    with torch.inference_mode():
        for number, _ in enumerate(running.run(iter([request]))):
            parts = [part for layer in running._arena.layers for part in layer.segments[0].slots.parts]
            if number == 1:
                for part in parts:
                    part[1:].fill_(7)
            ends.append(running._arena.end)
        assert sorted(ends) != ends
        assert all(part[1:].eq(7).all() for part in parts)
    running.close()


def test_rows_that_an_earlier_run_finished_are_answered_at_the_end_of_a_job(tmp_path: Path) -> None:
    """When nothing else is left no memory can be given to weights, and nothing needs it."""
    requests = [
        Request(index, prompt, Sampling(max_new_tokens=3), resumed=(5, 6, 7))
        for index, prompt in enumerate(prompts(4, LONGEST))
    ]
    done, _ = answer(opened("opt", Policy(Shares(0, 0), slots=2, prefill_tokens=40), tmp_path), requests)
    assert [done[index].token_ids for index in range(4)] == [(5, 6, 7)] * 4


@pytest.mark.parametrize("planned", [1, 1 << 40])
def test_freed_memory_is_held_to_what_was_planned_however_far_the_limit_is(planned: int, tmp_path: Path) -> None:
    limits = Limits(device=1 << 41, disk_folder=tmp_path, one_memory=True)
    policy = Policy(slots=SLOTS, prefill_tokens=40)
    running = engine(saved("opt"), policy, LONGEST + NEW_TOKENS, tmp_path, limits=limits, planned_bytes=planned)
    assert running._heap.has_room(0) == (planned > 1)
    running.close()
