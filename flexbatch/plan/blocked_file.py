"""Whether a copy of the streamed weights in the order in which the processor multiplies them is worth making."""

from __future__ import annotations

from flexbatch.plan.cost_model import Prediction
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.terms import Resource

GAIN = 0.04
"""Of a job's arithmetic, counted on: products of some hundred rows win more by it (docs/benchmarks.md)."""
SPACE = 0.5
"""Of the free disk space: what the copy may take without being asked for."""


def affordable_bytes(prediction: Prediction, hardware: HardwareProfile, free: int) -> int:
    """The largest copy that is made in less time than the job gains by it, with `free` bytes on the disk.

    Making it is reading and writing it once, and twice through memory in between.
    """
    bound = min(prediction.seconds, prediction.resource_seconds.get(Resource.COMPUTE, 0.0))
    second_per_byte = 1 / hardware.disk_read + 1 / hardware.disk_write + 2 / hardware.memory_copy
    return int(min(free * SPACE, GAIN * bound / second_per_byte))
