"""The plan says where everything lives, how long it takes, what binds and what would help."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flexbatch.config import OffloadConfig
from flexbatch.plan.advice import Advice
from flexbatch.plan.limits import limits_of
from flexbatch.plan.optimizer import choose_policy, frontier
from flexbatch.plan.policy import Shares
from flexbatch.plan.workload import Workload
from flexbatch.report.frontier import write_frontier
from flexbatch.report.plan_text import (
    Measured,
    Plan,
    comparisons,
    plan_lines,
    plan_tables,
    predicted_against_measured,
    shares_text,
)
from tests.plan.examples import machine, model

ADVICE = [Advice("50 GB more memory", 1.84), Advice("offload.weight_bits=4", 1.5, "see the quality table")]


@cache
def plan() -> Plan:
    spec, hardware, work = model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(200)
    offload = OffloadConfig(device_memory="2.5GiB")
    _, made = choose_policy(spec, hardware, work, offload)
    return Plan(spec, hardware, work, limits_of(hardware, offload), made)


def text(table: Table) -> str:
    file = io.StringIO()
    Console(width=160, file=file).print(table)
    return file.getvalue()


def test_the_plan_is_told_in_five_lines() -> None:
    lines = plan_lines(plan(), ADVICE)
    assert len(lines) == 5
    assert "opt-1.3b: 1.32B parameters, 2.451GiB" in lines[0]
    assert "2.5GiB device" in lines[2]
    assert "200 rows" in lines[3]
    assert "50 GB more memory: 1.8x" in lines[4]


def test_shares_are_told_without_what_is_empty() -> None:
    assert shares_text(Shares(0.125, 0.5)) == "12.5 % device, 50 % host, 37.5 % disk"
    assert shares_text(Shares(1.0, 0.0)) == "100 % device"


def test_the_tables_name_every_term_and_every_use_of_memory() -> None:
    told = "".join(map(text, plan_tables(plan(), ADVICE)))
    made = plan().prediction
    assert all(term.what in told for term in made.terms.values() if term.seconds > 0)
    assert all(need.what in told for need in made.needs)
    assert "see the quality table" in told


def test_a_run_as_predicted_has_ratios_of_one() -> None:
    made = plan().prediction
    measured = Measured(
        seconds=made.seconds,
        passes=round(made.passes),
        prefill_tokens=0,
        decode_tokens=round(made.generated_tokens),
        bytes_moved={"disk>device": round(made.terms["weights from disk"].amount)},
        peak_bytes={tier.value: nbytes for tier, nbytes in made.peak.items()},
    )
    compared = {what: real / predicted for what, predicted, real, _ in comparisons(plan(), measured) if predicted}
    ratios = [ratio for what, ratio in compared.items() if what != "waiting for weights"]
    assert all(0.99 < ratio < 1.01 for ratio in ratios)
    assert "peak of device" in text(predicted_against_measured(plan(), measured))


def test_half_a_job_is_compared_with_half_the_prediction() -> None:
    made = plan().prediction
    half = Measured(made.seconds / 2, round(made.passes / 2), 0, round(made.generated_tokens / 2))
    predicted, real = next((p, m) for what, p, m, _ in comparisons(plan(), half) if what == "time")
    assert 0.98 < real / predicted < 1.02


def test_the_frontier_is_drawn(tmp_path: Path) -> None:
    made = frontier(plan().spec, plan().hardware, plan().workload, OffloadConfig(device_memory="2.5GiB"))
    write_frontier(made, plan().prediction, tmp_path / "frontier.png", title="a title")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
