"""The plan as plain values: JSON can hold it, and nothing of it is lost on the way to the report."""

from __future__ import annotations

import json

from flexbatch.config import OffloadConfig
from flexbatch.plan.limits import limits_of
from flexbatch.plan.optimizer import choose_policy
from flexbatch.plan.workload import Workload
from flexbatch.report.plan_record import plan_record
from flexbatch.report.plan_text import Measured, Plan, plan_lines
from tests.plan.examples import machine, model


def test_the_plan_survives_json_with_its_lines_and_its_comparison() -> None:
    spec, hardware, workload = model("opt-1.3b"), machine("cpu-2core"), Workload.uniform(64)
    offload = OffloadConfig(device_memory="4GiB")
    _, prediction = choose_policy(spec, hardware, workload, offload)
    plan = Plan(spec, hardware, workload, limits_of(hardware, offload), prediction)
    measured = Measured(seconds=prediction.seconds * 1.1, passes=10, prefill_tokens=1, decode_tokens=64 * 32)
    record = json.loads(json.dumps(plan_record(plan, measured)))
    assert record["lines"] == plan_lines(plan)
    assert record["policy"]["slots"] == prediction.policy.slots
    assert record["predicted"]["seconds"] == prediction.seconds
    speed = next(row for row in record["comparison"] if row["figure"] == "speed")
    assert 0.85 < speed["measured"] / speed["predicted"] < 0.95
    assert "comparison" not in plan_record(plan)
