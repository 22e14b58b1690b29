"""Whether a copy of the streamed weights in the order in which the processor multiplies them is worth making."""

from __future__ import annotations

from flexbatch.plan.cost_model import Prediction
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.policy import Tier
from flexbatch.plan.terms import Resource

GAIN = 0.04
"""Of a job's arithmetic, counted on: products of some hundred rows win more by it (docs/benchmarks.md)."""
SPACE = 0.5
"""Of the free disk space: what the copy may take without being asked for."""


def affordable_bytes(prediction: Prediction, hardware: HardwareProfile, free: int, to_do: float = 1.0) -> int:
    """The largest copy that is made in less time than the job gains by it, with `free` bytes on the disk, of which the
    plan may use some, and this part of the job still `to_do`.

    Making it is reading and writing it once, and twice through memory in between. Only products with streamed weights
    gain, and only as far as the job does not wait for something else meanwhile.
    """
    busy = prediction.resource_seconds
    others = max((seconds for resource, seconds in busy.items() if resource is not Resource.COMPUTE), default=0.0)
    streamed = 1.0 - prediction.policy.weights.device
    gain = min(GAIN * streamed * busy.get(Resource.COMPUTE, 0.0), prediction.seconds - others)
    second_per_byte = 1 / hardware.disk_read + 1 / hardware.disk_write + 2 / hardware.memory_copy
    room = (free - prediction.peak.get(Tier.DISK, 0)) * SPACE
    return max(0, int(min(room, gain * to_do / second_per_byte)))
