"""What would make a run faster, and by how much: the plan made again with one thing changed at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from flexbatch.config import OffloadConfig
from flexbatch.errors import FlexbatchError
from flexbatch.plan.cost_model import Prediction
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.limits import limits_of
from flexbatch.plan.model_spec import ModelSpec
from flexbatch.plan.optimizer import choose_policy
from flexbatch.plan.workload import Workload

# Below this a change is not worth a line.
WORTHWHILE = 1.05


@dataclass(frozen=True, slots=True)
class Advice:
    """`change` in words, `speedup` as predicted (2.0: the job takes half the time), and what it costs, if anything."""

    change: str
    speedup: float
    cost: str = ""

    def __str__(self) -> str:
        return f"{self.change}: {self.speedup:.1f}x{f' ({self.cost})' if self.cost else ''}"


def advise(
    spec: ModelSpec, hardware: HardwareProfile, workload: Workload, offload: OffloadConfig, now: Prediction
) -> list[Advice]:
    """The changes that would help, best first. `now` is the prediction as things are."""
    free = _with(offload, policy="auto", slots="auto", prefill_tokens="auto")
    made = []
    for change, cost, machine, options in _changes(hardware, workload, offload, free):
        try:
            _, prediction = choose_policy(spec, machine, workload, options)
        except FlexbatchError:
            continue
        speedup = now.seconds / prediction.seconds
        if speedup >= WORTHWHILE:
            made.append(Advice(change, speedup, cost))
    return sorted(made, key=lambda advice: -advice.speedup)


def _with(offload: OffloadConfig, **changes: Any) -> OffloadConfig:
    return replace(offload, **changes)


def _changes(
    hardware: HardwareProfile, workload: Workload, offload: OffloadConfig, free: OffloadConfig
) -> Iterator[tuple[str, str, HardwareProfile, OffloadConfig]]:
    """In words, its cost, the machine and the options of each change that is open."""
    if offload.policy == "manual" or str(offload.slots) != "auto" or str(offload.prefill_tokens) != "auto":
        yield "offload.policy, slots and prefill_tokens left at auto", "", hardware, free
    limits = limits_of(hardware, offload)
    memory = limits.host if hardware.has_accelerator else limits.device
    more = _rounded_gigabytes(memory)
    yield f"{more} GB more memory", "", _with_memory(hardware, memory, more * 10**9), _unlimited(free, hardware)
    if offload.weight_bits > 8:
        yield "offload.weight_bits=8", "see the quality table", hardware, _with(free, weight_bits=8)
    if offload.weight_bits > 4:
        yield "offload.weight_bits=4", "see the quality table", hardware, _with(free, weight_bits=4)
    if offload.kv_bits > 4:
        yield "offload.kv_bits=4", "see the quality table", hardware, _with(free, kv_bits=4)
    if offload.compute != "int8" and "int8" in hardware.gemm and not hardware.has_accelerator:
        yield "offload.compute=int8", "see the quality table", hardware, _with(free, compute="int8")
    if not offload.prefix_sharing and workload.shared_tokens:
        yield "offload.prefix_sharing=true", "", hardware, _with(free, prefix_sharing=True)
    yield "a disk twice as fast", "", replace(hardware, disk_read=2 * hardware.disk_read), free


def _rounded_gigabytes(memory: int) -> int:
    """As much again, as a number that one would buy."""
    return 1 << max(0, round(math.log2(max(1.0, memory / 1e9))))


def _with_memory(hardware: HardwareProfile, limit: int, more: int) -> HardwareProfile:
    if hardware.has_accelerator:
        return replace(hardware, host_memory=limit + more)
    return replace(hardware, device_memory=limit + more)


def _unlimited(offload: OffloadConfig, hardware: HardwareProfile) -> OffloadConfig:
    """The grown memory is the limit; an accelerator's own limit stays."""
    if hardware.has_accelerator:
        return _with(offload, host_memory="auto")
    return _with(offload, device_memory="auto", host_memory="auto")
