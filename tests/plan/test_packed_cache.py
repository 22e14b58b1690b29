"""What the plan says of a packed KV cache: that decode attention reads it as it is kept, where it does."""

from __future__ import annotations

import pytest

from flexbatch.plan.cost_model import Prediction, predict
from flexbatch.plan.memory_need import attends_packed
from flexbatch.plan.model_spec import is_attended_packed
from flexbatch.plan.policy import Policy, Shares
from flexbatch.plan.workload import Workload
from tests.plan.examples import machine, model

WORKLOAD = Workload.uniform(64, 512, 32)
POLICY = Policy(slots=16, prefill_tokens=512, kv_bits=8, compute="int8")


def predicted(**changes: float) -> Prediction:
    return predict(model("opt-1.3b"), machine("cpu-2core-amx", **changes), WORKLOAD, POLICY)


def room(prediction: Prediction) -> int:
    return sum(need.nbytes for need in prediction.needs if need.what == "KV of one layer, expanded")


def test_a_cache_that_is_read_as_it_is_kept_is_expanded_for_prompts_alone() -> None:
    read, expanded = predicted(), predicted(packed_attention_numbers=0)
    prompts = 64 * 512 * model("opt-1.3b").kv_numbers_per_token
    assert read.terms["KV expanded"].amount == pytest.approx(prompts)
    assert expanded.terms["KV expanded"].amount > 30 * prompts
    assert read.terms["decode attention"].unit == "numbers"
    assert room(expanded) == 16 * room(read) > 0
    assert read.seconds < expanded.seconds


def test_prompts_that_enter_in_parts_are_expanded_with_what_came_before() -> None:
    streamed = Policy(slots=16, prefill_tokens=128, kv_bits=8, compute="int8", weights=Shares(0.5, 0))
    made = predict(model("opt-1.3b"), machine("cpu-2core-amx"), WORKLOAD, streamed)
    prompts = 64 * 512 * model("opt-1.3b").kv_numbers_per_token
    assert made.terms["KV expanded"].amount == pytest.approx(prompts * (1 + 2 + 3 + 4) / 4)


@pytest.mark.parametrize(
    ("sizes", "bits", "is_read"),
    [
        ((64, 64), 8, True),
        ((64, 64), 4, True),
        ((96, 96), 8, True),
        ((96, 96), 4, False),
        ((80, 80), 8, False),
        ((64, 64), 16, False),
        ((64, 16), 8, False),
    ],
)
def test_heads_of_whole_groups_are_read(sizes: tuple[int, int], bits: int, is_read: bool) -> None:
    assert is_attended_packed(sizes, bits) is is_read


def test_an_accelerator_expands() -> None:
    assert attends_packed(model("opt-1.3b"), machine("cpu-2core"), POLICY)
    assert not attends_packed(model("opt-1.3b"), machine("t4-gcp"), POLICY)
