"""Whether a copy of the streamed weights in fewer bytes, without loss, is worth making."""

from __future__ import annotations

from flexbatch.config import OffloadConfig
from flexbatch.plan.blocked_file import SPACE
from flexbatch.plan.cost_model import Prediction
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.model_spec import BFLOAT_BYTES, ModelSpec

LOOK_CORE_SECONDS, PACK_CORE_SECONDS = 4e-9, 6e-9
"""Processor time for one number of the copy, looked through and packed (docs/benchmarks.md)."""


def is_wanted(offload: OffloadConfig) -> bool:
    """Whether the options leave compressed weights open: in the number format that they have, and in no fewer bits."""
    return offload.compressed_file != "never" and offload.weight_bits == 16 and offload.compute == "auto"


def may_compress(spec: ModelSpec, hardware: HardwareProfile, offload: OffloadConfig) -> bool:
    """Whether weights can be streamed compressed: bfloat16 by a CPU, which expands them, and not in fewer bits."""
    can_be = spec.compressed_share < 1.0 and spec.compute_dtype == "bfloat16" and not hardware.has_accelerator
    return is_wanted(offload) and can_be


def is_worth(
    choice: str, spec: ModelSpec, hardware: HardwareProfile, compressed: Prediction, plain: Prediction
) -> bool:
    """Whether the job gains more by a compressed copy than making it takes, if it is not there; `choice` is
    `offload.compressed_file`."""
    making = 0.0 if spec.has_compressed_file else making_seconds(spec, hardware)
    return choice == "always" or compressed.seconds + making < plain.seconds


def has_room(spec: ModelSpec, free: int) -> bool:
    """Whether a disk with `free` bytes has room for a copy that nobody asked for."""
    return BFLOAT_BYTES * spec.packed_numbers * spec.compressed_share <= free * SPACE


def making_seconds(spec: ModelSpec, hardware: HardwareProfile) -> float:
    """The checkpoint is read twice, once to look through it; what is left of it is written once. The disk and the
    processor work side by side."""
    numbers = spec.packed_numbers
    read = numbers * spec.dtype_bytes / hardware.disk_read
    written = BFLOAT_BYTES * numbers * spec.compressed_share / hardware.disk_write
    look, pack = (numbers * each / hardware.cores for each in (LOOK_CORE_SECONDS, PACK_CORE_SECONDS))
    return max(read, look) + max(read + written, pack)
