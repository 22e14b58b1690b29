"""The KV cache in fewer bytes without loss: rows say what they say with a plain one, wherever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexbatch.engine.model_shapes import spec_from_config
from flexbatch.engine.opening import Limits
from flexbatch.errors import IncompressibleCache
from flexbatch.plan.memory_need import needs
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.plan.workload import Workload
from flexbatch.records import Completion, Request, Sampling
from tests.engine.families import loaded, prompts, saved
from tests.engine.running import answer, engine
from tests.engine.test_guesses import Drafts, always, counts, knowing  # noqa: F401 - a fixture
from tests.engine.test_packed_kv import assert_slots_are_booked
from tests.plan.examples import machine

WIDE = ["llama-wide", "opt-wide"]
NEW_TOKENS, LONGEST = 8, 100
SPAN = LONGEST + NEW_TOKENS
SAMPLING = Sampling(max_new_tokens=NEW_TOKENS, logprobs=True)
PLACEMENTS = {"memory": Shares(1, 0), "disk": Shares(0, 0), "mixed": Shares(0.35, 0.4)}
POLICY = Policy(Shares(0, 0), slots=4, prefill_tokens=40, compressed_cache=True)
# Log-probabilities of bfloat16 arithmetic whose sums are made in another order differ by less.
NOISE = 0.06


def said(
    family: str, policy: Policy, folder: Path, rows: Sequence[tuple[int, ...]], *, most_slots: int = 0, shared: int = 0
) -> dict[int, Completion]:
    running = engine(saved(family), policy, SPAN, folder, dtype=torch.bfloat16, most_slots=most_slots)
    asked = (Request(index, row, SAMPLING, shared_tokens=shared) for index, row in enumerate(rows))
    return answer(running, asked)[0]


def assert_alike(got: dict[int, Completion], wanted: dict[int, Completion]) -> None:
    """The same tokens with the same probabilities; from a step on at which two are as likely, anything."""
    assert got.keys() == wanted.keys()
    same = 0
    for index, want in wanted.items():
        pairs = zip(got[index].token_ids, want.token_ids, got[index].logprobs, want.logprobs, strict=True)
        for token, other, logprob, other_logprob in pairs:
            assert abs(logprob - other_logprob) < NOISE
            if token != other:
                break
            same += 1
    assert same > 0.7 * sum(len(want.token_ids) for want in wanted.values())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", WIDE)
def test_rows_say_what_they_say_with_a_plain_cache(family: str, placement: str, tmp_path: Path) -> None:
    """Prompts enter in parts, and find the parts before them as they were."""
    rows = prompts(11, LONGEST, seed=4)
    policy = replace(POLICY, kv=PLACEMENTS[placement])
    plain = said(family, replace(policy, compressed_cache=False), tmp_path, rows)
    assert_alike(said(family, policy, tmp_path, rows), plain)


def test_heads_that_cannot_be_kept_compressed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompressibleCache, match=r"heads of 16 numbers in torch\.bfloat16") as caught:
        said("llama", POLICY, tmp_path, prompts(1, LONGEST))
    assert "offload.compressed_cache=never" in caught.value.remedy


@pytest.mark.parametrize("family", WIDE)
def test_more_short_rows_than_slots_and_shared_prefixes_change_nothing(family: str, tmp_path: Path) -> None:
    beginning = prompts(1, LONGEST, seed=9)[0][:3] * 4
    rows = [beginning + row[: 1 + index % 9] for index, row in enumerate(prompts(20, 12, seed=5))]
    plain = said(family, replace(POLICY, compressed_cache=False), tmp_path, rows)
    assert_alike(said(family, POLICY, tmp_path, rows, most_slots=12), plain)
    assert_alike(said(family, POLICY, tmp_path, rows, shared=len(beginning)), plain)


@pytest.mark.parametrize("family", WIDE)
def test_a_resumed_row_goes_on_as_it_would_have(family: str, tmp_path: Path) -> None:
    rows = prompts(7, LONGEST, seed=6)
    whole = said(family, POLICY, tmp_path, rows)
    begun = (
        Request(index, row, SAMPLING, whole[index].token_ids[:3], whole[index].logprobs[:3])
        for index, row in enumerate(rows)
    )
    resumed, _ = answer(engine(saved(family), POLICY, SPAN, tmp_path, dtype=torch.bfloat16), begun)
    assert_alike(resumed, whole)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", WIDE)
def test_rows_guess(family: str, placement: str, tmp_path: Path, always: Callable[[Drafts], None]) -> None:  # noqa: F811 - the fixture
    rows = prompts(9, LONGEST, seed=7)
    policy = replace(POLICY, kv=PLACEMENTS[placement])
    plain = said(family, policy, tmp_path, rows)
    always(knowing([(*row, *plain[index].token_ids) for index, row in enumerate(rows)]))
    running = engine(saved(family), policy, SPAN, tmp_path, dtype=torch.bfloat16, guess_room=100)
    guessed, passes = answer(running, (Request(index, row, SAMPLING) for index, row in enumerate(rows)))
    assert_alike(guessed, plain)
    assert counts(passes)[1] > 10


@pytest.mark.parametrize("family", WIDE)
def test_the_budgets_hold_exactly_what_the_plan_says(family: str, tmp_path: Path) -> None:
    spec = spec_from_config(loaded(family).config.to_dict(), family, "float32", "bfloat16")
    policy = replace(POLICY, kv=PLACEMENTS["mixed"], slots=5, prefix_sharing=False)
    workload = Workload.uniform(9, LONGEST, NEW_TOKENS)
    limits = Limits(disk_folder=tmp_path)
    running = engine(saved(family), policy, SPAN, tmp_path, limits=limits, dtype=torch.bfloat16)
    budgets = running._storage.budgets
    asked = (Request(index, (7,) * LONGEST, Sampling(max_new_tokens=NEW_TOKENS)) for index in range(9))
    iterator = running.run(asked)
    for _ in range(4):
        next(iterator)
    assert_slots_are_booked(budgets, spec, workload, policy)
    planned = {need.what: need.nbytes for need in needs(spec, machine("cpu-2core"), workload, policy)}
    booked = budgets[Tier.DEVICE].by_purpose
    assert booked["KV of one layer, expanded"] == planned["KV of one layer, expanded"]
    assert booked["KV from disk"] <= planned["KV from disk"]
    running.close()


def test_a_model_whose_keys_are_of_all_sizes_is_refused_and_told_how_to_go_on(tmp_path: Path) -> None:
    folder = with_small_keys(saved("opt-wide"), tmp_path / "model")
    running = engine(folder, POLICY, SPAN, tmp_path, dtype=torch.bfloat16)
    with pytest.raises(IncompressibleCache, match="cannot be kept compressed: of a token's 64 numbers") as raised:
        answer(running, [Request(0, prompts(1)[0], SAMPLING)])
    assert "offload.compressed_cache=never" in raised.value.remedy


def with_small_keys(model: Path, folder: Path) -> Path:
    """A copy of the model, half of whose keys in one layer are next to nothing."""
    copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.2.self_attn.k_proj.weight"))
    for part in (name, name.replace("weight", "bias")):
        weights[part][::2] *= 2.0**-30  # 32 of 64 numbers
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
