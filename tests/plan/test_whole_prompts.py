"""Prompts of one length enter whole where a pass takes a number of them, and need no room for one in parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.config import OffloadConfig
from flexbatch.plan.enumeration import admitting, prefill_counts
from flexbatch.plan.memory_need import kv_block_bytes, needs
from flexbatch.plan.need import peak_bytes
from flexbatch.plan.optimizer import choose_policy
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.plan.workload import Workload
from tests.plan.examples import machine, model

MACHINE = machine("cpu-2core-amx", compressed_attention_numbers=7e9)
STREAMED = Policy(weights=Shares(0.5, 0), kv=Shares(0, 0), slots=32)
LENGTHS = (512,) * 40


def work(lengths: tuple[int, ...] = LENGTHS) -> Workload:
    return Workload.from_samples(len(lengths), lengths, 32)


def test_it_leaves_a_layers_block_for_each_layer_to_weights() -> None:
    spec = model("opt-1.3b")
    whole, parted = (admitting(STREAMED, work(), tokens) for tokens in (512, 513))
    assert whole.whole_prompts
    assert not parted.whole_prompts
    held = [peak_bytes(needs(spec, MACHINE, work(), each))[Tier.DEVICE] for each in (whole, parted)]
    assert held[1] - held[0] >= len(spec.layers) * kv_block_bytes(spec, work(), whole)


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (work((*LENGTHS, 511)), {}),
        (replace(work(), shared_tokens=256.0, rows_per_group=40.0, longest_own=256), {}),
        (work(), {"weights": Shares(1, 0)}),
    ],
    ids=["other lengths", "shared prefixes", "nothing streamed"],
)
def test_it_is_not_so_where_a_pass_may_have_something_left_over(rows: Workload, changes: dict[str, object]) -> None:
    assert not admitting(replace(STREAMED, **changes), rows, 512).whole_prompts  # type: ignore[arg-type]


@given(slots=st.integers(1, 200), length=st.integers(1, 600))
def test_whole_prompts_are_among_what_is_tried(slots: int, length: int) -> None:
    rows = Workload.uniform(400, length)
    tried = prefill_counts(rows, OffloadConfig(), slots, STREAMED)
    assert any(admitting(STREAMED, rows, tokens).whole_prompts for tokens in tried)
    assert tried == sorted(set(tried))


def test_a_job_of_padded_prompts_under_little_memory_is_planned_so() -> None:
    policy, _ = choose_policy(model("opt-6.7b"), MACHINE, Workload.uniform(24), OffloadConfig(device_memory="6GiB"))
    assert policy.kv.disk > 0
    assert policy.whole_prompts
