"""A lossless copy of the weights is used where a job gains more by it than making it takes, where it can be had."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexbatch.config import OffloadConfig
from flexbatch.errors import CapacityError
from flexbatch.plan.compressed_file import has_room, making_seconds
from flexbatch.plan.cost_model import predict
from flexbatch.plan.limits import limits_of
from flexbatch.plan.memory_need import needs
from flexbatch.plan.model_spec import COMPRESSED, ModelSpec
from flexbatch.plan.optimizer import choose_policy
from flexbatch.plan.policy import Policy, Shares, Tier
from flexbatch.plan.workload import Workload
from tests.plan.examples import GIB, machine, model

SHARE = 0.708
SLOW_DISK = machine("cpu-2core", disk_read=5e8)
SMALL = "2.5GiB"


def compressible(name: str = "opt-1.3b", there: bool = False, dtype: str = "bfloat16") -> ModelSpec:
    return replace(model(name, dtype), compressed_share=SHARE, has_compressed_file=there)


def offload(**changes: object) -> OffloadConfig:
    return OffloadConfig(**{"device_memory": SMALL, **changes})  # type: ignore[arg-type]


def test_matrices_that_whole_chunks_would_not_make_smaller_stay_as_they_are() -> None:
    spec = compressible()
    assert [spec.tensor_bytes(numbers, True, COMPRESSED) for numbers in (40_000, 70_000)] == [80_000, 140_000]
    assert spec.tensor_bytes(65_536, True, COMPRESSED) == round(2 * 65_536 * SHARE)
    assert spec.tensor_bytes(65_536, False, COMPRESSED) == 2 * 65_536


def test_its_matrices_take_their_share_and_nothing_else_does() -> None:
    spec = compressible()
    matrices = 2 * spec.packed_numbers
    assert spec.weight_bytes(COMPRESSED) == pytest.approx(spec.weight_bytes() - (1 - SHARE) * matrices, rel=1e-6)


def test_a_long_job_that_waits_for_the_disk_is_faster_by_nearly_as_much_as_it_reads_less() -> None:
    work = Workload.uniform(256)
    as_they_are, cache = offload(compressed_file="never", compressed_cache="never"), offload(compressed_cache="never")
    plain = choose_policy(compressible(), SLOW_DISK, work, as_they_are)[1]
    policy, made = choose_policy(compressible(), SLOW_DISK, work, cache)
    assert policy.compressed
    assert 1.25 < plain.seconds / made.seconds < 1.6


def test_a_machine_that_expands_within_its_products_is_not_charged_for_it_twice() -> None:
    policy, rates = Policy(Shares(0, 0), slots=8, prefill_tokens=256, compressed=True), {1: 1e10, 1024: 1e11}
    plain = machine("cpu-2core")
    within = replace(plain, gemm={**plain.gemm, "compressed": tuple(rates.items())})
    for name, expands_before in (("opt-1.3b", False), ("opt-350m", True)):  # 1,024 inputs are no whole records
        terms = predict(compressible(name), within, Workload.uniform(16), policy).terms
        assert ("expand weights" in terms) is expands_before
        uses = {need.what for need in needs(compressible(name), within, Workload.uniform(16), policy)}
        assert ("one layer expanded" in uses) is expands_before
    slower = replace(
        within, gemm={**within.gemm, "compressed": tuple((rows, rate / 2) for rows, rate in rates.items())}
    )
    fast, slow = (predict(compressible(), each, Workload.uniform(16), policy).terms for each in (within, slower))
    assert slow["prefill matrices"].seconds == pytest.approx(2 * fast["prefill matrices"].seconds)


def test_it_is_expanded_at_a_rate_of_its_own_where_that_was_measured() -> None:
    spec, policy = compressible(), Policy(Shares(0, 0), slots=8, prefill_tokens=256, compressed=True)
    seconds = [
        predict(spec, machine("cpu-2core", expansion_numbers=rate), Workload.uniform(16), policy).terms[
            "expand weights"
        ]
        for rate in (0, 2e9, 4e9)
    ]
    packed, slow, fast = (term.seconds for term in seconds)
    assert slow == pytest.approx(2 * fast)
    assert packed * machine("cpu-2core").dequantize_numbers == pytest.approx(slow * 2e9)


def test_a_short_job_does_not_make_it_but_uses_one_that_is_there() -> None:
    work = Workload.uniform(2, new=4)
    assert not choose_policy(compressible(), SLOW_DISK, work, offload())[0].compressed
    assert choose_policy(compressible(there=True), SLOW_DISK, work, offload())[0].compressed
    assert choose_policy(compressible(), SLOW_DISK, work, offload(compressed_file="always"))[0].compressed


def test_a_disk_without_room_for_it_keeps_it_from_being_made() -> None:
    nbytes = int(2 * compressible().packed_numbers * SHARE)
    assert has_room(compressible(), 2 * nbytes + GIB)
    assert not has_room(compressible(), nbytes + GIB)


def test_what_fits_in_one_form_alone_is_run_in_that() -> None:
    work, disk = Workload.uniform(8), SLOW_DISK
    for percent in ([0, 0, 100, 0, 100, 0], [60, 0, 100, 0, 100, 0]):
        options = OffloadConfig(policy="manual", percent=percent, slots=2, prefill_tokens=64, compressed_file="always")
        forms = [replace(options, compressed_file="never"), options]
        peaks = [choose_policy(compressible(), disk, work, form)[1].peak[Tier.DEVICE] for form in forms]
        between = replace(options, device_memory=str(sum(peaks) // 2))
        policy, made = choose_policy(compressible(), disk, work, between)
        assert policy.compressed is (peaks[1] < peaks[0])
        assert made.peak[Tier.DEVICE] == min(peaks)
    with pytest.raises(CapacityError):
        choose_policy(compressible(), disk, work, replace(options, device_memory="0.5GiB"))


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        (compressible(), {"compressed_file": "never"}),
        (compressible(), {"weight_bits": 8}),
        (compressible(), {"compute": "int8"}),
        (compressible(), {"device_memory": "auto"}),
        (compressible(dtype="float32"), {"device_memory": "4GiB"}),
        (model("opt-1.3b"), {}),
    ],
    ids=["never", "8 bits", "int8", "all resident", "float32", "nothing to gain"],
)
def test_where_there_is_none_to_be_had_it_is_not_used(spec: ModelSpec, changes: dict[str, object]) -> None:
    work = Workload.uniform(64)
    assert not choose_policy(spec, SLOW_DISK, work, offload(**changes))[0].compressed


def test_an_accelerator_gets_its_weights_as_they_are() -> None:
    spec = compressible("opt-6.7b")
    memory = {"device_memory": "6GiB", "host_memory": "8GB"}
    hardware = machine("t4-gcp")
    hardware = replace(hardware, gemm={**hardware.gemm, "bfloat16": hardware.gemm["float16"]})
    assert not choose_policy(spec, hardware, Workload.uniform(64), OffloadConfig(**memory))[0].compressed  # type: ignore[arg-type]


@settings(max_examples=8, deadline=None)
@given(memory=st.floats(1.5, 3.0), rows=st.integers(1, 400), disk=st.sampled_from([3e8, 1e9, 3e9]))
def test_no_plan_with_it_is_slower_or_over_a_limit(memory: float, rows: int, disk: float) -> None:
    hardware, work = machine("cpu-2core", disk_read=disk), Workload.uniform(rows)
    options = offload(device_memory=f"{memory:.3f}GiB")
    plain = choose_policy(model("opt-1.3b"), hardware, work, options)[1]
    policy, made = choose_policy(compressible(), hardware, work, options)
    assert limits_of(hardware, options).exceeded(made.peak) is None
    making = making_seconds(compressible(), hardware) if policy.compressed else 0.0
    assert made.seconds + making <= plain.seconds
