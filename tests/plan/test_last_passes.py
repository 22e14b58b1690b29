"""The plan knows that at the end of a job the memory of finished rows holds weights."""

from __future__ import annotations

import pytest

from flexbatch.plan.memory_need import FOUND_AGAIN, kv_unit_bytes, needs, prompts_bytes
from flexbatch.plan.need import peak_bytes
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.plan.terms import pass_terms
from flexbatch.plan.weight_need import streamable_bytes
from flexbatch.plan.workload import PassLoad, Workload, schedule
from tests.plan.examples import machine, model


@pytest.mark.parametrize("rows", [20, 64, 500], ids=["few", "some", "a continued schedule"])
def test_slots_are_idle_once_no_row_comes_and_never_before(rows: int) -> None:
    slots, new = 12, 32
    loads = schedule(Workload.uniform(rows, 512, new), slots, 192.0, 32).loads
    idle = {load: count for load, count in loads.items() if load.idle}
    assert all(load.last for load in idle)
    assert all(load.joining == 0 and load.decoding + load.idle <= slots for load in idle)
    assert new - slots <= sum(idle.values()) < new
    assert max(load.idle for load in idle) == slots - 1


@pytest.mark.parametrize("rows", [12, 64])
def test_all_passes_after_the_last_prompt_but_the_first_have_its_memory_for_weights(rows: int) -> None:
    loads = schedule(Workload.uniform(rows, 512, 32), 12, 12 * 512.0, 32).loads
    assert sum(count for load, count in loads.items() if load.last) == 30
    assert not any(load.joining for load in loads if load.last)


@pytest.mark.parametrize("prefill_tokens", [192, 6144])
@pytest.mark.parametrize("idle", [0, 1, 5])
def test_idle_slots_and_prompts_spare_the_disk_their_bytes(idle: int, prefill_tokens: int) -> None:
    spec, hardware, work = model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(64)
    policy = Policy(Shares(0.1, 0.0), slots=12, prefill_tokens=prefill_tokens)

    def read(last: bool) -> float:
        load = PassLoad(0, 3, idle=idle, last=last)
        return {term.what: term for term in pass_terms(spec, hardware, work, policy, load)}["weights from disk"].amount

    spared = idle * len(spec.layers) * kv_unit_bytes(spec, work, policy) + prompts_bytes(spec, work, policy)
    assert read(last=False) - read(last=True) == pytest.approx(spared)
    assert read(last=False) == pytest.approx(0.9 * streamable_bytes(spec, policy), rel=0.05)


def test_prompts_take_what_passes_without_them_do_not() -> None:
    spec, hardware, work = model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(64)
    few, many = (Policy(Shares(0.1, 0.0), slots=12, prefill_tokens=tokens) for tokens in (192, 6144))
    less, more = prompts_bytes(spec, work, few), prompts_bytes(spec, work, many)
    assert 0 < less < more
    planned = [peak_bytes(needs(spec, hardware, work, policy))[Tier.DEVICE] for policy in (few, many)]
    assert more - less == pytest.approx(FOUND_AGAIN * (planned[1] - planned[0]), abs=1)


def test_no_more_is_spared_than_is_streamed() -> None:
    spec, hardware, work = model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(64)
    policy = Policy(Shares(0.9, 0.0), slots=12, prefill_tokens=192)
    terms = {term.what for term in pass_terms(spec, hardware, work, policy, PassLoad(0, 1, idle=11, last=True))}
    assert "weights from disk" not in terms
