"""How many bytes of each tier a run may use: the user's limits, checked against what the machine has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexbatch.config import OffloadConfig, parse_bytes
from flexbatch.errors import CapacityError
from flexbatch.plan.hardware import HardwareProfile
from flexbatch.plan.policy import Tier


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of each tier that may be in use at any moment.

    With `one_memory` (no accelerator) device and host are both main memory, and `device` limits their sum.
    """

    device: int
    host: int
    disk: int
    one_memory: bool = False

    def of(self, tier: Tier) -> int:
        return {Tier.DEVICE: self.device, Tier.HOST: self.host, Tier.DISK: self.disk}[tier]

    def exceeded(self, peak: Mapping[Tier, int]) -> Tier | None:
        """The first tier whose limit `peak` is over, or None."""
        used = dict(peak)
        if self.one_memory:
            used[Tier.DEVICE], used[Tier.HOST] = peak[Tier.DEVICE] + peak[Tier.HOST], 0
        return next((tier for tier in Tier if used[tier] > self.of(tier)), None)


# The key that a user turns to change a tier's limit.
LIMIT_KEYS = {Tier.DEVICE: "offload.device_memory", Tier.HOST: "offload.host_memory", Tier.DISK: "offload.disk_dir"}


def limits_of(hardware: HardwareProfile, offload: OffloadConfig) -> Limits:
    """The limits of a run. Without an accelerator main memory is the device, and either memory key limits it.

    Raises `CapacityError` for a limit above what the machine has, `ConfigError` for one that is not a size.
    """
    device = _limit(offload.device_memory, hardware.device_memory, "offload.device_memory")
    if hardware.has_accelerator:
        host = _limit(offload.host_memory, hardware.host_memory, "offload.host_memory")
        return Limits(device, host, hardware.disk_space)
    host = _limit(offload.host_memory, hardware.device_memory, "offload.host_memory")
    return Limits(min(device, host), 0, hardware.disk_space, one_memory=True)


def _limit(text: str, free: int, key: str) -> int:
    if str(text) == "auto":
        return free
    wanted = parse_bytes(text, key=key)
    if wanted > free:
        raise CapacityError(
            f"{key} is {text} ({gibibytes(wanted)}), but only {gibibytes(free)} are free on this machine.",
            remedy=f"Set {key} to at most {gibibytes(free)}, or leave it at auto.",
        )
    return wanted


def gibibytes(nbytes: float) -> str:
    """Bytes as a user would write them in a limit: `2.4GiB`, `310MiB`."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if nbytes >= size:
            return f"{nbytes / size:.4g}{unit}"
    return f"{nbytes:.0f}"
