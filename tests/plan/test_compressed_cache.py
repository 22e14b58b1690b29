"""A KV cache in fewer bytes without loss is used where a job is faster by it, and only where it can be had."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.config import OffloadConfig
from flexbatch.plan.cost_model import predict
from flexbatch.plan.limits import limits_of
from flexbatch.plan.memory_need import kv_unit_bytes, may_compress_cache
from flexbatch.plan.model_spec import is_compressible
from flexbatch.plan.optimizer import choose_policy
from flexbatch.plan.policy import Policy, Shares
from flexbatch.plan.workload import Workload
from tests.plan.examples import machine, model

MACHINE = machine("cpu-2core-amx", compressed_attention_numbers=7e9)
WORK = Workload.uniform(24)
SMALL = OffloadConfig(device_memory="6GiB")


def test_it_takes_some_three_quarters_of_the_bytes() -> None:
    plain, compressed = (Policy(compressed_cache=each) for each in (False, True))
    for name in ("opt-1.3b", "opt-6.7b", "opt-175b"):
        share = kv_unit_bytes(model(name), WORK, compressed) / kv_unit_bytes(model(name), WORK, plain)
        assert 0.75 < share < 0.79


def test_a_job_whose_rows_do_not_fit_is_faster_by_it() -> None:
    """OPT-6.7B under 6 GiB: 24 rows of 544 tokens take 6.9 GB as they are."""
    plain = choose_policy(model("opt-6.7b"), MACHINE, WORK, replace(SMALL, compressed_cache="never"))[1]
    policy, made = choose_policy(model("opt-6.7b"), MACHINE, WORK, SMALL)
    assert policy.compressed_cache
    assert not plain.policy.compressed_cache
    assert 1.02 < plain.seconds / made.seconds < 1.5


def test_where_all_fits_it_is_left_as_it_is_unless_asked_for() -> None:
    large = OffloadConfig(device_memory="20GiB")
    assert not choose_policy(model("opt-1.3b"), MACHINE, WORK, large)[0].compressed_cache
    assert choose_policy(model("opt-1.3b"), MACHINE, WORK, replace(large, compressed_cache="always"))[
        0
    ].compressed_cache


def test_it_makes_room_where_a_plain_one_has_none() -> None:
    work, tight = Workload.uniform(1, 1900, 100), OffloadConfig(device_memory="1.3GiB", policy="manual")
    tight = replace(tight, percent=[0, 0, 100, 0, 100, 0], slots=1, prefill_tokens=128)
    policy, _ = choose_policy(model("opt-1.3b"), MACHINE, work, tight)
    assert policy.compressed_cache


@pytest.mark.parametrize(
    ("heads", "sizes", "can_be"),
    [(32, (64, 64), True), (8, (128, 64), True), (32, (80, 80), False), (32, (96, 96), False), (300, (64, 64), False)],
)
def test_heads_of_whole_blocks_can_be_compressed(heads: int, sizes: tuple[int, int], can_be: bool) -> None:
    assert is_compressible(heads, sizes) is can_be


def test_it_is_for_bfloat16_on_a_processor_that_was_measured() -> None:
    assert may_compress_cache(model("opt-1.3b"), MACHINE)
    assert not may_compress_cache(model("opt-1.3b", "float32"), MACHINE)
    assert not may_compress_cache(model("opt-2.7b"), MACHINE)  # heads of 80
    assert not may_compress_cache(model("opt-1.3b"), machine("t4-gcp"))
    packed = choose_policy(model("opt-6.7b"), MACHINE, WORK, replace(SMALL, kv_bits=8, compressed_cache="always"))[0]
    assert not packed.compressed_cache


def test_prompts_that_enter_in_parts_are_expanded_with_what_came_before_and_whole_ones_never() -> None:
    spec, work = model("opt-1.3b"), Workload.uniform(64)
    whole = predict(spec, MACHINE, work, Policy(slots=16, prefill_tokens=512, compressed_cache=True))
    assert whole.terms["KV expanded"].amount == 0
    in_parts = Policy(slots=16, prefill_tokens=128, weights=Shares(0.5, 0), compressed_cache=True)
    prompts = 64 * 512 * spec.kv_numbers_per_token
    made = predict(spec, MACHINE, work, in_parts)
    assert made.terms["KV expanded"].amount == pytest.approx(prompts * (0 + 1 + 2 + 3) / 4)


@settings(max_examples=12, deadline=None)
@given(
    memory=st.sampled_from(["1.3GiB", "2GiB", "2.5GiB", "4GiB"]),
    rows=st.integers(1, 80),
    prompt=st.integers(16, 512),
    shared=st.booleans(),
)
def test_no_plan_exceeds_its_limit_by_it(memory: str, rows: int, prompt: int, shared: bool) -> None:
    work = Workload.uniform(rows, prompt, 32)
    if shared:
        work = replace(work, shared_tokens=prompt // 2, rows_per_group=rows, longest_own=prompt - prompt // 2)
    options = OffloadConfig(device_memory=memory, compressed_cache="always")
    policy, made = choose_policy(model("opt-1.3b"), MACHINE, work, options)
    assert policy.compressed_cache
    assert limits_of(MACHINE, options).exceeded(made.peak) is None
