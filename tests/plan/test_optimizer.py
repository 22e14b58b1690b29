"""The chosen policy keeps every limit, is as fast as any, and says why when there is none."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.config import OffloadConfig
from flexbatch.errors import CapacityError, ConfigError
from flexbatch.plan.advice import advise
from flexbatch.plan.cost_model import Prediction, predict
from flexbatch.plan.limits import limits_of
from flexbatch.plan.memory_need import kv_units, needs
from flexbatch.plan.need import peak_bytes
from flexbatch.plan.optimizer import choose_policy, frontier, pick
from flexbatch.plan.placement import place_slots
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.plan.terms import pass_terms
from flexbatch.plan.workload import PassLoad, Workload
from tests.plan.examples import GIB, machine, model, tiny_model

EIGHTHS = [Shares(device / 8, 0.0) for device in range(9)]


@settings(max_examples=10, deadline=None)
@given(
    memory=st.floats(1.6, 20.0),
    rows=st.integers(1, 3000),
    prompt=st.integers(1, 1500),
    new=st.integers(1, 64),
    shared=st.floats(0.0, 0.9),
    weight_bits=st.sampled_from([16, 8, 4]),
    kv_bits=st.sampled_from([16, 8, 4]),
)
def test_no_plan_exceeds_a_limit(
    memory: float, rows: int, prompt: int, new: int, shared: float, weight_bits: int, kv_bits: int
) -> None:
    spec, hardware = model("opt-1.3b"), machine("cpu-2core")
    work = Workload.uniform(rows, prompt, new, shared_tokens=shared * prompt, rows_per_group=min(rows, 50))
    offload = OffloadConfig(device_memory=f"{memory:.3f}GiB", weight_bits=weight_bits, kv_bits=kv_bits)
    policy, made = choose_policy(spec, hardware, work, offload)
    exact = peak_bytes(needs(spec, hardware, work, policy))
    assert exact == made.peak
    assert limits_of(hardware, offload).exceeded(exact) is None
    assert policy.slots <= rows
    assert (policy.weight_bits, policy.kv_bits) == (weight_bits, kv_bits)


@settings(max_examples=3, deadline=None)
@given(device=st.integers(6, 15), host=st.integers(20, 200))
def test_no_plan_exceeds_a_limit_of_an_accelerator_machine(device: int, host: int) -> None:
    spec, hardware = model("opt-30b", "float16"), machine("t4-gcp")
    offload = OffloadConfig(device_memory=f"{device}GiB", host_memory=f"{host}GB")
    policy, made = choose_policy(spec, hardware, Workload.uniform(2000), offload)
    assert limits_of(hardware, offload).exceeded(made.peak) is None
    for shares in (policy.weights, policy.kv, policy.hidden):
        assert 0 <= shares.device <= 1
        assert 0 <= shares.host <= 1
        assert shares.device + shares.host <= 1 + 1e-9


@pytest.mark.parametrize("name", ["opt-1.3b", pytest.param("opt-6.7b", marks=pytest.mark.slow)])
def test_more_memory_never_predicts_a_slower_run(name: str) -> None:
    spec, hardware, work = model(name), machine("cpu-2core"), Workload.uniform(100)
    seconds = [
        choose_policy(spec, hardware, work, OffloadConfig(device_memory=f"{memory}GiB"))[1].seconds
        for memory in (3, 4, 5, 6, 10, 22)
    ]
    # Shares are held to one tensor, and a hundredth is given for half the slots: hence the tolerance.
    assert all(later <= earlier * 1.015 for earlier, later in itertools.pairwise(seconds))


@pytest.mark.parametrize("memory", ["1.5GiB", "2GiB", "3GiB", "6GiB"])
def test_the_optimiser_agrees_with_brute_force(memory: str) -> None:
    """Every policy on a grid of shares, slots and prefill that fits is no faster than the chosen one (2 %)."""
    spec, hardware, work = model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(24, 256, 16)
    offload = OffloadConfig(device_memory=memory)
    _, made = choose_policy(spec, hardware, work, offload)
    limits, best = limits_of(hardware, offload), float("inf")
    prefill = (0.25, 0.5, 1, 2, 8)
    for weights, kv, slots, joining in itertools.product(EIGHTHS, EIGHTHS[::4], (1, 2, 4, 8, 16, 24), prefill):
        policy = Policy(weights=weights, kv=kv, slots=slots, prefill_tokens=int(joining * 256))
        if limits.exceeded(peak_bytes(needs(spec, hardware, work, policy))) is None:
            best = min(best, predict(spec, hardware, work, policy).seconds)
    assert made.seconds <= best * 1.02


def test_rows_on_disk_are_read_with_room_for_what_they_gain_and_no_more() -> None:
    spec, hardware = model("opt-1.3b"), machine("cpu-2core")
    policy = Policy(Shares(0.1, 0.0), Shares(0.0, 0.0), slots=4, prefill_tokens=200)

    def read(prompts: tuple[int, ...], new: int = 32) -> float:
        work = Workload(64, prompts, (new,), 512, new)
        terms = {term.what: term for term in pass_terms(spec, hardware, work, policy, PassLoad(0, 4))}
        return terms["KV read from disk"].amount / spec.kv_bytes_per_token()

    assert read((512,)) == 4 * 544
    assert read((100, 512)) == 4 * (192 + 544) / 2
    assert read((100,), new=132) == 4 * 192  # some have 132 and are written with 192 columns, or with 256 later


def test_without_an_accelerator_rows_are_kept_on_disk_where_a_model_is_much_larger_than_they_are() -> None:
    """A pass of OPT-175B reads 350 GB of weights, which 64 rows of 2.6 GB share as well as the 6 that fit in memory."""
    hardware = machine("cpu-2core", disk_space=2 << 40)
    offload = OffloadConfig(device_memory="20GiB")
    policy, made = choose_policy(model("opt-175b"), hardware, Workload.uniform(64), offload)
    assert policy.kv.disk > 0.5
    assert limits_of(hardware, offload).exceeded(made.peak) is None
    in_memory = OffloadConfig(device_memory="20GiB", slots=6)
    assert made.seconds < 0.6 * choose_policy(model("opt-175b"), hardware, Workload.uniform(64), in_memory)[1].seconds
    small, _ = choose_policy(model("opt-1.3b"), hardware, Workload.uniform(64), OffloadConfig(device_memory="2.5GiB"))
    assert small.kv.device == 1


def test_a_dataset_shorter_than_the_slots_shrinks_them() -> None:
    policy, _ = choose_policy(model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(3), OffloadConfig(slots=64))
    assert policy.slots == 3


@pytest.mark.parametrize("hardware", ["cpu-2core", "cpu-2core-avx2", "cpu-2core-amx"])
def test_from_a_thousand_rows_on_a_tiny_model_holds_the_same_memory(hardware: str) -> None:
    spec, profile = tiny_model(), machine(hardware)
    jobs = {
        rows: choose_policy(spec, profile, Workload.uniform(rows, 64, 32), OffloadConfig())[1]
        for rows in (1000, 3000, 10_000, 1_000_000)
    }
    assert {job.peak[Tier.DEVICE] for job in jobs.values()} == {jobs[1000].peak[Tier.DEVICE]}
    per_row = [job.seconds / rows for rows, job in jobs.items()]
    assert per_row == sorted(per_row, reverse=True)


@pytest.mark.parametrize("key", ["device_memory", "host_memory"])
def test_a_limit_above_what_the_machine_has_is_refused(key: str) -> None:
    with pytest.raises(CapacityError, match=f"offload.{key} is 900GiB"):
        choose_policy(
            model("opt-1.3b", "float16"), machine("t4-gcp"), Workload.uniform(9), OffloadConfig(**{key: "900GiB"})
        )


def test_what_cannot_fit_names_the_limit_and_the_change_that_makes_it_fit() -> None:
    spec, hardware, work = model("opt-6.7b"), machine("cpu-2core"), Workload.uniform(9)
    with pytest.raises(CapacityError, match="weight stream") as raised:
        choose_policy(spec, hardware, work, OffloadConfig(device_memory="1GiB"))
    assert "the limit is 1GiB" in raised.value.message
    enough = raised.value.remedy.split(" to ")[1].rstrip(".")
    choose_policy(spec, hardware, work, OffloadConfig(device_memory=enough))


def test_fixed_slots_that_do_not_fit_say_so() -> None:
    with pytest.raises(CapacityError, match="with 4000 slots") as raised:
        choose_policy(model("opt-6.7b"), machine("cpu-2core"), Workload.uniform(9000), OffloadConfig(slots=4000))
    assert "offload.slots" in raised.value.remedy


def test_manual_shares_are_kept_and_checked() -> None:
    spec, hardware, work = model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(20)
    manual = OffloadConfig(policy="manual", percent=[25, 0, 100, 0, 100, 0])
    policy, _ = choose_policy(spec, hardware, work, manual)
    assert (policy.weights, policy.kv) == (Shares(0.25, 0.0), Shares(1.0, 0.0))
    with pytest.raises(CapacityError, match=r"offload\.percent"):
        choose_policy(spec, hardware, work, replace(manual, percent=[100, 0, 100, 0, 100, 0], device_memory="1.5GiB"))


def test_a_number_format_that_the_machine_does_not_list_is_named() -> None:
    with pytest.raises(ConfigError, match="no gemm rates for bfloat16"):
        choose_policy(model("opt-1.3b"), machine("t4-gcp"), Workload.uniform(9), OffloadConfig())


@settings(deadline=None)
@given(slots=st.integers(1, 40), device=st.floats(0, 1), rest=st.floats(0, 1))
def test_every_unit_of_the_cache_is_placed_once_and_as_shared_out(slots: int, device: float, rest: float) -> None:
    spec = model("opt-1.3b")
    shares = Shares(device, (1 - device) * rest)
    counts = place_slots(len(spec.layers), slots, shares)
    units = kv_units(spec, Policy(kv=shares, slots=slots))
    total = len(spec.layers) * slots
    assert sum(units.values()) == total
    assert all(device >= 0 and host >= 0 and device + host <= slots for device, host in counts)
    assert units[Tier.DEVICE] == pytest.approx(total * shares.device, abs=0.51)
    assert units[Tier.HOST] == pytest.approx(total * shares.host, abs=1.01)


def test_advice_names_what_binds() -> None:
    spec, work = model("opt-1.3b"), Workload.uniform(64)
    hardware = machine("cpu-2core", disk_read=2e8)
    offload = OffloadConfig(device_memory="2GiB")
    _, made = choose_policy(spec, hardware, work, offload)
    advice = {each.change: each.speedup for each in advise(spec, hardware, work, offload, made)}
    assert advice["offload.weight_bits=4"] > 1.3
    assert advice["a disk twice as fast"] > 1.3
    assert list(advice.values()) == sorted(advice.values(), reverse=True)


def test_along_the_frontier_rows_take_longer() -> None:
    made = frontier(
        model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(256), OffloadConfig(device_memory=f"{4 * GIB}")
    )
    assert [each.policy.slots for each in made[:4]] == [1, 2, 4, 8]
    assert all(later.row_seconds > earlier.row_seconds for earlier, later in itertools.pairwise(made))


def test_room_is_planned_for_one_prefix_only_where_all_rows_are_known_to_have_it() -> None:
    known = Workload.from_samples(128, [512] * 128, 32, shared_tokens=400.0, rows_per_group=128.0)
    sampled = Workload.from_samples(128, [512] * 64, 32, shared_tokens=400.0, rows_per_group=64.0)
    many = Workload.from_samples(128, [512] * 128, 32, shared_tokens=400.0, rows_per_group=8.0)
    assert [each.groups_at_once(32) for each in (known, sampled, many)] == [1, 2, 5]


def test_of_plans_as_fast_the_one_with_fewer_passes_is_taken_where_weights_pass_by_else_that_with_fewer_slots() -> None:
    spec, hardware, workload = model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(64)

    def made(slots: int, passes: float, seconds: float, weights: float, kv: float = 1.0) -> Prediction:
        policy = Policy(Shares(weights, 0), Shares(kv, 0), slots=slots, prefill_tokens=256)
        return replace(predict(spec, hardware, workload, policy), passes=passes, seconds=seconds)

    streamed = [made(15, 176, 100.0, 0.3), made(19, 144, 101.4, 0.1), made(22, 127, 101.6, 0.0)]
    assert pick(streamed).policy.slots == 19, "passes cost a hundredth and a half that is not foreseen, and no more"
    assert pick([*streamed, made(24, 120, 101.4, 0.6, kv=0.0)]).policy.slots == 19, "rows on disk are another matter"
    assert pick([made(15, 176, 100.0, 1.0), made(19, 144, 100.1, 1.0)]).policy.slots == 15
    assert pick([made(19, 144, 100.0, 1.0), made(15, 176, 100.1, 1.0)]).policy.slots == 15


def test_a_job_whose_weights_pass_by_takes_the_fewest_passes_that_cost_next_to_nothing() -> None:
    spec, hardware = model("opt-1.3b"), machine("cpu-2core", compressed_attention_numbers=12e9)
    workload, offload = Workload.uniform(64), OffloadConfig(device_memory="2.5GiB")
    made = choose_policy(spec, hardware, workload, offload)[1]
    assert made.policy.weights.device < 1.0
    for slots in range(made.policy.slots + 1, 2 * made.policy.slots):
        other = choose_policy(spec, hardware, workload, replace(offload, slots=slots))[1]
        is_like = other.policy.kv.device >= made.policy.kv.device and other.passes < made.passes
        assert not is_like or other.seconds > made.seconds
