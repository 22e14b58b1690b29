"""The plan and what became of it as plain values, for `_state/plan.json`; the HTML report reads it from there."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flexbatch.report.plan_text import Measured, Plan, comparisons, plan_lines


def plan_record(plan: Plan, measured: Measured | None = None) -> dict[str, Any]:
    """`lines` as printed, the policy, the prediction, and beside `measured` the comparison figure by figure."""
    made = plan.prediction
    record: dict[str, Any] = {
        "lines": plan_lines(plan),
        "policy": asdict(made.policy),
        "predicted": {
            "seconds": made.seconds,
            "tokens_per_second": made.tokens_per_second,
            "prefill_seconds": made.prefill_seconds,
            "decode_seconds": made.decode_seconds,
            "passes": made.passes,
            "pass_seconds": made.pass_seconds,
            "binding": made.binding.value,
            "peak_bytes": {tier.value: count for tier, count in made.peak.items()},
            "seconds_by_resource": {resource.value: seconds for resource, seconds in made.resource_seconds.items()},
            "seconds_by_term": {name: term.seconds for name, term in made.terms.items()},
        },
        "hardware": plan.hardware.name,
    }
    if measured is not None:
        record["comparison"] = [
            {"figure": figure, "predicted": predicted, "measured": real, "unit": unit}
            for figure, predicted, real, unit in comparisons(plan, measured)
        ]
    return record
