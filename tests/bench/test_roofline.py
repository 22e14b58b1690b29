"""The least time of a job, and what the engines reach of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexbatch.bench.comparison import Comparison, EngineRuns
from flexbatch.bench.roofline import MachineLimits, arithmetic_seconds, job_seconds, work_of
from flexbatch.bench.trial import Outcome, Prompts

LIMITS = MachineLimits(
    gemm={8: 1e9, 64: 4e9, 2048: 8e9},
    int8={8: 2e9, 2048: 16e9},
    disk_read=1e9,
    memory_copy=1e10,
    linear_flops=2e6,
    head_flops=1e5,
    attention_flops=1e3,
)


def test_a_job_of_one_kind_is_its_flop_over_the_rate() -> None:
    work = work_of(LIMITS, [100], new_tokens=1)
    assert work.prefill == pytest.approx(100 * 2e6 + 1e5 + 1e3 * 5050)
    assert work.decode == 0
    assert arithmetic_seconds(LIMITS, work, 1) == pytest.approx(work.prefill / 8e9)
    assert arithmetic_seconds(LIMITS, work, 1, int8=True) == pytest.approx(work.prefill / 16e9)


def test_bytes_bind_where_they_take_longer() -> None:
    assert job_seconds(LIMITS, 2.0, 1_000_000_000) == 2.0
    assert job_seconds(LIMITS, 2.0, 3_000_000_000) == 3.0


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_more_rows_are_never_slower_per_flop(first: int, second: int) -> None:
    low, high = sorted((first, second))
    assert LIMITS.rate(low) <= LIMITS.rate(high) * (1 + 1e-9)


@given(st.lists(st.integers(10, 500), min_size=1, max_size=20), st.integers(1, 40), st.integers(0, 9))
def test_sharing_never_adds_work(lengths: list[int], new: int, shared: int) -> None:
    alone, together = work_of(LIMITS, lengths, new), work_of(LIMITS, lengths, new, shared)
    assert together.prefill <= alone.prefill * (1 + 1e-9)
    assert together.decode == alone.decode


def test_ratios_are_medians_of_neighbouring_runs() -> None:
    prompts = Prompts(((1, 2, 3),))

    def runs(engine: str, *seconds: float) -> EngineRuns:
        made = [Outcome(engine, rows=1, batch=1, tokens=10, seconds=each) for each in seconds]
        return EngineRuns(engine, tuple(made))

    peer = runs("accelerate", 4.0, 9.0, 2.0)
    comparison = Comparison(prompts, 4, (LIMITS,) * 4, (runs("flexbatch", 1.0, 1.0, 1.0), peer))
    assert comparison.ratio(peer) == 4.0
    failed = EngineRuns("transformers", (Outcome("transformers", error="no room"),))
    assert comparison.ratio(failed) is None
    assert {entry["engine"] for entry in comparison.record()} == {"flexbatch", "accelerate"}


def test_a_run_is_held_against_the_machine_as_it_was_before_and_after() -> None:
    slow = replace(LIMITS, gemm={rows: rate / 3 for rows, rate in LIMITS.gemm.items()})
    prompts = Prompts((tuple(range(100)),))
    least = arithmetic_seconds(LIMITS, work_of(LIMITS, [100], 1), 1)
    made = tuple(Outcome("flexbatch", rows=1, batch=1, tokens=1, seconds=4 * least) for _ in range(2))
    comparison = Comparison(prompts, 1, (LIMITS, slow, slow), (EngineRuns("flexbatch", made),))
    first, second = (comparison.shares(repeat, run) for repeat, run in enumerate(made))
    assert first.roofline == pytest.approx(0.5)
    assert second.roofline == pytest.approx(0.75)
    assert first.fastest_roofline == second.fastest_roofline == pytest.approx(0.25)
    (entry,) = comparison.record()
    assert entry["share_of_roofline"] == pytest.approx(0.625)
    assert entry["share_of_fastest_roofline"] == pytest.approx(0.25)
