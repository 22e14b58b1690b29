"""A copy of the weights is made only where the job gains more than making it takes, and leaves room on the disk."""

from __future__ import annotations

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from flexbatch.plan.blocked_file import GAIN, affordable_bytes
from flexbatch.plan.cost_model import Prediction, predict
from flexbatch.plan.policy import Policy, Shares
from flexbatch.plan.terms import Resource
from flexbatch.plan.workload import Workload
from tests.plan.examples import GIB, machine, model

HARDWARE = machine("cpu-2core")


@cache
def prediction(rows: int, resident: float = 0.0) -> Prediction:
    policy = Policy(Shares(resident, 0), slots=36, prefill_tokens=512)
    return predict(model("opt-1.3b"), HARDWARE, Workload.uniform(rows), policy)


@given(rows=st.integers(1, 400), resident=st.floats(0, 1), to_do=st.floats(0, 1), free=st.integers(0, 1 << 42))
def test_making_it_takes_less_than_the_job_gains(rows: int, resident: float, to_do: float, free: int) -> None:
    made = prediction(rows, resident)
    nbytes = affordable_bytes(made, HARDWARE, free, to_do)
    seconds = nbytes / HARDWARE.disk_write + nbytes / HARDWARE.disk_read
    assert 0 <= seconds <= GAIN * (1 - resident) * to_do * made.resource_seconds[Resource.COMPUTE]
    assert nbytes <= free / 2


def test_a_long_job_affords_a_copy_of_its_model_and_a_short_one_does_not() -> None:
    weights = model("opt-1.3b").weight_bytes()
    assert affordable_bytes(prediction(256), HARDWARE, 100 * GIB) > weights
    assert affordable_bytes(prediction(4), HARDWARE, 100 * GIB) < weights
    assert affordable_bytes(prediction(256), HARDWARE, 100 * GIB, to_do=0.01) < weights


def test_a_job_that_waits_for_the_disk_gains_nothing() -> None:
    slow = machine("cpu-2core", disk_read=HARDWARE.disk_read / 20)
    policy = Policy(Shares(0, 0), slots=12, prefill_tokens=64)
    assert affordable_bytes(predict(model("opt-1.3b"), slow, Workload.uniform(64), policy), slow, 100 * GIB) < GIB
