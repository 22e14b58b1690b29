"""A copy of the weights is made only where the job gains more than making it takes, and leaves room on the disk."""

from __future__ import annotations

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.plan.blocked_file import GAIN, affordable_bytes
from flexbatch.plan.cost_model import Prediction, predict
from flexbatch.plan.policy import Policy, Shares
from flexbatch.plan.workload import Workload
from tests.plan.examples import GIB, machine, model

HARDWARE = machine("cpu-2core")


@cache
def prediction(rows: int) -> Prediction:
    policy = Policy(Shares(0, 0), slots=12, prefill_tokens=176)
    return predict(model("opt-1.3b"), HARDWARE, Workload.uniform(rows), policy)


@given(rows=st.integers(1, 400), free=st.integers(0, 1 << 42))
def test_making_it_takes_less_than_the_job_gains(rows: int, free: int) -> None:
    nbytes = affordable_bytes(prediction(rows), HARDWARE, free)
    assert nbytes / HARDWARE.disk_write + nbytes / HARDWARE.disk_read <= GAIN * prediction(rows).seconds
    assert nbytes <= free / 2


def test_a_long_job_affords_a_copy_of_its_model_and_a_short_one_does_not() -> None:
    weights = model("opt-1.3b").weight_bytes()
    assert affordable_bytes(prediction(64), HARDWARE, 100 * GIB) > weights
    assert affordable_bytes(prediction(4), HARDWARE, 100 * GIB) < weights
