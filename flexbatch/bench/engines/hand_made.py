"""Policies that a person might try by hand, around the one that the plan chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from flexbatch.bench.engines.own_job import trial_config, trial_model, trial_work
from flexbatch.bench.trial import Outcome, Trial
from flexbatch.plan.policy import ALL_DEVICE, Shares
from flexbatch.plan.rounding import fits
from flexbatch.report.plan_text import Plan
from flexbatch.stages.planning import plan_run

SLOTS = (0.25, 0.5, 0.6, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0)
PREFILL = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Multiples of what the plan chose."""

PERCENT = range(100, -1, -5)


def run(trial: Trial) -> Outcome:
    """`details["policies"]`: the `offload` options of each policy that fits.

    For each number of slots and of prompt tokens, as many weights stay on the device as there is room for; the cache
    is there as a whole.
    """
    config = trial_config(trial)
    plan = plan_run(config, trial_model(config), trial_work(trial, config))
    return Outcome(trial.engine, details={"policies": list(policies(plan))})


def policies(plan: Plan) -> Iterator[dict[str, Any]]:
    chosen, rows = plan.prediction.policy, plan.workload.rows
    slots = {min(rows, max(1, round(chosen.slots * times))) for times in SLOTS}
    tokens = {max(1, round(chosen.prefill_tokens * times)) for times in PREFILL}
    longest = math.ceil(plan.workload.longest_prompt)
    for made in sorted({(many, min(few, many * longest)) for many in slots for few in tokens}):
        percent = _fullest(plan, *made)
        if percent is not None:
            options = {"policy": "manual", "percent": [float(percent), 0.0, 100.0, 0.0, 100.0, 0.0]}
            yield {**options, "slots": made[0], "prefill_tokens": made[1]}


def _fullest(plan: Plan, slots: int, prefill_tokens: int) -> int | None:
    """The most percent of weights that fit beside so many slots; None if none do."""
    base = replace(plan.prediction.policy, kv=ALL_DEVICE, hidden=ALL_DEVICE)
    for percent in PERCENT:
        weights = Shares.from_percent(percent, 0, what="weights")
        policy = replace(base, weights=weights, slots=slots, prefill_tokens=prefill_tokens)
        if fits(plan.spec, plan.hardware, plan.workload, policy, plan.limits):
            return percent
    return None
